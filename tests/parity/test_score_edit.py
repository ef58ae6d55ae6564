"""benchmarks/score_edit.py edits as the nodes do, and counts the forwards of the turbo demo."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from scoring.edits import ATTRIBUTES, held_out_tasks, score_edit


@pytest.fixture
def program(comfy_dir: Path, pack_dir: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark."""
    monkeypatch.syspath_prepend(pack_dir / "benchmarks")
    spec = importlib.util.spec_from_file_location("score_edit", pack_dir / "benchmarks" / "score_edit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("engine", ["core", "diffusers"])
def test_turbo_edits_in_exactly_eight_forwards(program: ModuleType, pack_dir: Path, engine: str) -> None:
    name = "LongCat-Tiny-Edit-Turbo"
    steps, guidance = program.CHECKPOINTS[name]
    assert (steps, guidance) == (8, 1.0)
    tasks = held_out_tasks(1, 1)
    scores, forwards = program.score(pack_dir / "demo" / name, engine, tasks, steps, guidance)
    assert forwards == 8
    assert all(all(score.values()) for score in scores), (tasks, scores)


def test_rates_are_told_by_language_and_by_what_was_asked(program: ModuleType) -> None:
    tasks = held_out_tasks(5, 5)
    right = [score_edit(task.wanted(), task.edit) for task in tasks]
    undone = [score_edit(task.picture(), task.edit) for task in tasks]
    rates = program.rates(tasks, right[:5] + undone[5:])
    assert {name: rate["asked"] for name, rate in rates.items()} == {
        "zh": 1.0, "en": 0.0, "both": 0.5, **dict.fromkeys(ATTRIBUTES, 0.5)
    }  # fmt: skip
    assert all(rate == 1.0 for name, rate in rates["en"].items() if name not in ("asked", "all"))
