"""LongCatTrainLora without its server: what it does when it cannot go on."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from longcat_pack.longcat_backend.comfy_bridge import training
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training.settings import TrainSettings
from longcat_pack.longcat_backend.training.state import State

SETTINGS = TrainSettings(schedule="linear", steps=8)


def test_the_report_says_from_where_a_run_goes_on_and_that_its_learning_rate_is_another() -> None:
    found = State(4, {}, {"settings": SETTINGS.to_json()})
    assert training._begun(None, SETTINGS)[0].startswith("from the first step")
    assert len(training._begun(found, SETTINGS)) == 1
    went_on, told = training._begun(found, dataclasses.replace(SETTINGS, steps=9))
    assert went_on.startswith("went on after step 4") and "(linear) follows the new length, 9 steps" in told


@pytest.mark.parametrize(
    ("hungry", "told"), [("base.load_base", "the base model was loaded"), ("selfcheck.check_file", "LoRA was checked")]
)
def test_a_model_that_does_not_fit_says_what_to_turn_down(
    hungry: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Anything:
        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any) -> Any:
            return self

        __getitem__ = __call__

    def no_memory(*args: Any) -> None:
        raise RuntimeError("MPS backend out of memory")

    for name in ("base.load_base", "loop.train", "_Run._foresee"):
        part, _, function = name.partition(".")
        monkeypatch.setattr(getattr(training, part), function, Anything())
    part, _, function = hungry.partition(".")
    monkeypatch.setattr(getattr(training, part), function, no_memory)
    run = training._Run(Anything(), Anything(), Anything(), TrainSettings(), tmp_path / "lora", tmp_path)
    with pytest.raises(LongCatError, match=f"{told}.*MPS backend out of memory.*base precision"):
        run.train(Anything())
