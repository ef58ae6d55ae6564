"""The live chart of a run: every held-out loss is in it as soon as it was measured."""

from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from PIL import Image

from longcat_pack.longcat_backend.comfy_bridge import training_previews
from longcat_pack.longcat_backend.training import loop
from longcat_pack.longcat_backend.training.settings import TrainSettings


def test_the_chart_shows_a_held_out_loss_when_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[tuple[int, float]]] = []

    def draw(losses: Any, held_out: list[tuple[int, float]], steps: int) -> Image.Image:
        drawn.append(list(held_out))
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(training_previews.loss_chart, "draw", draw)
    no_pictures = training_previews.Validation([], [], (32, 32), 1, 1.0, 0, lambda latent: latent, {})
    monitor = training_previews.Monitor(tmp_path, 4, no_pictures)
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
