"""Chance in training: repeatable, apart from the batch size, and no picture left out."""

import math
from collections import Counter
from statistics import fmean, pstdev

import pytest
import tiny_training as tiny
import torch

from longcat_pack.longcat_backend import flow
from longcat_pack.longcat_backend.training import objective
from longcat_pack.longcat_backend.training.draws import Cursor, Draw, draw, epoch_batches, seed_of
from longcat_pack.longcat_backend.training.objective import Shift

BUCKETS = {(64, 64): (0, 1, 2, 3, 4), (128, 64): (5, 6, 6)}


def test_seeds_are_the_same_in_every_process_and_differ_by_part() -> None:
    assert seed_of("draw", 0, 1, 2) == 6566813410748999371
    assert len({seed_of(*parts) for parts in [(1, 23), (12, 3), (1, 2, 3), ("1", "23", "")]}) == 4


def test_a_sample_gets_the_same_draw_again_and_another_one_at_the_next_step() -> None:
    first, again, later = draw((2, 3), 0, 1, 0), draw((2, 3), 0, 1, 0), draw((2, 3), 0, 2, 0)
    assert torch.equal(first.noise, again.noise) and (first.normal, first.uniform) == (again.normal, again.uniform)
    assert not torch.equal(first.noise, later.noise) and first.normal != later.normal


def test_draws_follow_their_laws() -> None:
    drawn = [draw((4,), 5, step, 0) for step in range(2000)]
    assert abs(fmean(each.normal for each in drawn)) < 0.08
    assert abs(pstdev(each.normal for each in drawn) - 1) < 0.05
    assert abs(fmean(each.uniform for each in drawn) - 0.5) < 0.03


def test_an_epoch_shows_every_picture_and_a_batch_is_from_one_bucket() -> None:
    batches = epoch_batches(BUCKETS, 2, seed=0, epoch=0)
    assert Counter(index for batch in batches for index in batch) == Counter([0, 1, 2, 3, 4, 5, 6, 6])
    assert all(set(batch) <= {0, 1, 2, 3, 4} or set(batch) <= {5, 6} for batch in batches)
    assert sorted(len(batch) for batch in batches) == [1, 1, 2, 2, 2]


def test_epochs_differ_and_can_be_repeated() -> None:
    orders = [epoch_batches(BUCKETS, 1, seed=0, epoch=epoch) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert epoch_batches(BUCKETS, 1, seed=1, epoch=0) != orders[0]


def test_a_cursor_goes_on_where_another_one_stood() -> None:
    whole = Cursor(BUCKETS, 2, seed=3)
    taken = [whole.take() for _ in range(13)]
    half = Cursor(BUCKETS, 2, seed=3)
    for _ in range(7):
        half.take()
    rest = Cursor(BUCKETS, 2, 3, half.epoch, half.position)
    assert [rest.take() for _ in range(6)] == taken[7:]


@pytest.mark.parametrize(
    ("setting", "mu"), [("batch", 1.15), ("run", 0.63), (3.0, math.log(3)), (1.0, 0.0)], ids=["batch", "run", "3", "1"]
)
def test_the_noise_level_follows_the_flow_shift(setting: str | float, mu: float) -> None:
    latent = torch.zeros(16, 128, 128)
    shift = Shift(setting, flow.DEFAULT_SCHEDULER, tokens=1024)
    assert shift.mu(latent) == pytest.approx(mu, abs=1e-9)
    example = tiny.Example(latent, torch.zeros(1, 1), torch.zeros(1, 1))
    sigma = objective.sample(example, Draw(0.25, latent, 0.5), shift, 0.0).sigma
    assert math.log(sigma / (1 - sigma)) == pytest.approx(0.25 + mu)


def test_mean_tokens_counts_a_picture_as_often_as_it_is_shown() -> None:
    assert objective.mean_tokens({(512, 512): (0, 1, 1), (1024, 1024): (2,)}) == (3 * 1024 + 4096) / 4


def test_captions_are_dropped_below_the_dropout_alone() -> None:
    example = tiny.example(0)
    shift = Shift("batch", flow.DEFAULT_SCHEDULER, 4)
    dropped = objective.sample(example, Draw(0.0, example.latent, 0.09), shift, 0.1)
    kept = objective.sample(example, Draw(0.0, example.latent, 0.11), shift, 0.1)
    assert dropped.text is example.empty and kept.text is example.text
