"""The maths of sampling: resolution-dependent shift, sigmas, guidance and its renormalisation.

Source: ``LongCatImagePipeline.__call__`` and ``calculate_shift`` in diffusers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from . import latents
from .errors import LongCatError

# The official scheduler, for a LongCat model that came without a folder.
DEFAULT_SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
NORM_EPSILON = 1e-8
LEAST_DENOISE = 0.01


def shift(tokens: int, config: Mapping[str, Any]) -> float:
    """mu, linear in the number of image tokens: 0.63 at 512², 1.15 at 1024², 3.23 at 2048² for the official config."""
    values = {**DEFAULT_SCHEDULER, **config}
    slope = (values["max_shift"] - values["base_shift"]) / (values["max_image_seq_len"] - values["base_image_seq_len"])
    return float(values["base_shift"] + slope * (tokens - values["base_image_seq_len"]))


def check_denoise(denoise: float) -> None:
    """Refuse a denoise whose whole schedule could not be computed.

    Raises:
        LongCatError: it is neither 0 nor between 0.01 and 1, so the schedule would have over 100 times the steps.
    """
    if denoise != 0 and not LEAST_DENOISE <= denoise <= 1:
        raise LongCatError(
            f"denoise is {denoise}. Set it to 0, or between {LEAST_DENOISE} and 1.",
            f"denoise 为 {denoise}。请设为 0，或 {LEAST_DENOISE} 到 1。",
        )


def sigmas(steps: int, tokens: int, config: Mapping[str, Any], denoise: float = 1.0) -> torch.Tensor:
    """The noise levels of a run, from high to 0, shape (steps + 1,).

    Args:
        tokens: image tokens, see :func:`latents.token_count`.
        config: the checkpoint's scheduler config.
        denoise: the share of the schedule to run, as in ComfyUI's BasicScheduler: its last ``steps`` levels
            of ``int(steps / denoise)``. 0 gives no step at all.

    Raises:
        LongCatError: see :func:`check_denoise`.
    """
    check_denoise(denoise)
    if denoise == 0:
        return torch.zeros(0)
    total = int(steps / denoise)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config({**DEFAULT_SCHEDULER, **config})
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / total, total), mu=shift(tokens, config))
    return scheduler.sigmas[-(steps + 1) :].float().cpu()


def guide(
    cond: torch.Tensor,
    uncond: torch.Tensor,
    guidance: float,
    renorm: bool,
    renorm_min: float,
) -> torch.Tensor:
    """Classifier-free guidance of the velocity, with LongCat's renormalisation.

    Renormalisation shrinks each packed token of the guided velocity to at most the length of the conditional
    one: the L2 norm is over the token's 64 channels and the ratio is clamped to [renorm_min, 1].

    Args:
        cond, uncond: velocities (batch, 16, h, w), unpacked.
    """
    velocity = uncond + guidance * (cond - uncond)
    if not renorm:
        return velocity
    ratio = _token_norm(cond) / (_token_norm(velocity) + NORM_EPSILON)
    scale = ratio.clamp(renorm_min, 1.0)
    height, width = velocity.shape[-2:]
    per_pixel = scale.repeat_interleave(latents.PATCH, -2).repeat_interleave(latents.PATCH, -1)
    return velocity * per_pixel[..., :height, :width]


def _token_norm(velocity: torch.Tensor) -> torch.Tensor:
    """(batch, 1, ceil(h/2), ceil(w/2)): L2 norm of each 2×2 patch over all channels."""
    height, width = velocity.shape[-2:]
    padded = torch.nn.functional.pad(velocity, (0, width % latents.PATCH, 0, height % latents.PATCH))
    patches = padded.unfold(-2, latents.PATCH, latents.PATCH).unfold(-2, latents.PATCH, latents.PATCH)
    return torch.linalg.vector_norm(patches, dim=(1, -2, -1)).unsqueeze(1)


def model_timestep(sigma: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The timestep as the pipeline hands it to the transformer: sigma in 0..1, rounded twice in the compute dtype.

    The rounding (1,248 distinct values in bf16) is part of how the model was trained; do not "fix" it.
    """
    return (sigma.float() * 1000).to(dtype) / 1000
