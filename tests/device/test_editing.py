"""On the device, under ComfyUI's memory managers, both engines edit as diffusers' own pipeline does there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from host import edit_graph
from host.graphs import changed, saved_latent

ENGINES = ["core", "diffusers"]
MODES = {
    "dynamic VRAM": (),
    "no dynamic VRAM": ("--disable-dynamic-vram",),
    "no VRAM": ("--disable-dynamic-vram", "--novram"),
}
FP32_TOLERANCE = 2e-4
BF16_TOLERANCE = 0.1


@pytest.mark.parametrize("flags", MODES.values(), ids=MODES.keys())
def test_the_edit_is_the_pipelines(flags: tuple[str, ...], make_server: Any, pack_dir: Path, device: Any) -> None:
    server = make_server(*flags)
    folder, _ = edit_graph.install(server, pack_dir / "demo" / "LongCat-Tiny")
    expected = edit_graph.expected(folder, device)
    for engine in ENGINES:
        graph = changed(edit_graph.graph(), **{"1.engine": engine})
        drawn = saved_latent(server, graph, "5")
        assert float((drawn - expected).norm() / expected.norm()) <= FP32_TOLERANCE, engine
        half = {"1.engine.precision": "bf16", "1.text_encoder_precision": "bf16"}
        drawn = saved_latent(server, changed(graph, **half), "5")
        assert torch.isfinite(drawn).all()
        assert float((drawn - expected).norm() / expected.norm()) <= BF16_TOLERANCE, engine
