"""The workflows of editing and rewriting draw what they ask for, in the real server."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from host import graphs
from host.graphs import Graph
from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import Result
from scoring.edits import Edit, score_edit
from scoring.requests import read_caption
from scoring.scenes import ATTRIBUTES, IMAGE_SIZE, Scene
from scoring.score import detect, nearest_colour, score_image

BEFORE = Scene("blue", "red", "square", "large", "centre")
Load = Callable[[str], Graph]


def picture(server: ComfyServer, result: Result) -> np.ndarray:
    """The one picture of a run, uint8 (height, width, 3)."""
    (reference,) = result.images
    return np.array(Image.open(io.BytesIO(server.view(reference))).convert("RGB"))


def showing(graph: Graph, image: list[object]) -> Graph:
    """The graph with another IMAGE in the place of the one that it saves."""
    copy = deepcopy(graph)
    (save,) = (node for node in copy.values() if node["class_type"] == "SaveImage")
    save["inputs"]["images"] = image
    return copy


@pytest.mark.parametrize(
    ("name", "edit", "steps"),
    [("edit", Edit(BEFORE, "colour", "yellow"), 20), ("edit_turbo", Edit(BEFORE, "shape", "star"), 8)],
)
def test_the_edit_changes_what_it_is_told_and_nothing_else(
    name: str, edit: Edit, steps: int, server: ComfyServer, api_workflow: Load
) -> None:
    graph = api_workflow(name)
    seen = asdict(detect(picture(server, server.run(showing(graph, ["4", 0])))))
    assert {key: seen[key] for key in ATTRIBUTES} == {key: asdict(BEFORE)[key] for key in ATTRIBUTES}
    result = server.run(graph)
    assert max(graphs.progress_steps(result)) == steps
    score = score_edit(picture(server, result), edit)
    assert all(score.values()), score


def test_a_masked_edit_leaves_the_other_half_alone(server: ComfyServer, api_workflow: Load) -> None:
    graph = api_workflow("edit_masked")
    before = picture(server, server.run(showing(graph, ["4", 0])))
    after = picture(server, server.run(graph))
    half = IMAGE_SIZE // 2
    np.testing.assert_array_equal(after[:, :half], before[:, :half])
    assert nearest_colour(np.median(after[:, -5:], axis=(0, 1))) == "green"
    unmasked = showing(graphs.changed(graph, **{"10.latent": ["5", 2]}), ["11", 0])
    assert nearest_colour(np.median(picture(server, server.run(unmasked))[:, :5], axis=(0, 1))) == "green"


def test_a_short_request_is_rewritten_shown_and_drawn(server: ComfyServer, api_workflow: Load) -> None:
    result = server.run(api_workflow("rewrite_then_draw"))
    (text,) = result.outputs["2"]["text"]
    asked = read_caption(text, "zh")
    assert asked is not None, text
    assert (asked.colour, asked.shape) == ("red", "circle")
    assert score_image(picture(server, result), asked)["all"], text
