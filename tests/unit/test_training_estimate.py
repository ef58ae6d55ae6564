"""The estimate of memory against what was measured at full size, and what it says to turn down."""

import dataclasses
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


@pytest.mark.parametrize(
    ("options", "measured"),
    [({}, 13.4), ({"checkpointing": "none"}, 24.9), ({"base_precision": "int8-quanto"}, 7.7 + 1.6)],
    ids=["recomputed", "kept", "int8"],
)
def test_the_estimate_is_within_an_eighth_of_what_was_measured(
    options: dict[str, Any], measured: float, shapes: dict[str, Any]
) -> None:
    """DESIGN.md, section 8: one H100, 1024x1024, rank 16, the 100 attention layers.

    There the modulation layers were int8 as well; the pack's preset leaves them in bf16, which is 1.6 GiB more.
    """
    found = estimate.estimate(CONFIG, shapes, dataclasses.replace(SETTINGS, **options), SIZE)
    assert found.total / GIB == pytest.approx(measured, rel=0.125)


def test_what_needs_more_is_estimated_higher(shapes: dict[str, Any]) -> None:
    def total(size: tuple[int, int] = SIZE, **options: Any) -> int:
        return estimate.estimate(CONFIG, shapes, dataclasses.replace(SETTINGS, **options), size).total

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
        (16, "checkpointing 'block'"),
        (8, "checkpointing 'block', batch 1, accumulation 2, base precision 'int8-quanto'"),
        (2, "no setting makes that fit"),
    ],
)
def test_advice_names_the_cheapest_change_that_fits(free: int, told: str, shapes: dict[str, Any]) -> None:
    settings = dataclasses.replace(SETTINGS, checkpointing="none", batch=2)
    assert told in estimate.fitting(CONFIG, shapes, settings, SIZE, free * GIB)
