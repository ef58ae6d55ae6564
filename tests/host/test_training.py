"""LongCatTrainLora in the real server: it goes on where it stopped, and says what is wrong."""

import json
from typing import Any

import numpy as np
import pytest

from host import training_graph
from host.bad_input import check_alive, failed, rejected
from host.graphs import Graph, changed
from host.training_graph import add_grid, assert_equal, lora_file, places_of, run_folder, saved, tensors
from longcat_pack.longcat_backend import loss_chart
from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import Event, Interrupted


@pytest.fixture(scope="module")
def training_server(make_server: Any) -> ComfyServer:
    """A server of its own: its folders of LoRAs and runs fill up."""
    return make_server()


def stopped_at(server: ComfyServer, graph: Graph, step: int) -> Interrupted:
    """Interrupt a training through the server once it has done so many steps."""

    steps = graph["3"]["inputs"]["steps"]

    def interrupt(event: Event) -> None:
        data = event.data
        if event.type == "progress" and data["node"] == "3" and data["max"] == steps and data["value"] >= step:
            server.interrupt()

    with pytest.raises(Interrupted) as stopped:
        server.run(graph, on_event=interrupt)
    assert stopped.value.node_type == "LongCatTrainLora"
    return stopped.value


def test_an_interrupted_run_goes_on_bit_for_bit(training_server: ComfyServer) -> None:
    training_server.run(training_graph.graph("straight", steps=40))
    halves = training_graph.graph("styles/halves", steps=40)
    stopped = stopped_at(training_server, halves, 20)
    said = [event.data["text"] for event in stopped.events if event.type == "progress_text"][-1]
    assert "stopped after step" in said and "queue again" in said
    assert lora_file(training_server, "styles/halves").is_file()
    (state,) = run_folder(training_server, "styles/halves").glob("state-*")
    done = int(state.name[-8:])
    assert 20 <= done < 40

    again = training_server.run(halves)
    (report,) = again.outputs["report"]["text"]
    assert f"went on after step {done}" in report
    assert "models/loras/styles/halves.safetensors" in report and "longcat_training/runs/styles/halves" in report
    assert_equal(tensors(training_server, "styles/halves", 40), tensors(training_server, "straight", 40))


def test_loss_and_grid_show_the_run(training_server: ComfyServer) -> None:
    """The losses of its steps, and each prompt as the MODEL draws it before and after."""
    prompts = ["a zorb on a red background", "红色背景上的佐布"]
    drawing = {"validation_prompts": "\n".join(prompts), "validation_steps": 2, "validation_guidance": 2.0}
    graph = training_graph.graph("shown", steps=5, learning_rate=1e-2, **drawing)
    for key, output in (("loss", 3), ("sheet", 4)):
        inputs = {"images": ["3", output], "filename_prefix": key}
        graph[key] = {"class_type": "SaveImage", "inputs": inputs}
    for key, node in (("before", "1"), ("after", "3")):
        add_grid(graph, key, prompts, [node, 0], steps=2)
    result = training_server.run(graph)
    (loss,) = saved(training_server, result, "loss")
    state = json.loads((run_folder(training_server, "shown") / "state-00000005" / "state.json").read_text("utf-8"))
    losses = [(step, value) for step, value in state["values"]["losses"]]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(loss, np.asarray(loss_chart.draw(losses, [], 5)))
    (sheet,) = saved(training_server, result, "sheet")
    before, after = (saved(training_server, result, f"{key}-saved") for key in ("before", "after"))
    found = [places_of(sheet, picture) for pair in zip(before, after, strict=True) for picture in pair]
    assert [len(places) for places in found] == [1, 1, 1, 1]
    corners = np.array(found).reshape(2, 2, 2)  # prompts, without and with, y and x
    assert (corners[:, 0, 0] == corners[:, 1, 0]).all() and (corners[:, 0, 1] + 128 < corners[:, 1, 1]).all()
    assert corners[0, 0, 0] + 128 < corners[1, 0, 0]


def test_other_settings_under_the_same_name_are_refused_by_name(training_server: ComfyServer) -> None:
    graph = training_graph.graph("mine")
    training_server.run(graph)
    other = changed(graph, **{"3.rank": 8, "3.seed": 1})
    failed(training_server, other, "3", ("rank: 4 -> 8", "seed: 0 -> 1"))
    more = training_server.run(changed(graph, **{"3.steps": 4}))
    assert more.outputs["report"]["text"][0].startswith("went on after step 3")
    config = run_folder(training_server, "mine") / "config.json"
    written = config.read_bytes()
    failed(training_server, graph, "3", ("has done 4 steps already, and 3 are asked for",))
    assert config.read_bytes() == written
    over = training_server.run(changed(other, **{"3.if_begun": "start over"}))
    assert over.outputs["report"]["text"][0].startswith("from the first step")


def test_a_lora_that_is_not_of_the_run_is_never_replaced(training_server: ComfyServer) -> None:
    file = lora_file(training_server, "somebody-elses")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"precious")
    failed(training_server, training_graph.graph("somebody-elses"), "3", ("already", "another name"))
    assert file.read_bytes() == b"precious"


def test_a_name_that_leads_out_is_refused_before_anything_runs(training_server: ComfyServer) -> None:
    rejected(training_server, training_graph.graph("../outside"), "3", ("cannot be used",))


def test_a_choice_that_there_is_not_is_refused(training_server: ComfyServer) -> None:
    for name, known in (("flow_shift", "batch"), ("offload", "group offload")):
        graph = changed(training_graph.graph("unknown"), **{f"3.{name}": "mine"})
        failed(training_server, graph, "3", (name, "mine", known))


def test_the_server_is_fine_after_a_run_that_failed(training_server: ComfyServer) -> None:
    """A dataset for editing does not suit a checkpoint that draws; and the next prompt draws."""
    graph = training_graph.graph("wrong-task")
    graph["pictures"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 128, "height": 128, "batch_size": 2, "color": 255},
    }
    source = {"source": "images", "source.images": ["pictures", 0], "source.captions": "make it red"}
    settings = {key: value for key, value in graph["2"]["inputs"].items() if not key.startswith("source")}
    graph["2"]["inputs"] = {**source, "source.references": ["pictures", 0], **settings}
    failed(training_server, graph, "3", ("LongCat-Image-Edit", "reference"))
    check_alive(training_server)
