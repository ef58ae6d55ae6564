"""Draw many prompts at once with the official sampler's arithmetic, and score what was drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import LongCatImagePipeline
from diffusers.pipelines.longcat_image.pipeline_longcat_image import calculate_shift

from tests.scoring.reading import score_character
from tests.scoring.scenes import IMAGE_SIZE, Scene
from tests.scoring.score import score_image, summarise
from tools.tiny.conditioning import TEXT_SLOTS, encode, position_ids, tokenize

LATENT_SIDE = IMAGE_SIZE // 8
TOKEN_SIDE = LATENT_SIDE // 2


def shift_mu(pipeline: LongCatImagePipeline, tokens: int) -> float:
    """The log of the schedule's shift for a picture of `tokens` image tokens, from the scheduler's settings."""
    config = pipeline.scheduler.config
    return calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, 16, h, w) to tokens (B, h * w / 4, 64)."""
    return LongCatImagePipeline._pack_latents(latents, *latents.shape)


def guided_velocity(cond: torch.Tensor, uncond: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance with the pipeline's renorm over the packed channels, ratio clamped to [0, 1]."""
    velocity = uncond + guidance * (cond - uncond)
    ratio = cond.norm(dim=-1, keepdim=True) / (velocity.norm(dim=-1, keepdim=True) + 1e-8)
    return velocity * ratio.clamp(0.0, 1.0)


@torch.no_grad()
def sample(
    pipeline: LongCatImagePipeline,
    prompts: Sequence[str],
    *,
    steps: int = 20,
    guidance: float = 4.0,
    seed: int = 0,
    slots: int = TEXT_SLOTS,
) -> np.ndarray:
    """Pictures (N, 128, 128, 3) uint8 of `prompts`, one Euler trajectory each, on the pipeline's device."""
    device, count = pipeline.transformer.device, len(prompts)
    rows = tokenize(pipeline, [*prompts, ""]).to(device)
    text = encode(pipeline.text_encoder, rows, slots)
    text = torch.cat([text[:-1], text[-1:].expand(count, -1, -1)])
    txt_ids, img_ids = position_ids(slots, TOKEN_SIDE, device)
    noise = torch.randn(count, 16, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(seed))
    latents = pack(noise.to(device))
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift_mu(pipeline, latents.shape[1]))
    sigmas = pipeline.scheduler.sigmas.tolist()
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        timestep = torch.full((2 * count,), sigma, device=device)
        velocity = pipeline.transformer(
            torch.cat([latents, latents]), text, timestep, img_ids, txt_ids, return_dict=False
        )[0]
        cond, uncond = velocity.float().chunk(2)
        latents = latents + (following - sigma) * guided_velocity(cond, uncond, guidance)
    return decode(pipeline, latents)


@torch.no_grad()
def decode(pipeline: LongCatImagePipeline, tokens: torch.Tensor) -> np.ndarray:
    """Scaled tokens (N, 64, 64) to pictures (N, 128, 128, 3) uint8."""
    vae = pipeline.vae
    latents = pipeline._unpack_latents(tokens, IMAGE_SIZE, IMAGE_SIZE, pipeline.vae_scale_factor)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    pictures = torch.cat([vae.decode(part).sample for part in latents.to(vae.dtype).split(50)]).float()
    return (pictures.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def score(pictures: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of pictures with each attribute right."""
    return summarise([score_image(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)])


def score_characters(pictures: np.ndarray, scenes: Sequence[Scene]) -> float:
    """Share of pictures with the right character on the shape."""
    right = [score_character(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    return sum(right) / len(right)
