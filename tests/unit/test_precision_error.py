"""What precision.py says of the layers that stay unquantised is what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longcat_pack.longcat_backend import precision

KEPT = {"modulation", "x_embedder", "context_embedder", "time_embed", "last proj_out"}
ENDS = ("x_embedder", "last proj_out")
WORST = "single proj_out"


@pytest.fixture(scope="module")
def measured(pack_dir: Path) -> dict[str, Any]:
    return json.loads((pack_dir / "benchmarks" / "results" / "precision_error.json").read_text(encoding="utf-8"))


def test_every_quantised_preset_was_measured(measured: dict[str, Any]) -> None:
    offered = {
        "transformer": {name for names in precision.ENGINE_PRESETS.values() for name in names},
        "text_encoder": set(precision.ENCODER_PRESETS),
    }
    for component, errors in measured["relative_error"].items():
        assert set(errors) == {name for name in offered[component] if precision.PRESETS[name].backend}


def test_the_table_is_the_one_that_was_measured(measured: dict[str, Any]) -> None:
    for errors in measured["relative_error"]["transformer"].values():
        assert set(errors["group_alone"]) - set(errors["table_without_group"]) == KEPT


def test_the_claims_hold_for_every_preset(measured: dict[str, Any]) -> None:
    weights = measured["full_size_weights_percent"]
    assert sum(weights[group] for group in ENDS) < 0.0065
    assert sum(weights[group] for group in KEPT - {"modulation", *ENDS}) < 0.35
    assert 15 <= weights[WORST] < 15.5
    for name, errors in measured["relative_error"]["transformer"].items():
        ends = sum(errors["group_alone"][group] ** 2 for group in ENDS)
        assert 0.55 < ends / errors["every_linear"] ** 2 < 0.78, name
        assert 0.3 < 1 - (errors["table_without_group"][WORST] / errors["table"]) ** 2 < 0.55, name
