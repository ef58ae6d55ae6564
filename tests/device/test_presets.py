"""Every precision draws the right pictures on the device, on the engine and in the text encoder."""

import io
from typing import Any

import numpy as np
import pytest
from device import machine
from PIL import Image

from host.graphs import Graph, changed
from longcat_pack.longcat_backend import precision
from longcat_pack.longcat_backend.comfy_bridge import devices
from longcat_pack.tools.host import ComfyServer
from scoring.scenes import held_out_prompts
from scoring.score import score_image

PROMPTS = held_out_prompts()[::20]
# Of the ten pictures, by the bits of a weight: how many have to be right in everything.
RIGHT = {32: 9, 16: 9, 8: 8, 4: 6}


def cases() -> list[tuple[str, str, str]]:
    """Engine, precision and the text encoder's, of all that this device can run."""
    policy = devices.policy(machine.device())
    engines = [(engine, name, "bf16") for engine, names in precision.ENGINE_PRESETS.items() for name in names]
    encoders = [("core", "bf16", name) for name in precision.ENCODER_PRESETS if name != "bf16"]
    return [case for case in engines + encoders if all(policy.supports(precision.PRESETS[name]) for name in case[1:])]


def right(server: ComfyServer, graph: Graph) -> int:
    """How many of the prompts' pictures are right in everything."""
    count = 0
    for seed, (prompt, scene) in enumerate(PROMPTS):
        result = server.run(changed(graph, **{"2.prompt": prompt, "5.seed": seed}))
        picture = np.array(Image.open(io.BytesIO(server.view(result.images[0]))).convert("RGB"))
        count += score_image(picture, scene)["all"]
    return count


@pytest.mark.parametrize(("engine", "name", "encoder"), cases())
def test_every_precision_draws_what_was_asked(
    server_with: Any, graph: Graph, engine: str, name: str, encoder: str
) -> None:
    settings = {"1.engine": engine, "1.engine.precision": name, "1.text_encoder_precision": encoder, "5.steps": 20}
    fewest = min(RIGHT[precision.PRESETS[preset].bits] for preset in (name, encoder))
    assert right(server_with(), changed(graph, **settings)) >= fewest
