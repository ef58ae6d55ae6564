"""LoRAs on the device: every precision and way of keeping weights gives the LoRA's picture, and the base's again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from device import machine
from foreign_loras import Changes, foreign, linear_shapes, native_changes
from safetensors.torch import load_file

from host import graphs
from longcat_pack.longcat_backend import checkpoints, precision, transformer
from longcat_pack.longcat_backend.comfy_bridge import devices
from longcat_pack.tools.environment import link_directory
from longcat_pack.tools.host import ComfyServer

# Of a LoRA that outweighs the layer, relative to what it adds to the output: the rounding of the output. ComfyUI's
# quantised layers round the weights with the LoRA in them anew, by eight bits for a row or by three for each weight.
MOST_OF_A_LAYER = {("core", "fp32"): 1e-4, ("diffusers", "fp32"): 1e-4, ("core", "int8"): 0.06, ("core", "fp8"): 0.15}
MOST_ROUNDED = 0.02
STRONG = 8.0
# Of the strength in the picture, beside the base's own relative error. That points anywhere, so little of it lies along
# what a LoRA does.
MOST_GAIN = 0.08
# By the bits of a weight: what rounding the weights with the LoRA in them may change of that.
MOST_MERGED = {32: 1e-3, 16: 0.05, 8: 0.25, 4: 0.25}
LAYER_NODES = Path(__file__).resolve().parent / "layer_nodes"
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
    """Put a LoRA for all layers of LongCat-Tiny where a server finds it: what it changes, by each engine's layers."""
    model = transformer.load_transformer(checkpoints.open_checkpoint(pack_dir / "demo" / "LongCat-Tiny"), torch.float32)
    path, changes = foreign("transformer, alpha tensors", model.transformer, tmp_path_factory.mktemp("lora"))
    of_layers = {
        "core": native_changes(changes, linear_shapes(model.transformer)),
        "diffusers": {name.removesuffix(".weight"): change for name, change in changes.items()},
    }

    def into(server: ComfyServer) -> dict[str, Changes]:
        target = server.base_dir / "models" / "loras" / PATH
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        return of_layers

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


@pytest.fixture(scope="module")
def layer_server(make_server: Any, tmp_path_factory: pytest.TempPathFactory) -> ComfyServer:
    """A server with the node that runs layers one by one."""
    base = tmp_path_factory.mktemp("layers")
    (base / "custom_nodes").mkdir()
    link_directory(LAYER_NODES, base / "custom_nodes" / LAYER_NODES.name)
    return make_server(base_dir=base)


def layer_outputs(server: ComfyServer, graph: graphs.Graph, **inputs: Any) -> dict[str, torch.Tensor]:
    """What LayerOutputs writes about the LoRA's MODEL."""
    graph = graphs.changed({key: graph[key] for key in ("1", "lora")}, **inputs)
    graph["layers"] = {"class_type": "LayerOutputs", "inputs": {"model": ["lora", 0], "name": "layers"}}
    (name,) = server.run(graph).outputs["layers"]["file"]
    return load_file(server.base_dir / "output" / name)


@pytest.mark.parametrize(("engine", "name"), cases())
def test_every_layer_gains_the_loras_product(
    engine: str, name: str, layer_server: ComfyServer, graph: graphs.Graph, write: Any
) -> None:
    changes = write(layer_server)[engine]
    settings = {"1.engine": engine, "1.engine.precision": name, "1.modulation_table": False}
    graph = graphs.changed(graph, **settings)
    without = layer_outputs(layer_server, graph, **{"lora.strength": 0.0})
    with_lora = layer_outputs(layer_server, graph, **{"lora.strength": STRONG})
    errors = {}
    for layer, change in changes.items():
        inputs = with_lora[f"input.{change.shape[1]}"].double()
        expected = STRONG * inputs @ change.T
        place = layer if engine == "core" else f"velocity.transformer.{layer}"
        gained = with_lora[place].double() - without[place].double()
        errors[layer] = float((gained - expected).norm() / expected.norm())
    worst = max(errors, key=lambda layer: errors[layer])
    assert errors[worst] <= MOST_OF_A_LAYER.get((engine, name), MOST_ROUNDED), (worst, errors[worst])


@pytest.mark.parametrize(("engine", "name"), cases())
def test_a_lora_does_the_same_in_every_precision(
    engine: str, name: str, server_with: Any, graph: graphs.Graph, write: Any
) -> None:
    server = server_with()
    write(server)
    graph = graphs.changed(graph, **{"4.batch_size": 4})
    exact_base, exact = base_and_lora(server, graph)
    base, changed = base_and_lora(server, graphs.changed(graph, **{"1.engine": engine, "1.engine.precision": name}))
    expected, found = (exact - exact_base).double(), (changed - base).double()
    rounding = (base - exact_base).norm()
    gain = (found * expected).sum() / expected.square().sum()
    assert abs(gain - 1) <= MOST_GAIN + rounding / exact_base.norm()
    merged = MOST_MERGED[precision.PRESETS[name].bits] * expected.norm()
    assert (found - expected).norm() <= 2 * rounding + merged  # of the base, without and with the LoRA


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
