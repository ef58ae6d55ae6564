"""In bf16 the timestep is rounded as in the reference pipeline, in both engines (DESIGN.md trap 9)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from longcat_pack.longcat_backend import checkpoints, latents
from longcat_pack.longcat_backend.comfy_bridge import clip as clip_bridge
from longcat_pack.longcat_backend.comfy_bridge import loading, sampling
from parity import reference as ref

STEPS = 5


def collect(module: torch.nn.Module, seen: list[torch.Tensor]) -> Any:
    """Record what a module is given: the sinusoids of the timestep, one row per call."""
    return module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].float()))


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    pipe = ref.pipeline.__wrapped__(folder, torch.bfloat16)
    seen: list[torch.Tensor] = []
    collect(pipe.transformer.time_embed.timestep_embedder, seen)
    size = {"width": 128, "height": 128}
    ref.draw(pipe, "红圆", seed=0, output="latent", num_inference_steps=STEPS, guidance_scale=1.0, **size)
    return torch.stack(seen)


@pytest.mark.parametrize("engine", ["core", "diffusers"])
@torch.inference_mode()
def test_sinusoids_equal_the_pipelines(engine: str, folder: Path, loaded: Any, expected: torch.Tensor) -> None:
    _, clip, _ = loaded(engine)
    # Without the modulation table, which embeds a whole schedule in its first step.
    model = loading.load_model(checkpoints.open_checkpoint(folder), engine, "bf16", tabulate=False)
    model.model.manual_cast_dtype = None  # ComfyUI would compute in fp32 on a CPU
    network = model.model.diffusion_model
    embedder = network.time_in if engine == "core" else network.velocity.transformer.time_embed.timestep_embedder
    seen: list[torch.Tensor] = []
    collect(embedder, seen)
    conditioning, _ = clip_bridge.encode(clip, "红圆")
    canvas = {"samples": latents.empty_latent(128, 128, 1)}
    sampling.sample(model, conditioning, conditioning, canvas, sampling.schedule(model, canvas, STEPS), 1.0, 0)
    assert len(seen) == STEPS
    # One unit in the last place of bf16; without the rounding the fastest sinusoids are off by up to 2.
    assert (torch.stack(seen) - expected).abs().max() <= 2**-7
