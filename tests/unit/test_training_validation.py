"""The held-out loss: fixed noise at five fixed noise levels, with the pictures' own captions."""

import math

import pytest
import tiny_training as tiny
import torch
from torch import nn

from longcat_pack.longcat_backend import flow
from longcat_pack.longcat_backend.training import validation
from longcat_pack.longcat_backend.training.objective import Shift

CPU = torch.device("cpu")
# Where the law N(0, 1) has passed 10, 30, 50, 70 and 90 %, from a table.
NORMALS = (-1.281552, -0.524401, 0.0, 0.524401, 1.281552)
CALLS = 2 * len(NORMALS)  # of two pictures


class Recording(nn.Module):
    """Predicts no velocity at all, and keeps what it was asked."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[torch.Tensor, float, torch.Tensor]] = []

    def forward(
        self, noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, references: tuple[()]
    ) -> torch.Tensor:
        self.asked.append((noisy[0], float(sigma), text[0]))
        return torch.zeros_like(noisy)


def measured(shift: Shift, seed: int = 0) -> tuple[float, Recording, tiny.Pictures]:
    """Of a square picture and a wider one, in a run that drops every caption while it trains."""
    data, model = tiny.pictures(held_out=(4, 6), dropout=1.0), Recording()
    return validation.held_out_loss(model, data, shift, seed, CPU), model, data  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", ["batch", 3.0])
def test_noise_levels_are_the_quantiles_of_trainings_own_law(setting: str | float) -> None:
    _, model, _ = measured(Shift(setting, flow.DEFAULT_SCHEDULER, 0.0))
    tokens = (4, 8)  # of 4 x 4 and 4 x 8 latent pixels
    for place, (noisy, sigma, _) in enumerate(model.asked):
        picture, level = divmod(place, len(NORMALS))
        assert noisy.shape[1] * noisy.shape[2] // 4 == tokens[picture]
        mu = math.log(3.0) if setting == 3.0 else flow.shift(tokens[picture], flow.DEFAULT_SCHEDULER)
        assert sigma == pytest.approx(1 / (1 + math.exp(-(NORMALS[level] + mu))), abs=1e-6)
    assert len(model.asked) == CALLS


def test_chance_has_no_part_in_it() -> None:
    """No caption is dropped; a picture has one noise, at all levels and whenever it is measured."""
    shift = Shift("batch", flow.DEFAULT_SCHEDULER, 0.0)
    loss, first, data = measured(shift)
    again, second, _ = measured(shift)
    assert again == loss
    noises = []
    for place, ((noisy, sigma, text), (same, _, _)) in enumerate(zip(first.asked, second.asked, strict=True)):
        example = data[data.held_out[place // len(NORMALS)]]
        assert torch.equal(noisy, same)
        assert torch.equal(text, example.text)
        noises.append((noisy - (1 - sigma) * example.latent) / sigma)
        torch.testing.assert_close(noises[-1], noises[place // len(NORMALS) * len(NORMALS)], atol=1e-4, rtol=0)
    examples = [data[index] for index in data.held_out for _ in NORMALS]
    errors = [(noise - example.latent).square().mean() for noise, example in zip(noises, examples, strict=True)]
    assert loss == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)
    assert measured(shift, seed=1)[0] != loss
