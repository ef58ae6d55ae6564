"""The edit lesson of the tests and of benchmarks/teach_zorb.py: to turn a shape into a zorb, from 16 demo pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from host import training_graph
from host.graphs import Graph
from host.training_graph import add_grid, saved
from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import Result
from scoring import edits, zorb, zorb_edits

CHECKPOINT = "LongCat-Tiny-Edit"
HELD_OUT = zorb_edits.held_out_tasks()
UNSEEN = HELD_OUT[:4]
# Of the 200 held-out instructions that the model knows, half of them Chinese, every so many are asked for.
OLD_EVERY = 17
DRAWING = {"steps": 10, "guidance": 1.0}  # which the demo model edits as well with as with more
RECIPE = {
    "steps": 500,
    "learning_rate": 2e-3,
    "rank": 16,
    "targets": "all",
    "schedule": "cosine",
    "weight_decay": 0.0,
    "flow_shift": "fixed",
    "flow_shift.shift": 3.0,
    "preservation_prompts": "\n".join(zorb_edits.preservation_prompts(96)),
    "preservation_weight": 2.0,
    "validate_every": 0,
    "validation_prompts": "make the shape a zorb\n把图形换成佐布",
    "validation_steps": 4,
    "validation_guidance": 2.5,
}


def asked(old_every: int = OLD_EVERY) -> dict[str, Sequence[Any]]:
    """What is edited, by group."""
    old = edits.held_out_tasks()[5 % old_every :: old_every]
    return {"zorbs": HELD_OUT, "unseen": UNSEEN, "old": old, "old-before": old}


def training(**settings: Any) -> Graph:
    """Train, by the recipe but for the settings of LongCatTrainLora that are given."""
    return training_graph.graph("zorb_edit", CHECKPOINT, "zorb_edit", **{**RECIPE, **settings})


def install(server: ComfyServer, old_every: int = OLD_EVERY) -> None:
    """Put the pictures that are to be edited into the server's input folder."""
    place = server.base_dir / "input"
    place.mkdir(parents=True, exist_ok=True)
    for group, tasks in asked(old_every).items():
        for number, task in enumerate(tasks):
            Image.fromarray(task.picture()).save(place / f"{group}-{number}.png")


def graph(old_every: int = OLD_EVERY, **settings: Any) -> Graph:
    """Train, then edit what :func:`install` put there, with the trained MODEL and with the one before."""
    made = training(**settings)
    for group, tasks in asked(old_every).items():
        model = ["1" if group in ("unseen", "old-before") else "3", 0]
        for number, task in enumerate(tasks):
            key = f"{group}-{number}"
            made[f"{key}-in"] = {"class_type": "LoadImage", "inputs": {"image": f"{key}.png"}}
            add_grid(made, key, [task.instruction], model, image=[f"{key}-in", 0], **DRAWING)
    return made


def rates(server: ComfyServer, result: Result, old_every: int = OLD_EVERY) -> dict[str, dict[str, float]]:
    """The shares of the pictures, 0..1, that show what was asked for: of each group, by attribute."""
    found = {}
    for group, tasks in asked(old_every).items():
        pictures = [saved(server, result, f"{group}-{number}-saved")[0] for number in range(len(tasks))]
        if group in ("zorbs", "unseen"):
            scores = [zorb.score_image(each, task.scene) for each, task in zip(pictures, tasks, strict=True)]
            found[group] = zorb.summarise(scores)
        else:
            scores = [edits.score_edit(each, task.edit) for each, task in zip(pictures, tasks, strict=True)]
            found[group] = edits.summarise_edits(scores)
    return found
