"""LongCatPromptGrid in the real server draws what LongCatSampler draws, shows how far it is, and can be interrupted."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from host.bad_input import check_alive, failed, pixels, rejected
from host.graphs import Graph, changed
from host.training_graph import add_grid, saved
from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import Event, Interrupted

PROMPTS = ["a large red star in the centre on a blue background", "绿色背景上，中间有一个大的黄色心形"]
SMALL = {"size.width": 64, "size.height": 64, "steps": 2, "guidance": 4.0}


@pytest.fixture
def graph(api_workflow: Callable[[str], dict[str, Any]]) -> Graph:
    """The text-to-image graph, small, and a grid of two prompts and two seeds beside it."""
    size = {"4.size.width": 64, "4.size.height": 64, "5.steps": 2, "1.engine.precision": "fp32"}
    graph = changed(api_workflow("text_to_image"), **size)
    add_grid(graph, "grid", PROMPTS, ["1", 0], seeds="3, 4", **SMALL)
    graph["legend"] = {"class_type": "PreviewAny", "inputs": {"source": ["grid", 2]}}
    return graph


def test_every_picture_is_the_samplers(server: ComfyServer, graph: Graph) -> None:
    result = server.run(graph)
    pictures = saved(server, result, "grid-saved")
    assert len(pictures) == 4
    for index, picture in enumerate(pictures):
        one = changed(graph, **{"2.prompt": PROMPTS[index // 2], "5.seed": (3, 4)[index % 2]})
        for key in ("grid", "grid-saved", "legend"):
            del one[key]
        np.testing.assert_array_equal(picture, pixels(server, server.run(one)))
    assert result.outputs["legend"]["text"][0] == f"1: {PROMPTS[0]}\n2: {PROMPTS[1]}"
    (shown,) = (reference for reference in result.outputs["grid"]["images"])
    assert shown["type"] == "temp"


def test_progress_goes_over_all_pictures_and_the_grid_so_far_is_shown(server: ComfyServer, graph: Graph) -> None:
    result = server.run(changed(graph, **{"grid.seeds": "5"}))
    events = [event.data for event in result.events if event.type == "progress" and event.data["node"] == "grid"]
    assert {data["max"] for data in events} == {4} and max(data["value"] for data in events) == 4
    texts = [event.data["text"] for event in result.events if event.type == "progress_text"]
    assert texts[-1] == "2 / 2"
    assert sum(preview.node == "grid" for preview in result.previews) >= 2


def test_it_can_be_interrupted(server: ComfyServer, graph: Graph) -> None:
    def interrupt(event: Event) -> None:
        if event.type == "progress" and event.data["node"] == "grid":
            server.interrupt()

    with pytest.raises(Interrupted) as stopped:
        server.run(changed(graph, **{"grid.seeds": "6, 7, 8", "grid.steps": 20}), on_event=interrupt)
    assert stopped.value.node_type == "LongCatPromptGrid"
    check_alive(server)


def test_lists_that_cannot_be_read_are_refused_before_anything_runs(server: ComfyServer, graph: Graph) -> None:
    rejected(server, changed(graph, **{"grid.seeds": "one"}), "grid", ("seeds", "0, 1, 2"))
    rejected(server, changed(graph, **{"grid.seeds": "-1"}), "grid", ("seeds",))
    rejected(server, changed(graph, **{"grid.prompts": " \n "}), "grid", ("one prompt in each line",))
    rejected(server, changed(graph, **{"grid.size.width": 65}), "grid", ("multiple of 16",))


def test_too_many_pictures_are_refused(server: ComfyServer, graph: Graph) -> None:
    many = changed(graph, **{"grid.seeds": ",".join(map(str, range(201)))})
    failed(server, many, "grid", ("402 pictures", "400"))
