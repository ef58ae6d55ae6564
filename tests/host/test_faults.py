"""Running out of memory while encoding, sampling or decoding costs the prompt, and nothing else."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from host import graphs
from longcat_pack.tools.environment import link_directory
from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import NodeFailed, Result

FAULT_NODES = Path(__file__).resolve().parent / "fault_nodes"
# Socket of LongCatLoader, node that stands behind it in the graph, and the call of a late layer that fails. The VAE
# fails twice, because ComfyUI answers its first failure by decoding in tiles.
FAULTS = {
    "encode": (1, "FaultClip", {"call": 1, "times": 1}),
    "sample": (0, "FaultModel", {"call": 3, "times": 1}),
    "decode": (2, "FaultVae", {"call": 1, "times": 2}),
}
FAILING_NODE = {"encode": "LongCatTextEncode", "sample": "LongCatSampler", "decode": "LongCatDecode"}
# Less than one of the demo's models, and far less than the failed pass held.
SLACK_BYTES = 4 * 2**20
RESIDENT_SLACK_BYTES = 128 * 2**20


@pytest.fixture(scope="module")
def faulty_server(make_server: Any, tmp_path_factory: pytest.TempPathFactory) -> ComfyServer:
    """A server with the nodes that fail."""
    base = tmp_path_factory.mktemp("faulty")
    (base / "custom_nodes").mkdir()
    link_directory(FAULT_NODES, base / "custom_nodes" / FAULT_NODES.name)
    return make_server(base_dir=base)


@pytest.fixture(params=["core", "diffusers"])
def graph(request: pytest.FixtureRequest, api_workflow: Any) -> graphs.Graph:
    """Text to image in few steps, with a node that can fail behind each socket of the loader."""
    graph = graphs.changed(api_workflow("text_to_image"), **{"1.engine": request.param, "5.steps": 4})
    for part, (socket, class_type, _) in FAULTS.items():
        for node in graph.values():
            for name, value in node["inputs"].items():
                if value == ["1", socket]:
                    node["inputs"][name] = [part, 0]
        graph[part] = {"class_type": class_type, "inputs": {"part": ["1", socket], "call": 0, "times": 0, "run": 0}}
    return graph


def afresh(graph: graphs.Graph, run: int, fault: str | None = None) -> graphs.Graph:
    """The graph with nothing but its loader taken from the cache, and with one of its parts failing."""
    changes = {f"{part}.run": run for part in FAULTS}
    if fault is not None:
        changes |= {f"{fault}.{name}": value for name, value in FAULTS[fault][2].items()}
    return graphs.changed(graph, **changes)


def pixels(server: ComfyServer, result: Result) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(server.view(result.images[0]))).convert("RGB")).astype(int)


def held(server: ComfyServer, graph: graphs.Graph, run: int) -> dict[str, int]:
    """What the server holds while the graph's loader stays in its cache."""
    asking = {"1": graph["1"], "held": {"class_type": "HeldMemory", "inputs": {"run": run}}}
    # Something has to use the loader, or ComfyUI drops what it gave.
    asking["save"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    return server.run(asking).outputs["held"]["held"][0]


@pytest.mark.parametrize("fault", FAULTS)
def test_out_of_memory_ends_the_prompt_frees_what_it_held_and_the_next_prompt_draws(
    faulty_server: ComfyServer, graph: graphs.Graph, fault: str
) -> None:
    expected = pixels(faulty_server, faulty_server.run(afresh(graph, 1)))
    before = held(faulty_server, graph, 1)

    with pytest.raises(NodeFailed) as failed:
        faulty_server.run(afresh(graph, 2, fault))
    assert failed.value.node_type == FAILING_NODE[fault]
    assert failed.value.exception_type == "torch.OutOfMemoryError"
    assert "ran out of memory" in failed.value.exception_message
    after = held(faulty_server, graph, 2)
    assert before["models"] > 0 and after["models"] == 0
    assert after["tensors"] <= before["tensors"] + SLACK_BYTES
    assert after["resident"] <= before["resident"] + RESIDENT_SLACK_BYTES

    following = faulty_server.run(afresh(graph, 3))
    assert "1" in following.cached_nodes  # the very models that failed
    assert np.array_equal(pixels(faulty_server, following), expected)


def test_one_failure_of_the_decoder_is_answered_by_tiles_of_the_same_picture(
    faulty_server: ComfyServer, graph: graphs.Graph
) -> None:
    expected = pixels(faulty_server, faulty_server.run(afresh(graph, 1)))
    once = graphs.changed(afresh(graph, 2, "decode"), **{"decode.times": 1})
    tiled = pixels(faulty_server, faulty_server.run(once))
    assert np.abs(tiled - expected).max() <= 2
    assert "retrying with tiled VAE decoding" in faulty_server.log_text()
