"""The lesson of the tests and of benchmarks/teach_zorb.py: the zorb, from the 16 pictures of the demo dataset."""

from __future__ import annotations

from typing import Any

from host import training_graph
from host.graphs import Graph
from host.training_graph import add_grid, saved
from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import Result
from scoring import scenes, score, zorb

HELD_OUT = zorb.held_out_prompts()
UNSEEN = HELD_OUT[:4]
# Of the demo model's own 200 held-out prompts, half of them Chinese, every so many are asked for.
OLD_EVERY = 17
RECIPE = {
    "steps": 500,
    "learning_rate": 4e-3,
    "rank": 16,
    "targets": "all",
    "schedule": "cosine",
    "weight_decay": 0.0,
    "flow_shift": "fixed",
    "flow_shift.shift": 3.0,
    "preservation_prompts": "\n".join(zorb.preservation_prompts(64)),
    "validate_every": 250,
    "validation_steps": 4,
    "validation_guidance": 2.0,
    "validation_prompts": "a large yellow zorb on the left on a red background\n绿色背景上，右边有一个黄色的大佐布",
}


def asked(old_every: int = OLD_EVERY) -> dict[str, tuple[list[Any], Any]]:
    """What is drawn, by grid: prompts with their scenes, and who judges them."""
    old = scenes.held_out_prompts()[5 % old_every :: old_every]
    return {"zorbs": (HELD_OUT, zorb), "unseen": (UNSEEN, zorb), "old": (old, score), "old-before": (old, score)}


def training(**settings: Any) -> Graph:
    """Train, by the recipe but for the settings of LongCatTrainLora that are given."""
    return training_graph.graph("zorb", **{**RECIPE, **settings})


def graph(old_every: int = OLD_EVERY, **settings: Any) -> Graph:
    """Train, then draw what was learnt and what was known, with the trained MODEL and with the one before."""
    made = training(**settings)
    for key, (prompts, _) in asked(old_every).items():
        add_grid(made, key, [prompt for prompt, _ in prompts], ["1" if key in ("unseen", "old-before") else "3", 0])
    return made


def rates(server: ComfyServer, result: Result, old_every: int = OLD_EVERY) -> dict[str, dict[str, float]]:
    """The shares of the pictures, 0..1, that show what was asked for: of each grid, by attribute."""
    found = {}
    for key, (prompts, judge) in asked(old_every).items():
        pictures = zip(saved(server, result, f"{key}-saved"), prompts, strict=True)
        found[key] = judge.summarise([judge.score_image(picture, scene) for picture, (_, scene) in pictures])
    return found
