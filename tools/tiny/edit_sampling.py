"""Edit many pictures at once with the official edit sampler's arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import LongCatImageEditPipeline

from tools.tiny.conditioning import TEXT_SLOTS
from tools.tiny.edit_conditioning import (
    PictureEncoder,
    edit_position_ids,
    encode_instructions,
    picture_patches,
    tokenize_instructions,
)
from tools.tiny.sampling import LATENT_SIDE, TOKEN_SIDE, pack, shift_mu
from tools.tiny.vae import encode_means


def edit_sigmas(pipeline: LongCatImageEditPipeline, steps: int) -> list[float]:
    """The noise levels of a run at 128 px, from 1 to 0: (steps + 1)."""
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift_mu(pipeline, TOKEN_SIDE**2))
    return pipeline.scheduler.sigmas.tolist()


@torch.no_grad()
def reference_tokens(pipeline: LongCatImageEditPipeline, pictures: torch.Tensor) -> torch.Tensor:
    """Packed, scaled latents (N, 64, 64) fp32 of pictures uint8 (N, 128, 128, 3)."""
    config, pixels = pipeline.vae.config, pictures.to(pipeline.vae.device).permute(0, 3, 1, 2) / 127.5 - 1
    means = torch.cat([encode_means(pipeline.vae, part) for part in pixels.split(256)])
    return pack((means - config.shift_factor) * config.scaling_factor)


@torch.no_grad()
def sample_edits(
    pipeline: LongCatImageEditPipeline,
    pictures: Sequence[np.ndarray],
    instructions: Sequence[str],
    *,
    steps: int = 20,
    guidance: float = 4.5,
    first_seed: int = 0,
) -> torch.Tensor:
    """Packed, scaled latents (N, 64, 64) of pictures uint8 (128, 128, 3), edited; the seeds count up from the first.

    Guidance is the pipeline's: no renorm, and one forward a step where it is 1 or less.
    """
    device, count, texts = pipeline.transformer.device, len(pictures), list(instructions)
    reference = reference_tokens(pipeline, torch.from_numpy(np.stack(pictures)))
    seen = PictureEncoder(pipeline)(picture_patches(pipeline.image_processor_vl, pictures).to(device))
    if guidance > 1:
        texts, seen, reference = [*texts, *[""] * count], seen.repeat(2, 1, 1), reference.repeat(2, 1, 1)
    rows = tokenize_instructions(pipeline, texts).to(device)
    text = encode_instructions(pipeline.text_encoder, rows, seen, TEXT_SLOTS)
    txt_ids, img_ids = edit_position_ids(TEXT_SLOTS, TOKEN_SIDE, device)
    shape = (1, 16, LATENT_SIDE, LATENT_SIDE)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(first_seed + i)) for i in range(count)]
    latents = pack(torch.cat(noise).to(device))
    sigmas = edit_sigmas(pipeline, steps)
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        canvas = latents.repeat(len(texts) // count, 1, 1)
        timestep = torch.full((len(texts),), sigma, device=device)
        tokens = torch.cat([canvas, reference], dim=1)
        velocity = pipeline.transformer(tokens, text, timestep, img_ids, txt_ids, return_dict=False)[0]
        velocity = velocity[:, : latents.shape[1]].float()
        if guidance > 1:
            cond, uncond = velocity.chunk(2)
            velocity = uncond + guidance * (cond - uncond)
        latents = latents + (following - sigma) * velocity
    return latents
