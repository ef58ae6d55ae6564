"""Training in several sittings: the same bits, whatever happened in between."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch

from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training import loop, run, state
from longcat_pack.longcat_backend.training.loop import Events, Result
from longcat_pack.longcat_backend.training.settings import TrainSettings

SETTINGS = TrainSettings(
    steps=8, batch=2, accumulation=2, rank=2, targets="attention", learning_rate=1e-2, schedule="cosine", warmup=2,
    ema=0.9, seed=5, base_precision="fp32", checkpointing="none", save_every=0, keep=2, validate_every=3,
)  # fmt: skip
NO_MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory")]
DATA = tiny.pictures(held_out=(4,), dropout=0.3)


def train(folder: Path, settings: TrainSettings = SETTINGS, data: Any = DATA, **events: Callable[..., Any]) -> Result:
    return loop.train(tiny.velocity_model(), data, settings, folder, Events(**events), torch.device("cpu"))


def stop_at(step: int) -> dict[str, Callable[..., Any]]:
    """Events that interrupt a run after a step."""
    seen = [0]
    return {"on_step": lambda progress: seen.__setitem__(0, progress.step), "should_stop": lambda: seen[0] == step}


def assert_same(one: Result, other: Result) -> None:
    """Both ended with the same bits."""
    assert (one.losses, one.held_out, one.step) == (other.losses, other.held_out, other.step)
    assert [each.module for each in one.adapters] == [each.module for each in other.adapters]
    for a, b in zip(one.adapters, other.adapters, strict=True):
        assert torch.equal(a.down, b.down) and torch.equal(a.up, b.up) and a.alpha == b.alpha


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The run in one sitting."""
    return train(tmp_path_factory.mktemp("straight"))


def test_training_changes_every_adapter_and_lowers_nothing_silently(straight: Result) -> None:
    assert straight.step == 8 and not straight.stopped and [step for step, _ in straight.losses] == list(range(1, 9))
    assert [step for step, _ in straight.held_out] == [3, 6]
    assert len(straight.adapters) == 2 * 4 + 3 * 3
    assert all(float(each.up.abs().max()) > 0 and each.alpha == 2 for each in straight.adapters)


def test_the_global_generator_decides_nothing_and_stays_where_it_was(tmp_path: Path, straight: Result) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert_same(train(tmp_path), straight)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, straight: Result) -> None:
    first = train(tmp_path, **stop_at(5))
    assert first.stopped and first.step == 5
    assert_same(train(tmp_path), straight)


@pytest.mark.parametrize("optimiser", ["adamw-8bit", "prodigy", "lion"])
def test_every_optimiser_resumes_exactly(optimiser: str, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, optimiser=optimiser, rank=16, steps=5, ema=0.0, validate_every=0)
    whole = train(tmp_path / "whole", settings)
    train(tmp_path / "halves", settings, **stop_at(3))
    assert_same(train(tmp_path / "halves", settings), whole)


def test_a_finished_run_gives_its_result_again_and_goes_on_with_more_steps(tmp_path: Path) -> None:
    constant = dataclasses.replace(SETTINGS, schedule="constant", steps=3)
    first = train(tmp_path, constant)
    assert_same(train(tmp_path, constant), first)
    longer = dataclasses.replace(constant, steps=5, keep=1, checkpointing="block")
    assert_same(train(tmp_path, longer), train(tmp_path / "other", dataclasses.replace(constant, steps=5)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rank": 4}, "rank: 2 -> 4"),
        ({"learning_rate": 0.5}, "learning_rate: 0.01 -> 0.5"),
        ({"optimiser": "adamw-8bit"}, "optimiser: adamw -> adamw-8bit"),
    ],
)
def test_changed_settings_are_refused_by_name(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    train(tmp_path, **stop_at(1))
    with pytest.raises(LongCatError, match=told):
        train(tmp_path, dataclasses.replace(SETTINGS, **change))


def test_fewer_steps_than_are_done_are_refused_and_change_nothing(tmp_path: Path) -> None:
    train(tmp_path, dataclasses.replace(SETTINGS, save_every=1, keep=9), **stop_at(5))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(LongCatError, match="has done 5 steps already, and 3 are asked for"):
        train(tmp_path, dataclasses.replace(SETTINGS, steps=3))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_learning_rate_that_follows_the_new_length_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, dataclasses.replace(SETTINGS, steps=2))
    train(tmp_path, dataclasses.replace(SETTINGS, steps=2))
    assert "new length" not in caplog.text
    train(tmp_path, dataclasses.replace(SETTINGS, steps=3))
    assert "The learning rate (cosine) follows the new length, 3 steps in place of 2" in caplog.text
    caplog.clear()
    for steps in (2, 3):
        train(tmp_path / "constant", dataclasses.replace(SETTINGS, schedule="constant", steps=steps))
    assert "new length" not in caplog.text


def test_another_dataset_is_refused(tmp_path: Path) -> None:
    train(tmp_path, **stop_at(1))
    with pytest.raises(LongCatError, match="the dataset: pictures -> others"):
        train(tmp_path, data=dataclasses.replace(DATA, identity="others"))


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    train(tmp_path, **stop_at(1))
    model = tiny.velocity_model()
    model.transformer.proj_out.weight.data += 1e-3
    with pytest.raises(LongCatError, match="the base model"):
        loop.train(model, DATA, SETTINGS, tmp_path, Events(), torch.device("cpu"))


@pytest.mark.parametrize("harm", ["cut", "changed", "missing", "index"])
def test_a_damaged_state_is_told_and_the_one_before_is_used(
    harm: str, tmp_path: Path, straight: Result, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, dataclasses.replace(SETTINGS, save_every=2), **stop_at(6))
    file = state.path(tmp_path, 6) / ("state.json" if harm == "index" else "optimiser.safetensors")
    content = bytearray(file.read_bytes())
    if harm == "missing":
        file.unlink()
    elif harm == "index":
        file.write_text(file.read_text().replace('"position": ', '"position": 1'))
    else:
        content[-1] ^= 1
        file.write_bytes(content[:-100] if harm == "cut" else content)
    with caplog.at_level("WARNING"):
        assert_same(train(tmp_path), straight)
    assert "The state of step 6 is damaged" in caplog.text


def test_no_whole_state_at_all_is_an_error(tmp_path: Path) -> None:
    train(tmp_path, **stop_at(2))
    (state.path(tmp_path, 2) / "state.json").write_text("{")
    with pytest.raises(LongCatError, match="No state in .* is whole"):
        train(tmp_path)


def test_the_last_states_and_the_best_are_kept(tmp_path: Path, straight: Result) -> None:
    result = train(tmp_path, dataclasses.replace(SETTINGS, save_every=1))
    assert result.best_step == min(result.held_out, key=lambda measured: measured[1])[0]
    assert state.steps(tmp_path) == sorted({7, 8, result.best_step})
    assert_same(result, straight)


def test_a_full_disk_is_told_and_leaves_the_states_whole(
    tmp_path: Path, straight: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, **stop_at(2))
    write = state.save_file

    def full(tensors: Any, file: Path) -> None:
        if file.name == "optimiser.safetensors":
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, file)

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(LongCatError, match="No space left on device; the state of step 2 is whole"):
        train(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state-00000002"]
    monkeypatch.undo()
    assert_same(train(tmp_path), straight)


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_running_out_of_memory_says_what_to_turn_down_and_saves(
    error: Exception, tmp_path: Path, straight: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = run.objective.losses
    calls = [0]

    def hungry(*args: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 6:  # in the middle of step 3
            raise error
        return losses(*args)

    monkeypatch.setattr(run.objective, "losses", hungry)
    with pytest.raises(LongCatError, match="step 3 .*checkpointing.*batch.*base precision.*offload.*resolution"):
        train(tmp_path, dataclasses.replace(SETTINGS, validate_every=0))
    monkeypatch.undo()
    assert state.steps(tmp_path) == [2]
    assert_same(train(tmp_path), straight)


@pytest.mark.parametrize(
    ("update", "done", "told"),
    [(1, False, "no state was saved"), (4, False, "state of step 3"), (4, True, "state of step 3")],
)
def test_of_an_update_without_memory_nothing_is_saved(
    update: int, done: bool, told: str, tmp_path: Path, straight: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it changes anything, and after it has changed the adapters."""
    step, calls = torch.optim.AdamW.step, [0]

    def hungry(self: torch.optim.AdamW, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] < update or done:
            step(self, *args)
        if calls[0] == update:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", hungry)
    with pytest.raises(LongCatError, match=f"in the update of step {update} .*{told}"):
        train(tmp_path, dataclasses.replace(SETTINGS, save_every=2))
    monkeypatch.undo()
    assert state.steps(tmp_path) == ([2, 3] if update == 4 else [])
    assert_same(train(tmp_path), straight)


def test_running_out_of_memory_before_the_first_step_says_what_to_turn_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for place, name in ((loop.engine, "place"), (run.optimisers, "restore")):
        with monkeypatch.context() as patch, pytest.raises(LongCatError, match="before the first step: CUDA.*checkpoi"):
            patch.setattr(place, name, hungry)
            train(tmp_path)
        train(tmp_path, **stop_at(1))


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_pictures_without_memory_for_them_do_not_end_the_run(
    error: Exception, tmp_path: Path, straight: Result, caplog: pytest.LogCaptureFixture
) -> None:
    def hungry(step: int, model: Any) -> None:
        raise error

    with caplog.at_level("WARNING"):
        assert_same(train(tmp_path, on_validation=hungry), straight)
    assert "no memory for the validation pictures of step 3" in caplog.text


def test_a_loss_that_is_not_a_number_stops_before_the_adapters_change(tmp_path: Path) -> None:
    broken = tiny.pictures(dropout=0.0)
    broken.examples[2].latent.fill_(float("nan"))
    with pytest.raises(LongCatError, match="Step .* gave a loss of nan .*pictures"):
        train(tmp_path, dataclasses.replace(SETTINGS, save_every=1, validate_every=0), broken)
    for step in state.steps(tmp_path):
        adapters = state.load(state.path(tmp_path, step)).tensors["adapters"]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in adapters.values())


KILLED = """
    import importlib.util, sys
    from pathlib import Path
    root, folder = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.append(str(root / "tests"))
    init = root / "__init__.py"
    spec = importlib.util.spec_from_file_location("longcat_pack", init, submodule_search_locations=[str(root)])
    sys.modules["longcat_pack"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import dataclasses, time
    sys.path.append(str(root / "tests" / "unit"))
    import test_training_states as these
    def slow(progress):
        print(progress.step, flush=True)
        time.sleep(60 if progress.step == 6 else 0)
    these.train(folder, dataclasses.replace(these.SETTINGS, save_every=2), on_step=slow)
"""


def test_a_killed_process_loses_only_the_steps_since_the_last_state(
    pack_dir: Path, tmp_path: Path, straight: Result
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(pack_dir), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "6":
            break
    os.kill(process.pid, signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = tmp_path / ".state-00000006.partial"  # as if it had been killed while it wrote
    left.mkdir()
    (left / "adapters.safetensors").write_bytes(b"half")
    assert state.steps(tmp_path)[-1] == 4
    assert_same(train(tmp_path), straight)
    assert not left.exists()


def test_states_hold_no_pickle_and_say_what_they_are(tmp_path: Path) -> None:
    train(tmp_path, **stop_at(1))
    names = {file.name for file in state.path(tmp_path, 1).iterdir()}
    assert names == {"adapters.safetensors", "optimiser.safetensors", "ema.safetensors", "state.json"}
    index = json.loads((state.path(tmp_path, 1) / "state.json").read_text(encoding="utf-8"))
    assert index["values"]["settings"] == SETTINGS.to_json() and index["values"]["data"] == "pictures"
