"""A folder that was saved from quantised weights draws the picture that they drew, on the device."""

from typing import Any

import pytest
from device import machine

from host.bad_input import pixels
from host.graphs import Graph, changed
from longcat_pack.longcat_backend import precision, quantisation
from longcat_pack.longcat_backend.comfy_bridge import devices


def names() -> list[str]:
    """The presets of other libraries that this device can run."""
    policy = devices.policy(machine.device())
    known = (preset for preset in precision.PRESETS.values() if preset.backend in quantisation.BACKENDS)
    return [preset.name for preset in known if policy.supports(preset)]


@pytest.mark.parametrize("name", names())
def test_a_saved_folder_draws_the_same_picture(server_with: Any, graph: Graph, name: str) -> None:
    server, settings = server_with(), {"1.engine": "auto", "1.engine.precision": name, "5.steps": 4}
    quantised = changed(graph, **settings, **{"1.text_encoder_precision": "int8-quanto"})
    expected = pixels(server, server.run(quantised))
    inputs = {"name": f"saved-{name}", "layout": "folder", "precision": "keep", "overwrite": True}
    sockets = {socket: ["1", place] for place, socket in enumerate(("model", "clip", "vae"))}
    save = {"class_type": "LongCatSaveCheckpoint", "inputs": {**sockets, **inputs}}
    server.run({"1": quantised["1"], "2": save})
    chosen = {"1.checkpoint": f"saved-{name}", "1.engine.precision": "auto", "1.text_encoder_precision": "auto"}
    again = pixels(server, server.run(changed(quantised, **chosen)))
    assert (again == expected).all()
