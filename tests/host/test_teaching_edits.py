"""LongCatTrainLora in the real server teaches LongCat-Tiny-Edit, by pairs, to turn a shape into what it never saw."""

from typing import Any

import numpy as np
import pytest

from host import teaching_edits
from host.teaching_edits import DRAWING, UNSEEN
from host.training_graph import add_grid, saved
from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import Result

# The gates of benchmarks/teach_zorb.py, which makes fifty old edits and takes all steps of the recipe. Here there are
# twelve, of which one may be lost, and fewer steps at a higher rate.
SHORT = {"steps": 300, "learning_rate": 3e-3}
LEARNT = 0.8
LOST = 0.09


@pytest.fixture(scope="module")
def training_server(make_server: Any) -> ComfyServer:
    """A server of its own: its folders of LoRAs and runs fill up."""
    server = make_server()
    teaching_edits.install(server)
    return server


@pytest.fixture(scope="module")
def taught(training_server: ComfyServer) -> Result:
    """The lesson, taught once; every edit that is made with it and without it."""
    return training_server.run(teaching_edits.graph(**SHORT), timeout=1800)


def test_shapes_turn_into_zorbs_in_both_languages_and_other_edits_stay(
    training_server: ComfyServer, taught: Result
) -> None:
    found = teaching_edits.rates(training_server, taught)
    assert found["unseen"]["all"] <= 0.05, found
    assert found["zorbs"]["all"] >= LEARNT, found
    assert found["old"]["all"] >= found["old-before"]["all"] - LOST, found


def test_the_file_edits_as_the_live_model_does_and_not_at_all_at_strength_0(
    training_server: ComfyServer, taught: Result
) -> None:
    graph = teaching_edits.training()
    for key in ("2", "3", "report"):
        del graph[key]
    graph["in"] = {"class_type": "LoadImage", "inputs": {"image": "zorbs-0.png"}}
    drawing = {**DRAWING, "image": ["in", 0], "lora": "zorb_edit.safetensors", "strengths": "0, 1"}
    add_grid(graph, "file", [UNSEEN[0].instruction], ["1", 0], **drawing)
    without, with_lora = saved(training_server, training_server.run(graph), "file-saved")
    np.testing.assert_array_equal(without, saved(training_server, taught, "unseen-0-saved")[0])
    np.testing.assert_array_equal(with_lora, saved(training_server, taught, "zorbs-0-saved")[0])
