"""The chart takes any losses, also none, one, equal ones and broken ones."""

import math

import numpy as np
import pytest

from longcat_pack.longcat_backend import loss_chart


def columns_with(chart: np.ndarray, colour: tuple[int, int, int]) -> list[int]:
    """Columns of the plotting area that hold a colour; the key above it is left out."""
    return sorted(set((chart[30:] == np.array(colour)).all(-1).nonzero()[1].tolist()))


@pytest.mark.parametrize(
    ("losses", "held_out"),
    [
        ([], []),
        ([(1, 0.3)], []),
        ([(1, 0.2), (2, 0.2)], [(2, 0.2)]),
        ([(1, 0.0), (2, 0.0)], []),
        ([(1, math.nan), (2, math.inf), (3, 0.1)], [(3, math.nan)]),
    ],
)
def test_it_is_always_a_picture(losses: list[tuple[int, float]], held_out: list[tuple[int, float]]) -> None:
    assert loss_chart.draw(losses, held_out, 5).size == loss_chart.SIZE


def test_the_curve_reaches_as_far_as_the_run() -> None:
    losses = [(step, 1 / step) for step in range(1, 51)]
    half = columns_with(np.asarray(loss_chart.draw(losses, [], 100)), (90, 170, 255))
    whole = columns_with(np.asarray(loss_chart.draw(losses, [], 50)), (90, 170, 255))
    assert max(half) < 450 < max(whole)


def test_held_out_losses_are_dots_of_their_own() -> None:
    losses = [(step, 0.5) for step in range(1, 11)]
    without = np.asarray(loss_chart.draw(losses, [], 10))
    with_dots = np.asarray(loss_chart.draw(losses, [(5, 0.6), (10, 0.4)], 10))
    assert not columns_with(without, (255, 170, 60)) and columns_with(with_dots, (255, 170, 60))


def test_smoothing_has_no_bias_at_the_start() -> None:
    assert loss_chart.smoothed([(1, 2.0), (2, 2.0), (3, 2.0)]) == [(1, 2.0), (2, 2.0), (3, 2.0)]
    noisy = [(step, 1 + (-1) ** step) for step in range(200)]
    assert abs(loss_chart.smoothed(noisy)[-1][1] - 1) < 0.2
