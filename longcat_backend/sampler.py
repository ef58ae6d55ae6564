"""Sampling with the bare velocity model, where no host samples: while a LoRA is trained, and without ComfyUI."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import flow, latents
from .transformer import VelocityModel


@dataclass(frozen=True)
class Prompt:
    """What is to be drawn, encoded.

    Attributes:
        text, empty: (length, hidden size) of the prompt and of the negative one, with the reference if there is one.
        reference: (16, h, w), scaled, of the picture to edit.
    """

    text: torch.Tensor
    empty: torch.Tensor
    reference: torch.Tensor | None = None


@torch.no_grad()
def sample(
    model: VelocityModel,
    prompt: Prompt,
    size: tuple[int, int],
    seed: int,
    steps: int,
    guidance: float,
    device: torch.device,
    scheduler: Mapping[str, Any] = flow.DEFAULT_SCHEDULER,
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """The latents (1, 16, h, w), scaled, that the official pipeline draws of the same prompt, seed and settings.

    Text to image is renormalised, an edit is not.

    Args:
        size: width and height in pixels.
        guidance: 1 and less is off.
        on_step: called after every step; may raise to stop.
    """
    shape = latents.empty_latent(*size, 1).shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    drawn = noise.to(device)
    references = () if prompt.reference is None else (prompt.reference[None].to(device, model.dtype),)
    texts = [text[None].to(device, model.dtype) for text in (prompt.text, prompt.empty)]
    levels = flow.sigmas(steps, latents.token_count(noise), scheduler).to(device)
    for level, following in zip(levels[:-1], levels[1:], strict=True):
        velocity = _velocity(model, drawn, level, texts, references, guidance)
        drawn = drawn + (following - level) * velocity
        on_step()
    return drawn


def _velocity(
    model: VelocityModel,
    drawn: torch.Tensor,
    level: torch.Tensor,
    texts: Sequence[torch.Tensor],
    references: Sequence[torch.Tensor],
    guidance: float,
) -> torch.Tensor:
    wanted = texts if guidance > 1 else texts[:1]
    given = [model(drawn.to(model.dtype), level[None], text, references).float() for text in wanted]
    if len(given) == 1:
        return given[0]
    return flow.guide(given[0], given[1], guidance, renorm=not references, renorm_min=0.0)
