"""On the device, with and without dynamic VRAM, both engines sample what diffusers' own pipeline samples there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from host.graphs import Graph, changed, saved_latent
from longcat_pack.longcat_backend import latents
from longcat_pack.tools.host import ComfyServer
from parity import reference

ENGINES = ["core", "diffusers"]
MODES = {"dynamic VRAM": (), "no dynamic VRAM": ("--disable-dynamic-vram",)}
PROMPT = "a small yellow circle at the top on a purple background"
SEED, SIZE, STEPS = 7, 128, 8
FP32_TOLERANCE = 2e-4
# How much farther from the exact picture than the pipeline's own bf16.
BF16_FACTOR = 1.5
GROUP_OFFLOADS = [
    {"level": "block", "blocks_per_group": 1, "stream": True, "host_memory": "pinned"},
    {"level": "block", "blocks_per_group": 2, "stream": False, "host_memory": "low"},
    {"level": "leaf", "blocks_per_group": 1, "stream": True, "host_memory": "low"},
    {"level": "block", "blocks_per_group": 1, "stream": False, "host_memory": "disk"},
]


@pytest.fixture(scope="module", params=MODES.values(), ids=MODES.keys())
def server(request: pytest.FixtureRequest, server_with: Any) -> ComfyServer:
    """A server with and one without dynamic VRAM."""
    return server_with(*request.param)


def pipeline_latent(folder: Path, device: torch.device, dtype: torch.dtype, guidance: float) -> torch.Tensor:
    """The unscaled latent (1, 16, h, w) in fp32 that diffusers' pipeline samples on the device."""
    pipe = reference.pipeline(folder, dtype).to(device)
    settings = {"width": SIZE, "height": SIZE, "num_inference_steps": STEPS, "guidance_scale": guidance}
    packed = reference.draw(pipe, PROMPT, seed=SEED, output="latent", **settings).float().cpu()
    config = pipe.vae.config
    return latents.unpack_scaled(packed, config, SIZE, SIZE)


def sampled(server: ComfyServer, graph: Graph, engine: str, precision: str, guidance: float, **more: Any) -> Any:
    settings = {"1.engine": engine, "1.engine.precision": precision, "1.text_encoder_precision": precision}
    drawing = {"2.prompt": PROMPT, "5.seed": SEED, "5.guidance": guidance, "5.steps": STEPS}
    return saved_latent(server, changed(graph, **settings, **drawing, **more), "5")


def distance(latent: torch.Tensor, expected: torch.Tensor) -> float:
    return float((latent - expected).norm() / expected.norm())


@pytest.fixture(scope="session")
def folder(pack_dir: Path) -> Path:
    """The demo checkpoint."""
    return pack_dir / "demo" / "LongCat-Tiny"


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("engine", ENGINES)
def test_fp32_equals_the_pipeline(
    server: ComfyServer, graph: Graph, folder: Path, device: torch.device, engine: str, guidance: float
) -> None:
    expected = pipeline_latent(folder, device, torch.float32, guidance)
    assert distance(sampled(server, graph, engine, "fp32", guidance), expected) <= FP32_TOLERANCE


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_is_as_near_as_the_pipelines_own(
    server: ComfyServer, graph: Graph, folder: Path, device: torch.device, engine: str, guidance: float
) -> None:
    exact = pipeline_latent(folder, device, torch.float32, guidance)
    theirs = distance(pipeline_latent(folder, device, torch.bfloat16, guidance), exact)
    ours = distance(sampled(server, graph, engine, "bf16", guidance), exact)
    assert 0 < ours <= BF16_FACTOR * theirs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_modulation_table_changes_no_bit(server: ComfyServer, graph: Graph, engine: str, precision: str) -> None:
    tabulated = sampled(server, graph, engine, precision, 4.5, **{"1.modulation_table": True})
    computed = sampled(server, graph, engine, precision, 4.5, **{"1.modulation_table": False})
    assert torch.equal(tabulated, computed)


@pytest.mark.parametrize("offload", GROUP_OFFLOADS, ids=lambda offload: "-".join(map(str, offload.values())))
def test_group_offload_changes_no_bit(server: ComfyServer, graph: Graph, offload: dict[str, Any]) -> None:
    settings = {"1.offload": "group offload", **{f"1.offload.{key}": value for key, value in offload.items()}}
    resident = sampled(server, graph, "diffusers", "bf16", 4.5)
    assert torch.equal(sampled(server, graph, "diffusers", "bf16", 4.5, **settings), resident)


def test_dynamic_vram_is_what_the_flag_says(server_with: Any, device: torch.device) -> None:
    enabled = "DynamicVRAM support detected and enabled"
    for flags in MODES.values():
        assert (enabled in server_with(*flags).log_text()) == (device.type == "cuda" and not flags)
