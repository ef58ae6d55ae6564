"""The estimate of memory against what was measured at full size, and what it says to turn down."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from longcat_pack.longcat_backend.memory import GIB
from longcat_pack.longcat_backend.training import estimate
from longcat_pack.longcat_backend.training.settings import TrainSettings
from longcat_pack.longcat_backend.transformer import empty_transformer

CONFIG: dict[str, Any] = {
    "num_layers": 10,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "axes_dims_rope": [16, 56, 56],
}
SETTINGS = TrainSettings(targets="attention", checkpointing="block")
SIZE = (1024, 1024)


@pytest.fixture(scope="module")
def shapes() -> dict[str, Any]:
    return {key: value.shape for key, value in empty_transformer(CONFIG).state_dict().items()}


def test_the_estimate_is_what_was_measured(shapes: dict[str, Any], pack_dir: Path) -> None:
    """Every row of the benchmark of the pack's own trainer that keeps its weights on the device."""
    measured = json.loads((pack_dir / "benchmarks" / "results" / "training.json").read_text(encoding="utf-8"))
    rows = [
        row for row in measured["rows"] if row["loop"] == "ours" and row["offload"] == "none" and "failed" not in row
    ]
    assert len(rows) >= 10
    for row in rows:
        options = {name: row[name] for name in ("checkpointing", "base_precision", "modulation_table")}
        found = estimate.estimate(CONFIG, shapes, dataclasses.replace(SETTINGS, **options), (row["size"], row["size"]))
        assert found.total / GIB == pytest.approx(row["allocated_gib"], rel=0.05), row


def test_what_needs_more_is_estimated_higher(shapes: dict[str, Any]) -> None:
    def total(size: tuple[int, int] = SIZE, **options: Any) -> int:
        return estimate.estimate(CONFIG, shapes, dataclasses.replace(SETTINGS, **options), size).total

    assert total() < total(modulation_table=False) < total(modulation_table=False, batch=2)
    assert total(offload="block") < total(offload="block", modulation_table=False)
    assert total() < total(checkpointing="every-second") < total(checkpointing="none")
    assert total() < total(batch=2) and total((512, 512)) < total()
    assert total(optimiser="lion") < total() < total(optimiser="prodigy")
    assert total(offload="block") < total(base_precision="int4-quanto") < total(base_precision="int8-quanto") < total()
    assert total() < total(rank=64) < total(rank=64, targets="all")


def test_a_run_that_fits_needs_no_advice(shapes: dict[str, Any]) -> None:
    assert estimate.fitting(CONFIG, shapes, SETTINGS, SIZE, 16 * GIB) == ""


@pytest.mark.parametrize(
    ("free", "told"),
    [
        (23, "modulation_table on"),
        (16, "modulation_table on, checkpointing 'block'"),
        (8, "modulation_table on, checkpointing 'block', batch 1, accumulation 2, base precision 'int8-quanto'"),
        (2, "no setting makes that fit"),
    ],
)
def test_advice_names_the_cheapest_change_that_fits(free: int, told: str, shapes: dict[str, Any]) -> None:
    settings = dataclasses.replace(SETTINGS, checkpointing="none", batch=2, modulation_table=False)
    assert told in estimate.fitting(CONFIG, shapes, settings, SIZE, free * GIB)


ROW = re.compile(
    r"^\| (bf16|int8-quanto|diffusers \+ peft), (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.M
)


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readmes_figures_of_training_are_measured_ones(name: str, pack_dir: Path) -> None:
    measured = json.loads((pack_dir / "benchmarks" / "results" / "training.json").read_text(encoding="utf-8"))["rows"]
    rows = ROW.findall((pack_dir / name).read_text(encoding="utf-8"))
    assert len(rows) == 9
    for base, words, *figures in rows:
        parts = words.removeprefix("checkpointing ").split(", ")
        wanted = {
            "loop": "plain" if base.startswith("diffusers") else "ours",
            "base_precision": "int8-quanto" if base == "int8-quanto" else "bf16",
            "checkpointing": parts[0],
            "compile": "compile" in parts,
            "offload": "block" if "offload block" in parts else "none",
        }
        found = [row for row in measured if wanted.items() <= row.items()]
        told = [
            f"{row['s_per_step']:.3f} {row['allocated_gib']:.1f}" for row in sorted(found, key=lambda row: -row["size"])
        ]
        assert told == [" ".join(figures[:2]), " ".join(figures[2:])], words
