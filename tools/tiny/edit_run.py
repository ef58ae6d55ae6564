"""The `edit` and `turbo` commands: train from a LongCat-Tiny folder, write an edit folder, score it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tests.scoring.edits import EditTask, held_out_tasks, score_edit, summarise_edits
from tools.tiny.check import write_sheet
from tools.tiny.edit_checkpoint import export_edit, load_edit_pipeline
from tools.tiny.edit_flow import EDIT, TURBO, EditPhase, EditRecipe, EditTrainer, prepare_edit_examples
from tools.tiny.edit_sampling import sample_edits
from tools.tiny.sampling import TOKEN_SIDE, decode, shift_mu

JITTERS = 12
BATCH = 100  # pictures that are edited at once
TINY, TINY_EDIT, TINY_TURBO = (
    Path("demo") / name for name in ("LongCat-Tiny", "LongCat-Tiny-Edit", "LongCat-Tiny-Edit-Turbo")
)
COMMANDS = {"edit": (EDIT, TINY, TINY_EDIT), "turbo": (TURBO, TINY_EDIT, TINY_TURBO)}
SETTINGS = {"edit": (20, 4.5), "turbo": (8, 1.0)}  # steps and guidance that each is scored with


def make_trainer(
    start: Path, recipe: EditRecipe, jitters: int, edit_limit: int | None, seed: int, compile: bool
) -> EditTrainer:
    """A trainer of the folder's networks, on the GPU where there is one."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails at these shapes
    pipeline = load_edit_pipeline(start).to("cuda" if torch.cuda.is_available() else "cpu")
    return EditTrainer(pipeline, prepare_edit_examples(pipeline, jitters, edit_limit), recipe, seed, compile)


def train_and_export(
    trainer: EditTrainer, start: Path, folder: Path, log: Callable[[str], None], log_every: int = 500
) -> None:
    """Train by the trainer's recipe, and write the averaged weights into `folder` beside the files of `start`."""
    log(str(trainer.recipe))
    pipeline, turbo = trainer.pipeline, trainer.recipe.turbo
    mu = pipeline.scheduler.config.max_shift if turbo else shift_mu(pipeline, TOKEN_SIDE**2)
    trainer.train_phases(log, log_every, mu)
    export_edit(start, folder, dict(zip(trainer.named, trainer.average, strict=True)), turbo)


def score_folder(
    folder: Path,
    tasks: Sequence[EditTask],
    pictures: Sequence[np.ndarray],
    steps: int,
    guidance: float,
    sheet: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Rates of a folder on tasks and their pictures: zh, en, both, and both by the attribute asked for.

    With `sheet`, writes pictures as one PNG: rows of befores, and under each its after.
    """
    pipeline = load_edit_pipeline(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    drawn = []
    for first in range(0, len(tasks), BATCH):
        part = slice(first, first + BATCH)
        texts = [task.instruction for task in tasks[part]]
        drawn.append(
            decode(
                pipeline,
                sample_edits(pipeline, pictures[part], texts, steps=steps, guidance=guidance, first_seed=first),
            )
        )
    after = np.concatenate(drawn)
    scores = [score_edit(picture, task.edit) for picture, task in zip(after, tasks, strict=True)]
    groups: dict[str, list[dict[str, bool]]] = {}
    for task, score in zip(tasks, scores, strict=True):
        language = "en" if task.instruction.isascii() else "zh"
        for name in (language, "both", f"asked: {task.edit.attribute}"):
            groups.setdefault(name, []).append(score)
    if sheet:
        write_pairs(np.stack(pictures), after, sheet)
    return {name: summarise_edits(group) for name, group in groups.items()}


def write_pairs(before: np.ndarray, after: np.ndarray, path: Path) -> None:
    """Write pictures (N, 128, 128, 3) uint8 as one PNG: twenty befores in a row, their afters in the next."""
    columns = min(20, len(before))
    rows = [part for i in range(0, len(before), columns) for part in (before[i : i + columns], after[i : i + columns])]
    write_sheet(np.concatenate(rows), path)


def print_rates(title: str, rates: dict[str, dict[str, float]], log: Callable[[str], None]) -> None:
    """One line a group."""
    log(title)
    for name, values in rates.items():
        log(f"  {name:18}" + " ".join(f"{attribute} {value:.3f}" for attribute, value in values.items()))


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `edit` and `turbo` to a command line."""
    for name, (recipe, start, folder) in COMMANDS.items():
        parser = commands.add_parser(name)
        parser.add_argument("--start", type=Path, default=start, help="folder whose networks are trained on")
        parser.add_argument("--folder", type=Path, default=folder, help="folder that is written")
        parser.add_argument(
            "--phase", nargs="*", type=EditPhase.parse, default=recipe.phases, help=EditPhase.parse.__doc__
        )
        parser.add_argument("--jitters", type=int, default=JITTERS)
        parser.add_argument("--edit-limit", type=int, default=None, help="fewer edits, to try the program out")
        parser.add_argument("--per-language", type=int, default=100, help="held-out instructions to score; 0 for none")
        parser.add_argument("--log-every", type=int, default=500)
        parser.add_argument("--pictures", type=Path, default=None, help="write the scored pictures as one PNG")
        parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
        parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Train, export and score what the command line asks for."""
    began = time.monotonic()

    def log(line: str) -> None:
        print(f"{time.monotonic() - began:4.0f} s: {line}", flush=True)

    recipe = replace(COMMANDS[args.command][0], phases=tuple(args.phase))
    trainer = make_trainer(args.start, recipe, args.jitters, args.edit_limit, args.seed, args.compile)
    train_and_export(trainer, args.start, args.folder, log, args.log_every)
    if args.per_language:
        steps, guidance = SETTINGS[args.command]
        tasks = held_out_tasks(args.per_language, args.per_language)
        pictures = [task.picture() for task in tasks]
        rates = score_folder(args.folder, tasks, pictures, steps, guidance, args.pictures)
        print_rates(f"{args.folder.name}, {steps} steps, guidance {guidance}", rates, log)
