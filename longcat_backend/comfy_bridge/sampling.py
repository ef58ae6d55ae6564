"""Schedules and sampling through ComfyUI's own sampler, so that previews, masks and interruption work."""

from typing import Any

import comfy.model_patcher
import comfy.sample
import comfy.samplers
import torch
from comfy_extras.nodes_custom_sampler import SamplerCustom

from .. import flow, latents
from . import editing, formats


def schedule(
    model: comfy.model_patcher.ModelPatcher, latent: dict[str, Any], steps: int, denoise: float = 1.0
) -> torch.Tensor:
    """The official sigmas for this model at the latent's size, shape (steps + 1,).

    Raises:
        LongCatError: the MODEL is no LongCat-Image, or the LATENT is another model's.
    """
    config = formats.scheduler_config(model)
    return flow.sigmas(steps, latents.token_count(as_model_latent(model, latent)), config, denoise)


def sample(
    model: comfy.model_patcher.ModelPatcher,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    sigmas: torch.Tensor,
    guidance: float,
    seed: int,
) -> dict[str, Any]:
    """Euler steps from noise of ``seed`` along ``sigmas``; honours the latent's noise mask and batch.

    A guidance below 1 is off like 1, with which ComfyUI saves the unconditional pass.

    Raises:
        LongCatError: the latent holds NaN or infinity, or there are several reference images.
    """
    latents.check_finite(latent["samples"])
    editing.require_one_reference(positive, negative)
    euler = comfy.samplers.sampler_object("euler")
    output = SamplerCustom.execute(model, True, seed, max(guidance, 1.0), positive, negative, euler, sigmas, latent)
    result: dict[str, Any] = output.args[0]
    return result


def as_model_latent(model: comfy.model_patcher.ModelPatcher, latent: dict[str, Any]) -> torch.Tensor:
    """The latent as the sampler will see it: core's empty latents may have other channels or another scale.

    Raises:
        LongCatError: the LATENT is packed or another model's.
    """
    samples: torch.Tensor = latent["samples"]
    if not samples.is_nested and samples.ndim == 4 and samples.numel():
        samples = comfy.sample.fix_empty_latent_channels(model, samples, latent.get("downscale_ratio_spacial"))
    latents.check_unpacked(samples)
    return samples
