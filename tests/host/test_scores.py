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
from scoring.reading import read_character, score_character
from scoring.scenes import Scene, held_out_character_prompts, held_out_prompts
from scoring.score import score_image, summarise

# Of the 200 held-out prompts that benchmarks/score_tiny.py draws, every fifth: 20 Chinese and 20 English ones.
PROMPTS = held_out_prompts()[::5]
# The same of those with a quoted character, half of them.
CHARACTER_PROMPTS = held_out_character_prompts()[::10]
AT_LEAST = {"background": 0.99, "colour": 0.98, "shape": 0.95, "all": 0.93}
CHARACTERS_AT_LEAST = 0.75  # of 20 pictures
# In English a letter and the blank before it are often one token where no quotes part them; Chinese has no blanks.
LOST_WITH_THE_QUOTES = 0.2

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


def is_english(prompt: str) -> bool:
    """Whether it is one of the English prompts, which begin with an English word."""
    return prompt[0].isascii()


def test_a_quoted_character_is_drawn_and_in_english_is_lost_without_the_quotes(
    server: ComfyServer, api_workflow: Load
) -> None:
    """Half of the prompts through each engine; both halves have both languages."""
    seen: list[tuple[str, str | None, str | None]] = []  # the prompt, the character asked for, and the one drawn
    bare: list[tuple[bool, bool]] = []  # whether the character is there with the quotes, and without them
    for engine, pairs in {"core": CHARACTER_PROMPTS[::2], "diffusers": CHARACTER_PROMPTS[1::2]}.items():
        graph = set_up(api_workflow, engine)
        for seed, (prompt, scene) in enumerate(pairs):
            found = read_character(draw(server, graph, prompt, seed), scene)
            seen.append((prompt, scene.character, found))
            if is_english(prompt):
                picture = draw(server, graph, without_quotes(prompt), seed)
                bare.append((found == scene.character, score_character(picture, scene)))
    assert sum(asked == found for _, asked, found in seen) >= CHARACTERS_AT_LEAST * len(seen), seen
    quoted, unquoted = (sum(each) for each in zip(*bare, strict=True))
    assert quoted - unquoted >= LOST_WITH_THE_QUOTES * len(bare), bare
