"""LoRAs on the device: every precision and way of keeping weights gives the LoRA's picture, and the base's again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from device import machine
from foreign_loras import foreign

from host import graphs
from longcat_pack.longcat_backend import checkpoints, precision, transformer
from longcat_pack.longcat_backend.comfy_bridge import devices
from longcat_pack.tools.host import ComfyServer

# Relative to what the LoRA changes, which is a fifth of the velocity: the rest is the rounding of each precision.
# fp8 rounds activations to three bits too: 0.56 with the product emulated in fp32.
MOST = {32: 1e-3, 16: 0.3, 8: 0.5, 4: 0.6}
MOST_FP8 = 0.8
OFFLOADS = [
    {"level": "block", "blocks_per_group": 1, "stream": True, "host_memory": "pinned"},
    {"level": "leaf", "blocks_per_group": 1, "stream": False, "host_memory": "low"},
]
PATH = "test_lora_on_the_device.safetensors"


def cases() -> list[tuple[str, str]]:
    """Engine and precision, of all that this device can run."""
    policy = devices.policy(machine.device())
    names = [(engine, name) for engine, presets in precision.ENGINE_PRESETS.items() for name in presets]
    return [case for case in names if policy.supports(precision.PRESETS[case[1]])]


@pytest.fixture(scope="module")
def write(pack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Put a LoRA for all layers of LongCat-Tiny where a server finds it."""
    model = transformer.load_transformer(checkpoints.open_checkpoint(pack_dir / "demo" / "LongCat-Tiny"), torch.float32)
    path, _ = foreign("transformer, alpha tensors", model.transformer, tmp_path_factory.mktemp("lora"))

    def into(server: ComfyServer) -> None:
        target = server.base_dir / "models" / "loras" / PATH
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())

    return into


@pytest.fixture
def graph(graph: graphs.Graph) -> Iterator[graphs.Graph]:
    """Two steps with a LoRA between loader and sampler."""
    graph = graphs.changed(graph, **{"5.steps": 2, "5.model": ["lora", 0]})
    inputs = {"model": ["1", 0], "lora": PATH, "strength": 0.8}
    yield {**graph, "lora": {"class_type": "LongCatLoraLoader", "inputs": inputs}}


def base_and_lora(server: ComfyServer, graph: graphs.Graph) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents without and with the LoRA; without it they are the same before and after."""
    off = graphs.changed(graph, **{"lora.strength": 0.0})
    base = graphs.saved_latent(server, off, "5")
    changed = graphs.saved_latent(server, graph, "5")
    again = graphs.saved_latent(server, graphs.changed(off, **{"5.denoise": 0.999}), "5")  # not from ComfyUI's cache
    assert not torch.equal(again, changed)
    assert torch.equal(graphs.saved_latent(server, off, "5"), base)
    return base, changed


@pytest.mark.parametrize(("engine", "name"), cases())
def test_a_lora_does_the_same_in_every_precision(
    engine: str, name: str, server_with: Any, graph: graphs.Graph, write: Any
) -> None:
    server = server_with()
    write(server)
    exact_base, exact = base_and_lora(server, graph)
    base, changed = base_and_lora(server, graphs.changed(graph, **{"1.engine": engine, "1.engine.precision": name}))
    error = ((changed - base) - (exact - exact_base)).norm() / (exact - exact_base).norm()
    assert error <= (MOST_FP8 if name.startswith("fp8") else MOST[precision.PRESETS[name].bits])


@pytest.mark.parametrize("offload", OFFLOADS, ids=lambda offload: offload["level"])
def test_a_lora_runs_beside_group_offloaded_weights(
    offload: dict[str, Any], server_with: Any, graph: graphs.Graph, write: Any
) -> None:
    server = server_with()
    write(server)
    graph = graphs.changed(graph, **{"1.engine": "diffusers"})
    _, expected = base_and_lora(server, graph)
    settings = {"1.offload": "group offload", **{f"1.offload.{key}": value for key, value in offload.items()}}
    _, changed = base_and_lora(server, graphs.changed(graph, **settings))
    assert (changed - expected).norm() / expected.norm() <= 1e-4


@pytest.mark.parametrize("flag", ["--lowvram", "--novram"])
@pytest.mark.parametrize("engine", ["core", "diffusers"])
def test_a_lora_is_the_same_where_weights_are_streamed(
    engine: str, flag: str, server_with: Any, graph: graphs.Graph, write: Any
) -> None:
    results = []
    for server in (server_with(), server_with(flag)):
        write(server)
        results.append(base_and_lora(server, graphs.changed(graph, **{"1.engine": engine}))[1])
    assert (results[0] - results[1]).norm() / results[0].norm() <= 1e-4
