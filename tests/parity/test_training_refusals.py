"""LongCatTrainLora without its server: what it does when it cannot go on."""

import dataclasses
import errno
from pathlib import Path
from typing import Any

import pytest

from longcat_pack.longcat_backend.comfy_bridge import training, training_request
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


def entries(folder: Path) -> list[str]:
    return sorted(entry.relative_to(folder).as_posix() for entry in folder.rglob("*"))


@pytest.mark.parametrize("start_over", [False, True])
def test_places_that_can_be_written_hold_nothing_but_the_run_folder(start_over: bool, places: Path) -> None:
    request = training_request.Request("sub/mine", SETTINGS, start_over=start_over)
    file, folder = training_request.prepare_places(request)
    assert file == places / "loras" / "sub" / "mine.safetensors"
    (folder / "state-00000002").mkdir()
    training_request.prepare_places(request)
    kept = [] if start_over else ["output/longcat_training/runs/sub/mine/state-00000002"]
    run = ["output", "output/longcat_training", "output/longcat_training/runs", "output/longcat_training/runs/sub"]
    assert entries(places) == [*run, "output/longcat_training/runs/sub/mine", *kept]


@pytest.mark.parametrize(
    ("way", "told"),
    [
        ("loras/sub", "The LoRA could not be written"),
        ("loras/sub/mine.safetensors/full", "is a folder with something else in it"),
        ("output/longcat_training", "The run folder 'longcat_training/runs/sub/mine' .* cannot be written"),
        ("output/longcat_training/runs/sub/mine", "The run folder .* cannot be written"),
    ],
)
def test_what_is_in_the_way_of_a_result_is_told_at_once_and_nothing_is_deleted(
    way: str, told: str, places: Path
) -> None:
    (places / way).parent.mkdir(parents=True)
    (places / way).write_bytes(b"precious")
    if way.startswith("loras"):
        (places / "output/longcat_training/runs/sub/mine/state-00000002").mkdir(parents=True)
    before = entries(places)
    for start_over in (False, True):
        request = training_request.Request("sub/mine", SETTINGS, start_over=start_over)
        with pytest.raises(LongCatError, match=told):
            training_request.prepare_places(request)
    assert entries(places) == before


@pytest.mark.parametrize("unwritable", ["mine.safetensors", "config.json"])
def test_a_folder_that_cannot_be_written_costs_no_state_of_an_earlier_run(
    unwritable: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = places / "output/longcat_training/runs/mine/state-00000002"
    state.mkdir(parents=True)
    write = Path.write_bytes

    def refused(self: Path, content: bytes) -> int:
        if unwritable in self.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", refused)
    with pytest.raises(LongCatError, match="Permission denied"):
        training_request.prepare_places(training_request.Request("mine", SETTINGS, start_over=True))
    assert state.is_dir()
