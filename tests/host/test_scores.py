"""The demo checkpoint follows prompts in both languages, through both engines, in the real server."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from host import graphs
from longcat_pack.tools.host import ComfyServer
from scoring.scenes import Scene, held_out_prompts
from scoring.score import score_image, summarise

# Of the 200 held-out prompts that benchmarks/score_tiny.py draws, every fifth: 20 Chinese and 20 English ones.
PROMPTS = held_out_prompts()[::5]
AT_LEAST = {"background": 0.99, "colour": 0.98, "shape": 0.95, "all": 0.93}


def draw(server: ComfyServer, graph: dict[str, Any], prompt: str, seed: int) -> np.ndarray:
    result = server.run(graphs.changed(graph, **{"2.prompt": prompt, "5.seed": seed}))
    return np.array(Image.open(io.BytesIO(server.view(result.images[0]))).convert("RGB"))


@pytest.mark.parametrize("engine", ["core", "diffusers"])
def test_held_out_prompts_are_drawn_as_asked(
    server: ComfyServer, api_workflow: Callable[[str], dict[str, Any]], engine: str
) -> None:
    settings = {"1.engine": engine, "1.engine.precision": "fp32", "5.steps": 20, "5.guidance": 4.0}
    graph = graphs.changed(api_workflow("text_to_image"), **settings)
    wrong: list[tuple[str, Scene, dict[str, bool]]] = []
    scores = []
    for seed, (prompt, scene) in enumerate(PROMPTS):
        score = score_image(draw(server, graph, prompt, seed), scene)
        scores.append(score)
        if not all(score.values()):
            wrong.append((prompt, scene, score))
    rates = summarise(scores)
    assert all(rates[name] >= least for name, least in AT_LEAST.items()), (rates, wrong)
