"""Training and validating LongCat-Tiny from a JSON, without ComfyUI."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from longcat_pack.longcat_backend import checkpoints, labelled_grid, lora_files, sampler
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training import __main__ as program
from longcat_pack.longcat_backend.training import adapters, base, config, headless, selfcheck, state
from longcat_pack.longcat_backend.training.encoders import CheckpointEncoders
from longcat_pack.longcat_backend.training.loop import Progress

CPU = torch.device("cpu")
SETTINGS = {
    "steps": 40, "batch": 1, "rank": 2, "targets": "attention", "base_precision": "fp32", "checkpointing": "none",
    "learning_rate": 5e-3, "validate_every": 0,
}  # fmt: skip


def write(folder: Path, pack_dir: Path) -> Path:
    """A run on the demo's zorbs."""
    values = {
        "name": "zorb",
        "checkpoint": str(pack_dir / "demo" / "LongCat-Tiny"),
        "dataset": {"folder": "zorb", "resolutions": "128x128", "grid": 16, "held_out": 0.1, "trigger_word": "zorb"},
        "settings": SETTINGS,
        "validation": {"prompts": ["a zorb on a red background", "红色背景上的佐布"], "steps": 2},
    }
    folder.mkdir()
    (folder / "zorb.json").write_text(json.dumps(values), encoding="utf-8")
    return folder / "zorb.json"


@pytest.fixture(scope="module")
def straight(pack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LoRA of a run in one sitting, by the program itself in the pack's folder."""
    path = write(tmp_path_factory.mktemp("straight") / "run", pack_dir)
    command = [sys.executable, "-m", "longcat_backend.training", str(path), "--device", "cpu"]
    command += ["--data", str(pack_dir / "demo" / "datasets")]
    done = subprocess.run(command, cwd=pack_dir, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return path.parent / "output" / "zorb.safetensors"


def read(pack_dir: Path, tmp_path: Path, steps: int = 40) -> config.Config:
    given = config.read(write(tmp_path / "run", pack_dir), data=[pack_dir / "demo" / "datasets"])
    return dataclasses.replace(given, settings=dataclasses.replace(given.settings, steps=steps))


def test_an_interrupted_run_writes_the_same_file(straight: Path, pack_dir: Path, tmp_path: Path) -> None:
    given = read(pack_dir, tmp_path)
    answers = iter([False] * 19 + [True])
    assert headless.train(given, CPU, lambda: next(answers)).stopped
    half = given.file.read_bytes()
    assert state.steps(given.run_folder) == [20]
    result = headless.train(given, CPU, lambda: False)
    assert result.step == 40 and not result.stopped
    assert given.file.read_bytes() == straight.read_bytes() != half
    assert (given.run_folder / "loss.png").is_file()


def base_pictures(given: config.Config) -> list[torch.Tensor]:
    """What the checkpoint alone draws of a config's validation prompts."""
    checkpoint = checkpoints.open_checkpoint(given.checkpoint)
    model, encoders = base.load_base(checkpoint, "fp32", CPU), CheckpointEncoders(checkpoint, torch.float32, CPU)
    asked, found = given.validation, []
    for text in asked.prompts:
        prompt = sampler.Prompt(encoders.text(text, None), encoders.text("", None))
        how = ((128, 128), asked.seed, asked.steps, asked.guidance, CPU, checkpoint.configs["scheduler"])
        found.append(encoders.pixels(sampler.sample(model, prompt, *how)))
    return found


def test_validation_draws_each_prompt_without_and_with_the_lora(
    straight: Path, pack_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, drawn = labelled_grid.grid, []

    def kept(pictures: list[torch.Tensor], rows: list[str], columns: list[str]) -> Image.Image:
        drawn.append((pictures, rows, columns, grid(pictures, rows, columns)))
        return drawn[-1][-1]

    monkeypatch.setattr(labelled_grid, "grid", kept)
    path, datasets = straight.parents[1] / "zorb.json", pack_dir / "demo" / "datasets"
    assert program.main(["validate", str(path), "--device", "cpu", "--data", str(datasets)]) == 0
    ((pictures, rows, columns, sheet),) = drawn
    with Image.open(straight.parent / "runs" / "zorb" / "validation.png") as saved:
        assert saved.tobytes() == sheet.tobytes()
    given = config.read(path, data=[datasets])
    assert (rows, columns) == (["without LoRA", "with LoRA"], list(given.validation.prompts))
    expected = base_pictures(given)
    assert len(pictures) == 2 * len(expected) == 4
    for without, with_lora, alone in zip(pictures[:2], pictures[2:], expected, strict=True):
        torch.testing.assert_close(without, alone, atol=1e-5, rtol=0)
        assert (with_lora - without).abs().max() > 1e-3


@pytest.mark.parametrize("what", ["train", "validate"])
def test_what_a_config_asks_for_in_vain_is_told(
    what: str, pack_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = dataclasses.replace(read(pack_dir, tmp_path), checkpoint=tmp_path, notes=("'lora_dropout' is ignored",))
    with caplog.at_level("INFO"), pytest.raises(LongCatError):
        headless.train(given, CPU, lambda: False) if what == "train" else headless.validate(given, CPU)
    assert "'lora_dropout' is ignored" in caplog.text


def test_validation_needs_a_lora(pack_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(LongCatError, match="Train it first"):
        headless.validate(read(pack_dir, tmp_path), CPU)


def test_a_base_that_does_not_fit_says_what_to_turn_down(
    pack_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headless.base, "load_base", no_memory)
    with pytest.raises(LongCatError, match="while the base model was loaded: MPS .*base precision"):
        headless.train(read(pack_dir, tmp_path), CPU, lambda: False)


def test_a_check_without_memory_says_that_the_lora_is_whole(
    pack_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = read(pack_dir, tmp_path, steps=2)
    monkeypatch.setattr(headless.selfcheck, "check_file", no_memory)
    with pytest.raises(LongCatError, match=r"while the written LoRA was checked \(the LoRA and the states are whole\)"):
        headless.train(given, CPU, lambda: False)
    written = given.file.read_bytes()
    monkeypatch.undo()
    assert headless.train(given, CPU, lambda: False).step == 2
    assert given.file.read_bytes() == written and state.steps(given.run_folder) == [2]


def test_fewer_steps_than_are_done_are_refused_before_anything_is_computed(
    pack_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = read(pack_dir, tmp_path, steps=4)
    answers = iter([False, True])
    headless.train(given, CPU, lambda: next(answers))
    written = given.file.read_bytes()
    monkeypatch.setattr(headless.encoded, "encode", None)
    fewer = dataclasses.replace(given, settings=dataclasses.replace(given.settings, steps=1))
    with pytest.raises(LongCatError, match="has done 2 steps already, and 1 are asked for"):
        headless.train(fewer, CPU, lambda: False)
    assert given.file.read_bytes() == written


@pytest.mark.parametrize(("way", "told"), [("output", "The LoRA could not"), ("output/runs", "The states of the")])
def test_what_is_in_the_way_of_a_result_is_told_before_anything_is_computed(
    way: str, told: str, pack_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = read(pack_dir, tmp_path)
    place = given.output.parent / way
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(b"precious")
    monkeypatch.setattr(headless.encoded, "encode", None)
    with pytest.raises(LongCatError, match=told):
        headless.train(given, CPU, lambda: False)
    assert place.read_bytes() == b"precious"


def no_memory(*args: Any) -> None:
    raise RuntimeError("MPS backend out of memory")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_and_the_same_command_goes_on(
    number: signal.Signals, straight: Path, pack_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = read(pack_dir, tmp_path)
    command = [str(given.output.parent / "zorb.json"), "--device", "cpu", "--data", str(pack_dir / "demo" / "datasets")]
    before = signal.getsignal(number)

    def log_step(progress: Progress) -> None:
        if progress.step == 2:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(headless, "_log_step", log_step)
        assert program.main(command) == 130
    assert signal.getsignal(number) is before
    assert state.steps(given.run_folder) == [2] and given.file.is_file()
    assert program.main(command) == 0
    assert given.file.read_bytes() == straight.read_bytes()


def test_a_chart_that_cannot_be_written_ends_nothing(
    pack_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = read(pack_dir, tmp_path)
    validating = dataclasses.replace(given.settings, steps=1, validate_every=1)
    for name in ("loss.png", "step-00000001.png"):
        (given.run_folder / name).mkdir(parents=True)
    assert headless.train(dataclasses.replace(given, settings=validating), CPU, lambda: False).step == 1
    assert given.file.is_file()
    assert all(f"{name}' cannot be written" in caplog.text for name in ("loss.png", "step-00000001.png"))


def test_a_mistake_ends_the_program_with_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert program.main([str(tmp_path / "missing.json")]) == 1
    assert "cannot be read as a training config" in caplog.text


def test_a_file_that_differs_from_what_was_learnt_is_found(straight: Path, folder: Path, tmp_path: Path) -> None:
    model = base.load_base(checkpoints.open_checkpoint(folder), "fp32", CPU)
    adapters.inject(model.transformer, "attention", 2, 2.0, 0, CPU)
    learnt = lora_files.read(straight).adapters
    selfcheck.check_file(model, straight, learnt, CPU)
    changed = [dataclasses.replace(each, up=each.up * 1.1) for each in learnt]
    with pytest.raises(LongCatError, match="differs from what was learnt by"):
        selfcheck.check_file(model, straight, changed, CPU)
    nothing = [dataclasses.replace(each, up=each.up * 0) for each in learnt]
    lora_files.write(tmp_path / "nothing.safetensors", nothing)
    with pytest.raises(LongCatError, match="changes the output by 0"):
        selfcheck.check_file(model, tmp_path / "nothing.safetensors", nothing, CPU)
    lora_files.write(tmp_path / "half.safetensors", learnt[:3])
    with pytest.raises(LongCatError, match="has 3 layers"):
        selfcheck.check_file(model, tmp_path / "half.safetensors", learnt[:3], CPU)
