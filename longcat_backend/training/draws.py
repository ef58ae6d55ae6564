"""Chance, drawn so that a run can be repeated: every number follows from the seed, the step and the sample.

No state of a generator has to be saved, and neither the batch size nor the device changes what a sample gets.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch


def seed_of(*parts: object) -> int:
    """A seed in 0..2**63-1 that is a function of the parts, the same on every machine and in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Draw:
    """What one sample gets by chance."""

    normal: float  # the noise level before the shift: sigma = sigmoid(normal + mu)
    noise: torch.Tensor  # of the latent's shape, fp32, on the CPU
    uniform: float  # in 0..1; the caption is dropped where it is below the dropout


def draw(shape: Sequence[int], *parts: object) -> Draw:
    """The draw of a sample that ``parts`` identify, for a latent of ``shape``."""
    generator = torch.Generator().manual_seed(seed_of("draw", *parts))
    normal = torch.randn((), generator=generator)
    uniform = torch.rand((), generator=generator)
    return Draw(float(normal), torch.randn(tuple(shape), generator=generator), float(uniform))


def epoch_batches(
    buckets: Mapping[tuple[int, int], Sequence[int]], batch: int, seed: int, epoch: int
) -> list[tuple[int, ...]]:
    """The batches of an epoch: every index of every bucket once, shuffled; a batch is from one bucket.

    A bucket's last batch is shorter where its size is no multiple of ``batch``, so that no picture is left out.
    """
    batches: list[tuple[int, ...]] = []
    for bucket in sorted(buckets):
        order = list(buckets[bucket])
        Random(seed_of("epoch", seed, epoch, *bucket)).shuffle(order)
        batches += [tuple(order[start : start + batch]) for start in range(0, len(order), batch)]
    Random(seed_of("batches", seed, epoch)).shuffle(batches)
    return batches


@dataclass
class Cursor:
    """Where a run stands in the endless row of epochs."""

    buckets: Mapping[tuple[int, int], Sequence[int]]
    batch: int
    seed: int
    epoch: int = 0
    position: int = 0  # batches of the epoch that were taken

    def __post_init__(self) -> None:
        self._batches = epoch_batches(self.buckets, self.batch, self.seed, self.epoch)

    def take(self) -> tuple[int, ...]:
        """Indices of the next batch; the next epoch begins where this one ends."""
        if self.position >= len(self._batches):
            self.epoch, self.position = self.epoch + 1, 0
            self._batches = epoch_batches(self.buckets, self.batch, self.seed, self.epoch)
        self.position += 1
        return self._batches[self.position - 1]
