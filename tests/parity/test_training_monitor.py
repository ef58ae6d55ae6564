"""The live chart of a run: every held-out loss is in it as soon as it was measured."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from PIL import Image

from longcat_pack.longcat_backend.comfy_bridge import training_previews
from longcat_pack.longcat_backend.training import loop
from longcat_pack.longcat_backend.training.settings import TrainSettings

NO_PICTURES = training_previews.Validation([], [], (32, 32), 1, 1.0, 0, lambda latent: latent, {})


def test_the_chart_shows_a_held_out_loss_when_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[tuple[int, float]]] = []

    def draw(losses: Any, held_out: list[tuple[int, float]], steps: int) -> Image.Image:
        drawn.append(list(held_out))
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(training_previews.loss_chart, "draw", draw)
    monitor = training_previews.Monitor(tmp_path, 4, NO_PICTURES)
    settings = TrainSettings(
        steps=4, rank=2, base_precision="fp32", learning_rate=1.0, save_every=0, validate_every=1, checkpointing="none"
    )
    data = tiny.pictures(held_out=(4,))
    result = loop.train(tiny.velocity_model(), data, settings, tmp_path, monitor.events(), torch.device("cpu"))
    assert result.best_step is not None and result.best_step < 3  # most of them came without a saved state
    assert [shown for shown in drawn if shown] == [
        result.held_out[:1],
        result.held_out[:2],
        *[result.held_out[:3]] * 2,
        result.held_out,
    ]


def test_pictures_without_memory_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def raising(error: Exception) -> Any:
        def sample(*args: Any) -> None:
            raise error

        return sample

    monitor = training_previews.Monitor(tmp_path, 4, dataclasses.replace(NO_PICTURES, texts=["a"], prompts=["a"]))
    monkeypatch.setattr(training_previews, "sample", raising(RuntimeError("MPS backend out of memory")))
    monitor.on_validation(2, tiny.velocity_model())
    assert "pictures of step 2 are left out" in caplog.text
    monkeypatch.setattr(training_previews, "sample", raising(RuntimeError("another mistake")))
    with pytest.raises(RuntimeError, match="another mistake"):
        monitor.on_validation(2, tiny.velocity_model())
