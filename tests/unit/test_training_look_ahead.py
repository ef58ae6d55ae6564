"""The next step's pictures are read while the device is busy with a step, and that changes nothing else."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch

from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training import loop
from longcat_pack.longcat_backend.training.loop import Events, Result
from longcat_pack.longcat_backend.training.settings import TrainSettings

SETTINGS = TrainSettings(
    steps=4,
    batch=2,
    accumulation=2,
    rank=2,
    base_precision="fp32",
    checkpointing="none",
    save_every=0,
    validate_every=0,
)


@dataclass
class Watched(tiny.Pictures):
    """Pictures that note when they are read; after so many readings none can be read any more."""

    most: int = 10**9
    read: list[int] = field(default_factory=list)

    def __getitem__(self, index: int) -> tiny.Example:
        if len(self.read) == self.most:
            raise LongCatError("gone", "gone")
        self.read.append(index)
        return super().__getitem__(index)


def watched(most: int = 10**9) -> Watched:
    return Watched([tiny.example(seed) for seed in range(16)], most=most)


def train(folder: Path, data: Watched, **events: Any) -> Result:
    return loop.train(tiny.velocity_model(), data, SETTINGS, folder, Events(**events), torch.device("cpu"))


def test_pictures_are_read_once_and_a_step_ahead(tmp_path: Path) -> None:
    data = watched()
    seen: list[int] = []
    train(tmp_path, data, on_step=lambda progress: seen.append(len(data.read)))
    assert seen == [8, 12, 16, 16]
    assert sorted(data.read) == list(range(16))


def test_a_picture_that_cannot_be_read_ends_its_own_step_and_not_the_one_before(tmp_path: Path) -> None:
    done: list[int] = []
    with pytest.raises(LongCatError, match="gone"):
        train(tmp_path, watched(8), on_step=lambda each: done.append(each.step))
    assert done == [1, 2]
