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
    """One example with what it got by chance."""

    example: Example
    sigma: float
    noise: torch.Tensor  # (16, h, w)
    dropped: bool = False

    @property
    def text(self) -> torch.Tensor:
        """Embeddings (length, hidden size) of the caption, or of the empty prompt."""
        return self.example.empty if self.dropped else self.example.text


def sample(example: Example, chance: Draw, shift: Shift, dropout: float) -> Sample:
    """Give an example its noise level, its noise and its caption, or none."""
    sigma = 1 / (1 + math.exp(-(chance.normal + shift.mu(example.latent))))
    return Sample(example, sigma, chance.noise, chance.uniform < dropout)


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
        reference = each.example.reference
        key = (each.example.latent.shape, each.text.shape, None if reference is None else reference.shape)
        groups.setdefault(key, []).append(place)
    return groups.values()


def _forward(model: nn.Module, samples: Sequence[Sample], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    clean = torch.stack([each.example.latent for each in samples]).to(device, torch.float32)
    noise = torch.stack([each.noise for each in samples]).to(device)
    sigma = torch.tensor([each.sigma for each in samples], device=device)
    level = sigma.view(-1, 1, 1, 1)
    noisy = ((1 - level) * clean + level * noise).to(dtype)
    text = torch.stack([each.text for each in samples]).to(device, dtype)
    given = [each.example.reference for each in samples if each.example.reference is not None]
    references = (torch.stack(given).to(device, dtype),) if given else ()
    velocity = model(noisy, sigma, text, references)
    errors = (velocity.float() - (noise - clean)).square()
    return torch.stack([_weighted(error, each.example.mask) for error, each in zip(errors, samples, strict=True)])


def _weighted(errors: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of (16, h, w), by the weights of a mask (1, h, w)."""
    if mask is None:
        return errors.mean()
    weights = mask.to(errors).expand_as(errors)
    return (weights * errors).sum() / weights.sum()
