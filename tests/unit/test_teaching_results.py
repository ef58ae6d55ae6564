"""What the READMEs say of the lessons is what benchmarks/teach_zorb.py measured."""

import json
from pathlib import Path

import pytest

CHECKPOINTS = {"": "LongCat-Tiny", "edit-": "LongCat-Tiny-Edit"}
WORDS = {"README.md": (", ", " s, {} thread{}"), "README.zh.md": ("，", " 秒，{} 线程")}


@pytest.mark.parametrize("page", WORDS)
def test_the_readmes_figures_of_the_lessons_are_measured_ones(page: str, pack_dir: Path) -> None:
    results = json.loads((pack_dir / "benchmarks" / "results" / "teach_zorb.json").read_text(encoding="utf-8"))
    assert results["failed_gates"] == []
    assert set(results["lessons"]) == {f"{kind}{base}" for kind in CHECKPOINTS for base in ("fp32", "int8-quanto")}
    text = (pack_dir / page).read_text(encoding="utf-8")
    comma, took = WORDS[page]
    for name, lesson in results["lessons"].items():
        base = name.removeprefix("edit-")
        rates = {group: round(100 * found["all"]) for group, found in lesson["rates"].items()}
        threads = lesson["machine"]["threads"]
        row = [
            f"{CHECKPOINTS[name.removesuffix(base)]}{comma}{base}",
            f"{rates['unseen']} → {rates['zorbs']} %",
            f"{rates['old-before']} → {rates['old']} %",
            f"{lesson['seconds']['training']['clock']:.0f}{took.format(threads, 's' * (threads > 1))}",
        ]
        assert f"| {' | '.join(row)} |" in text, row
