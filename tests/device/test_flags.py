"""Under each of ComfyUI's memory flags models come, go and come again, and draw the same."""

import json
from typing import Any

import pytest
import torch

from host.graphs import Graph, changed, read_latent, with_latent_saved
from longcat_pack.tools.host import ComfyServer

FLAGS = {
    "default": (),
    "lowvram": ("--lowvram",),
    "lowvram, no dynamic VRAM": ("--lowvram", "--disable-dynamic-vram"),
    "novram": ("--novram",),
    "highvram": ("--highvram",),
    "no dynamic VRAM": ("--disable-dynamic-vram",),
    "gpu only": ("--gpu-only",),
}
# Engine, its precision, the text encoder's.
MODELS = [
    ("core", "bf16", "bf16"),
    ("diffusers", "fp32", "fp8"),
    ("core", "int8", "int8-quanto"),
    ("core", "fp8", "int8"),
    ("diffusers", "int8-quanto", "fp32"),
]
# A model of the demo takes more.
SLACK_BYTES = 4 * 2**20
IDLE = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 0}},
    "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
}


@pytest.fixture(params=FLAGS.values(), ids=FLAGS.keys())
def server(request: pytest.FixtureRequest, server_with: Any) -> ComfyServer:
    """A server for each of the flags."""
    return server_with(*request.param)


def model_graph(graph: Graph, engine: str, precision: str, encoder: str) -> Graph:
    settings = {"1.engine": engine, "1.engine.precision": precision, "1.text_encoder_precision": encoder}
    return changed(graph, **settings)


def latent(server: ComfyServer, graph: Graph) -> torch.Tensor:
    """The sampler's latent, sampled anew."""
    result = server.run(with_latent_saved(graph, "5"))
    assert "5" in result.executed_nodes
    return read_latent(server, result, "latent")


def free(server: ComfyServer) -> int:
    """Let the server unload all models and forget all results; gives the device memory that stays in use."""
    server.free()
    for _ in range(2):  # it does so after the first prompt that ends, and has done it when the second one ends
        server.run(IDLE)
    device = json.loads(server.get("/system_stats"))["devices"][0]
    return device["vram_total"] - device["vram_free"]


def test_models_take_turns_and_draw_the_same_after_being_freed(
    server: ComfyServer, graph: Graph, device: torch.device
) -> None:
    turns = [model_graph(graph, *model) for model in MODELS]
    first = [latent(server, turn) for turn in turns]
    nothing = free(server)
    again = [latent(server, turn) for turn in turns]
    assert differences(first, again) == {}
    if device.type == "cuda":  # a CPU's free memory is everybody's
        assert free(server) <= nothing + SLACK_BYTES


def test_two_models_in_one_graph_draw_as_they_do_alone(server: ComfyServer, graph: Graph) -> None:
    one, other = (with_latent_saved(model_graph(graph, *model), "5") for model in MODELS[:2])
    alone = [latent(server, turn) for turn in (one, other)]
    free(server)
    result = server.run({**one, **renamed(other, "other-")})
    assert {"5", "other-5"} <= set(result.executed_nodes)
    together = [read_latent(server, result, node) for node in ("latent", "other-latent")]
    assert differences(alone, together) == {}


def differences(some: list[torch.Tensor], others: list[torch.Tensor]) -> dict[tuple[str, ...], float]:
    """The models, in the order of MODELS, whose latents are not the same bits, with the largest difference."""
    pairs = zip(MODELS, some, others, strict=False)
    return {model: float((one - other).abs().max()) for model, one, other in pairs if not torch.equal(one, other)}


def renamed(graph: Graph, prefix: str) -> Graph:
    """The graph with a prefix to the name of every node."""

    def value(given: Any) -> Any:
        return [prefix + given[0], given[1]] if isinstance(given, list) else given

    return {
        prefix + key: {**node, "inputs": {name: value(given) for name, given in node["inputs"].items()}}
        for key, node in graph.items()
    }
