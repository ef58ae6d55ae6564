"""What the benchmarks on LongCat-Tiny share: the pack as the tests load it, and states to compare forwards at."""

import datetime
import importlib.metadata
import platform
import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
NAME = "LongCat-Tiny"
FOLDER = ROOT / "demo" / NAME
SIZE = 128
PACKAGES = ("torch", "diffusers", "transformers", "optimum-quanto", "torchao", "comfy-kitchen")


@dataclass(frozen=True)
class State:
    """One noise level of a run in fp32: latents (prompts, 16, 16, 16), sigma, text embeddings of the prompts."""

    samples: torch.Tensor
    sigma: float
    text: torch.Tensor


def load_pack(device: str) -> None:
    """Make the pack and ComfyUI importable in this process, as the tests do; "cpu", or any GPU that ComfyUI finds."""
    runpy.run_path(str(ROOT / "tests" / "conftest.py"))
    import comfy.cli_args

    comfy.cli_args.args.cpu = device == "cpu"


@torch.no_grad()
def states(prompts: Sequence[str], steps: int) -> list[State]:
    """Where Euler in fp32 passes by from one noise to each prompt, without guidance; the first state is the noise."""
    from longcat_pack.longcat_backend import checkpoints, flow, latents, transformer

    checkpoint = checkpoints.open_checkpoint(FOLDER)
    model = transformer.load_transformer(checkpoint, torch.float32)
    text = embeddings(prompts)
    noise = torch.randn(1, 16, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(0))
    samples = noise.expand(len(prompts), -1, -1, -1)
    sigmas = flow.sigmas(steps, latents.token_count(samples), checkpoint.configs["scheduler"])
    found = []
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        found.append(State(samples, float(sigma), text))
        samples = samples + (following - sigma) * model(samples, sigma.expand(len(prompts)), text)
    return found


def embeddings(prompts: Sequence[str]) -> torch.Tensor:
    """Text embeddings (prompts, 512, hidden size) in fp32."""
    from longcat_pack.longcat_backend import checkpoints, text_encoder
    from longcat_pack.longcat_backend import prompts as tokens

    checkpoint = checkpoints.open_checkpoint(FOLDER)
    tokenizer = text_encoder.load_tokenizer(checkpoint)
    encoder = text_encoder.load_text_encoder(checkpoint, tokenizer, torch.float32)
    return torch.cat([encoder.encode(tokens.tokenize(tokenizer, prompt).ids) for prompt in prompts])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference over that of the expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def circumstances(device: str) -> dict[str, Any]:
    """When, where and with which versions."""
    name = f"cpu ({platform.machine()})" if device == "cpu" else torch.cuda.get_device_name()
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "versions": {package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
