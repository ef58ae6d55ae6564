"""The demo checkpoint follows prompts in both languages, through both engines, in the real server."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from host import graphs
from host.graphs import Graph
from longcat_pack.tools.host import ComfyServer
from scoring.characters import without_quotes
from scoring.reading import read_character
from scoring.scenes import Scene, held_out_character_prompts, held_out_prompts
from scoring.score import score_image, summarise

# Of the 200 held-out prompts that benchmarks/score_tiny.py draws, every fifth: 20 Chinese and 20 English ones.
PROMPTS = held_out_prompts()[::5]
# The same of those with a quoted character, half of them.
CHARACTER_PROMPTS = held_out_character_prompts()[::10]
AT_LEAST = {"background": 0.99, "colour": 0.98, "shape": 0.95, "all": 0.93}
CHARACTERS_AT_LEAST = 0.85
QUOTES_MATTER = 0.3  # the share of characters that get lost with their quotes, at least

Load = Callable[[str], Graph]


def set_up(api_workflow: Load, engine: str) -> Graph:
    """The text-to-image graph as the demo checkpoint is scored: fp32, 20 steps, guidance 4."""
    settings = {"1.engine": engine, "1.engine.precision": "fp32", "5.steps": 20, "5.guidance": 4.0}
    return graphs.changed(api_workflow("text_to_image"), **settings)


def draw(server: ComfyServer, graph: Graph, prompt: str, seed: int) -> np.ndarray:
    result = server.run(graphs.changed(graph, **{"2.prompt": prompt, "5.seed": seed}))
    return np.array(Image.open(io.BytesIO(server.view(result.images[0]))).convert("RGB"))


@pytest.mark.parametrize("engine", ["core", "diffusers"])
def test_held_out_prompts_are_drawn_as_asked(server: ComfyServer, api_workflow: Load, engine: str) -> None:
    graph = set_up(api_workflow, engine)
    wrong: list[tuple[str, Scene, dict[str, bool]]] = []
    scores = []
    for seed, (prompt, scene) in enumerate(PROMPTS):
        score = score_image(draw(server, graph, prompt, seed), scene)
        scores.append(score)
        if not all(score.values()):
            wrong.append((prompt, scene, score))
    rates = summarise(scores)
    assert all(rates[name] >= least for name, least in AT_LEAST.items()), (rates, wrong)


def test_a_quoted_character_is_drawn_and_without_quotes_less_often(server: ComfyServer, api_workflow: Load) -> None:
    """Half of the prompts through each engine; both halves have both languages."""
    seen: list[tuple[str | None, ...]] = []  # the character asked for, the one drawn, and the one drawn without quotes
    for engine, pairs in {"core": CHARACTER_PROMPTS[::2], "diffusers": CHARACTER_PROMPTS[1::2]}.items():
        graph = set_up(api_workflow, engine)
        for seed, (prompt, scene) in enumerate(pairs):
            drawn = (draw(server, graph, text, seed) for text in (prompt, without_quotes(prompt)))
            seen.append((scene.character, *(read_character(picture, scene) for picture in drawn)))
    quoted = sum(asked == found for asked, found, _ in seen) / len(seen)
    unquoted = sum(asked == found for asked, _, found in seen) / len(seen)
    assert quoted >= CHARACTERS_AT_LEAST, seen
    assert quoted - unquoted >= QUOTES_MATTER, seen
