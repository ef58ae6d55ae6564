"""What is minimised: the squared error of the predicted velocity at logit-normal noise levels.

Source: ``trainers.md`` (b); the official training script draws mu once for a run, LightX2V once for a batch.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from .. import flow, latents
from .draws import Draw


class Example(Protocol):
    """One encoded picture, see ``encoded.Example``."""

    latent: torch.Tensor  # (16, h, w), scaled
    text: torch.Tensor  # (length, hidden size)
    empty: torch.Tensor  # (length, hidden size), for caption dropout
    reference: torch.Tensor | None  # (16, h, w), scaled, of an edit pair
    mask: torch.Tensor | None  # (1, h, w), weights of the loss above 0


@dataclass(frozen=True)
class Shift:
    """mu of the noise levels: sigma = sigmoid(n + mu) with n ~ N(0, 1).

    Attributes:
        setting: "batch" (mu of each picture's own size, as when it is drawn), "run" (one mu for all), or the
            shift s itself, mu = ln s.
        scheduler: the checkpoint's scheduler config.
        tokens: the mean number of image tokens of the run's pictures, for "run".
    """

    setting: str | float
    scheduler: Mapping[str, Any]
    tokens: float

    def mu(self, latent: torch.Tensor) -> float:
        """For a latent (…, 16, h, w)."""
        if not isinstance(self.setting, str):
            return math.log(self.setting)
        if self.setting == "run":
            return flow.shift(round(self.tokens), self.scheduler)
        return flow.shift(latents.token_count(latent), self.scheduler)


def mean_tokens(buckets: Mapping[tuple[int, int], Sequence[int]]) -> float:
    """Image tokens of a dataset's pictures, on average, from its buckets (width, height) in pixels."""
    counts = [(width * height / latents.GRID**2, len(indices)) for (width, height), indices in buckets.items()]
    return sum(tokens * count for tokens, count in counts) / sum(count for _, count in counts)


@dataclass(frozen=True)
class Sample:
    """A noisy picture and the velocity that is to be predicted of it.

    Attributes:
        noisy, velocity: (16, h, w), fp32.
        text: (length, hidden size), of the caption or of the empty prompt.
        reference: (16, h, w), scaled, of an edit.
        mask: (1, h, w), weights of the loss above 0.
    """

    noisy: torch.Tensor
    sigma: float
    velocity: torch.Tensor
    text: torch.Tensor
    reference: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def sample(example: Example, chance: Draw, shift: Shift, dropout: float) -> Sample:
    """Give an example its noise level, its noise and its caption, or none."""
    sigma = 1 / (1 + math.exp(-(chance.normal + shift.mu(example.latent))))
    level, clean = torch.tensor(sigma), example.latent.float()
    text = example.empty if chance.uniform < dropout else example.text
    noisy = (1 - level) * clean + level * chance.noise
    return Sample(noisy, sigma, chance.noise - clean, text, example.reference, example.mask)


def losses(model: nn.Module, samples: Sequence[Sample], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The loss of each sample, (samples,) in fp32.

    Samples whose latents, texts and references have the same shapes share a forward.

    Args:
        model: :class:`transformer.VelocityModel`.
        dtype: that the model computes in; noise is mixed in and errors are squared in fp32.
    """
    found: list[torch.Tensor | None] = [None] * len(samples)
    for places in _alike(samples):
        for place, loss in zip(places, _forward(model, [samples[i] for i in places], dtype, device), strict=True):
            found[place] = loss
    return torch.stack([loss for loss in found if loss is not None])


def _alike(samples: Sequence[Sample]) -> Iterable[list[int]]:
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, each in enumerate(samples):
        key = (each.noisy.shape, each.text.shape, None if each.reference is None else each.reference.shape)
        groups.setdefault(key, []).append(place)
    return groups.values()


def _forward(model: nn.Module, samples: Sequence[Sample], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    noisy = torch.stack([each.noisy for each in samples]).to(device).to(dtype)  # converted where that is quick
    sigma = torch.tensor([each.sigma for each in samples], device=device)
    text = torch.stack([each.text for each in samples]).to(device).to(dtype)
    given = [each.reference for each in samples if each.reference is not None]
    references = (torch.stack(given).to(device).to(dtype),) if given else ()
    wanted = torch.stack([each.velocity for each in samples]).to(device)
    errors = (model(noisy, sigma, text, references).float() - wanted).square()
    return torch.stack([_weighted(error, each.mask) for error, each in zip(errors, samples, strict=True)])


def _weighted(errors: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of (16, h, w), by the weights of a mask (1, h, w)."""
    if mask is None:
        return errors.mean()
    weights = mask.to(errors).expand_as(errors)
    return (weights * errors).sum() / weights.sum()
