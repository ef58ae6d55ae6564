"""The estimate of memory against what was measured at full size, and what it says to turn down."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from longcat_pack.longcat_backend import official
from longcat_pack.longcat_backend.memory import GIB
from longcat_pack.longcat_backend.modulation import is_modulation
from longcat_pack.longcat_backend.training import estimate
from longcat_pack.longcat_backend.training.settings import TrainSettings
from longcat_pack.longcat_backend.transformer import empty_transformer

CONFIG = official.TRANSFORMER
SETTINGS = TrainSettings(targets="attention", checkpointing="block")
SIZE = (1024, 1024)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def shapes() -> dict[str, Any]:
    return {key: value.shape for key, value in empty_transformer(CONFIG).state_dict().items()}


def rows_of(pack_dir: Path, result: str) -> list[dict[str, Any]]:
    """The rows that were measured, of a result file."""
    text = (pack_dir / "benchmarks" / "results" / result).read_text(encoding="utf-8")
    return [row for row in json.loads(text)["rows"] if "failed" not in row]


def test_the_estimate_is_what_was_measured(shapes: dict[str, Any], pack_dir: Path) -> None:
    """Every row of the benchmark of the pack's own trainer that keeps its weights on the device."""
    measured = rows_of(pack_dir, "training.json") + rows_of(pack_dir, "training_table.json")
    rows = [row for row in measured if row["loop"] == "ours" and row["offload"] == "none"]
    assert len(rows) >= 10
    for row in rows:
        options = {name: row[name] for name in ("checkpointing", "base_precision", "modulation_table")}
        settings, size = dataclasses.replace(SETTINGS, **options), (row["size"], row["size"])
        found = estimate.estimate(CONFIG, shapes, settings, size, CUDA)
        assert found.total / GIB == pytest.approx(row["allocated_gib"], rel=0.05), row


def test_what_needs_more_is_estimated_higher(shapes: dict[str, Any]) -> None:
    def total(size: tuple[int, int] = SIZE, **options: Any) -> int:
        return estimate.estimate(CONFIG, shapes, dataclasses.replace(SETTINGS, **options), size, CUDA).total

    assert total() < total(modulation_table=False) < total(modulation_table=False, batch=2)
    assert total(offload="block") < total(offload="block", modulation_table=False)
    assert total() < total(checkpointing="every-second") < total(checkpointing="none")
    assert total() < total(batch=2) and total((512, 512)) < total()
    assert total(optimiser="lion") < total() < total(optimiser="prodigy")
    assert total(offload="block") < total(base_precision="int4-quanto") < total(base_precision="int8-quanto") < total()
    assert total() < total(rank=64) < total(rank=64, targets="all")


def test_a_run_that_fits_needs_no_advice(shapes: dict[str, Any]) -> None:
    assert estimate.fitting(CONFIG, shapes, SETTINGS, SIZE, CUDA, 16 * GIB) == ""


CHEAP = "modulation_table on, checkpointing 'block'"
LESS = f"{CHEAP}, batch 1, accumulation 2"


@pytest.mark.parametrize(
    ("free", "told"),
    [
        (30, "modulation_table on"),
        (16, CHEAP),
        (8, f"{LESS}, base precision 'int8-quanto'"),
        (5, f"{LESS}, base precision 'int4-quanto'"),
        (3, f"{LESS}, group offload by block"),
        (2.5, f"{LESS}, group offload by block, resolution 768x768"),
        (2.2, f"{LESS}, group offload by block, resolution 576x576"),
    ],
)
def test_advice_names_the_cheapest_change_that_fits(free: float, told: str, shapes: dict[str, Any]) -> None:
    settings = dataclasses.replace(SETTINGS, checkpointing="none", batch=2, modulation_table=False)
    advice = estimate.fitting(CONFIG, shapes, settings, SIZE, CUDA, int(free * GIB))
    assert f"With {told} it needs about" in advice
    said = re.search(r"改为(.*)后约需", advice)
    assert said is not None and said[1].count("、") == len(re.findall(", (?!accumulation)", told))


def test_offload_is_advised_with_what_it_needs(shapes: dict[str, Any]) -> None:
    def advice(free: float, device: torch.device = CUDA, **options: Any) -> str:
        settings = dataclasses.replace(SETTINGS, **options)
        return estimate.fitting(CONFIG, shapes, settings, SIZE, device, int(free * GIB))

    assert "With base precision 'bf16', group offload by block it" in advice(3, base_precision="int8-quanto")
    assert "With compile off, group offload by block it" in advice(3, compile=True)
    assert "With group offload by block without stream it" in advice(3, torch.device("mps"))
    assert "With resolution 768x768 it" in advice(2.5, offload="block")


def test_what_no_setting_makes_fit_is_said(shapes: dict[str, Any]) -> None:
    assert "no setting makes that fit" in estimate.fitting(CONFIG, shapes, SETTINGS, SIZE, CUDA, GIB)


@pytest.mark.parametrize("name", ["bf16", "fp32", "fp8-torchao", "int8-quanto", "int4-quanto"])
def test_the_numbers_are_of_the_dtype_that_the_device_computes_in(name: str, shapes: dict[str, Any]) -> None:
    """On a CPU quanto's bases compute in fp32, so there is no table that could replace their modulation layers."""
    settings = dataclasses.replace(SETTINGS, base_precision=name)
    cpu, cuda = (estimate.estimate(CONFIG, shapes, settings, SIZE, device) for device in (CPU, CUDA))
    if not name.endswith("quanto"):
        assert cpu == cuda
        return
    assert cpu.activations == pytest.approx(2 * cuda.activations)
    assert cpu.adapters > cuda.adapters
    modulation = sum(shape.numel() for key, shape in shapes.items() if is_modulation(key.rpartition(".")[0]))
    assert cpu.weights > cuda.weights + 4 * modulation


def test_no_table_is_advised_where_the_device_computes_in_fp32(shapes: dict[str, Any]) -> None:
    settings = dataclasses.replace(SETTINGS, base_precision="int8-quanto", modulation_table=False, batch=4)
    free = estimate.estimate(CONFIG, shapes, settings, SIZE, CPU).total - 1
    assert "With batch 1, accumulation 4 it" in estimate.fitting(CONFIG, shapes, settings, SIZE, CPU, free)


TABLE = re.compile(r"^\| (?:settings|设置) \| 1024.*\n\|[-|]+\n((?:\|.*\n)+)", re.M)


def told(row: dict[str, Any]) -> tuple[str, str, list[str]]:
    """A measured row as a README writes it: settings, size and figures."""
    base = "diffusers + peft" if row["loop"] == "plain" else row["base_precision"]
    words = [row["checkpointing"] if row["loop"] == "plain" else f"checkpointing {row['checkpointing']}"]
    words += ["compile"] * row["compile"] + ["modulation_table"] * row["modulation_table"]
    words += [f"offload {row['offload']}"] * (row["offload"] != "none")
    return ", ".join([base, *words]), str(row["size"]), [f"{row['s_per_step']:.3f}", f"{row['allocated_gib']:.1f}"]


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readmes_figures_of_training_are_measured_ones(name: str, pack_dir: Path) -> None:
    """The first table is of training_table.json, the second of training.json."""
    tables = TABLE.findall((pack_dir / name).read_text(encoding="utf-8"))
    assert [table.count("\n") for table in tables] == [13, 9]
    for table, result in zip(tables, ("training_table.json", "training.json"), strict=True):
        measured = {(settings, size): figures for settings, size, figures in map(told, rows_of(pack_dir, result))}
        for line in table.splitlines():
            settings, *figures = (cell.strip() for cell in line.strip("|").split("|"))
            for size, shown in (("1024", figures[:2]), ("512", figures[2:])):
                assert shown == measured.get((settings, size), ["–", "–"]), line
