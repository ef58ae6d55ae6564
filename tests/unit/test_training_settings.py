"""Settings of training: what is refused, what JSON keeps, and which changes a run survives."""

import json
from typing import Any

import pytest

from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training.settings import TrainSettings, differences


def test_json_keeps_every_setting() -> None:
    settings = TrainSettings(steps=7, alpha=4.5, flow_shift=3.0, offload="leaf", ema=0.5, seed=2**63)
    assert TrainSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_alpha_is_the_rank_unless_it_is_set() -> None:
    assert TrainSettings(rank=24).effective_alpha == 24
    assert TrainSettings(rank=24, alpha=8).effective_alpha == 8


def test_an_unknown_setting_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(LongCatError, match=r"'learning_rte' \(did you mean 'learning_rate'\?\)"):
        TrainSettings.from_json({"learning_rte": 1e-4})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", True),
        ("steps", 1.5),
        ("batch", "4"),
        ("rank", -1),
        ("alpha", 0.0),
        ("targets", "everything"),
        ("learning_rate", float("nan")),
        ("optimiser", "sgd"),
        ("ema", 1.0),
        ("compile", "yes"),
        ("flow_shift", "auto"),
        ("flow_shift", 0.0),
        ("base_precision", "int8"),
        ("checkpointing", True),
        ("offload", "disk"),
        ("keep", 0),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(LongCatError, match=f"'{name}'"):
        TrainSettings.from_json({name: value})


def test_offload_that_diffusers_would_change_is_refused() -> None:
    with pytest.raises(LongCatError, match="blocks_per_group"):
        TrainSettings(offload="block", offload_blocks=2, offload_stream=True)


def test_differences_name_what_a_run_cannot_go_on_with() -> None:
    old = TrainSettings(steps=10, rank=8).to_json()
    fine = TrainSettings(steps=20, rank=8, save_every=1, validate_every=2, checkpointing="none", compile=True).to_json()
    assert differences(old, fine) == []
    assert differences(old, TrainSettings(rank=16, seed=3).to_json()) == ["rank: 8 -> 16", "seed: 0 -> 3"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"offload": "block", "compile": True}, "'compile' and 'offload' exclude each other"),
        ({"offload": "block", "base_precision": "int8-quanto"}, "cannot move weights of the precision 'int8-quanto'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(LongCatError, match=told):
        TrainSettings(**options)
