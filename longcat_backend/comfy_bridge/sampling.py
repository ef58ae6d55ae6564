"""Schedules and sampling through ComfyUI's own sampler, so that previews, masks and interruption work."""

import logging
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.sample
import comfy.samplers
import torch
from comfy_extras.nodes_custom_sampler import SamplerCustom

from .. import flow, latents
from ..errors import LongCatError
from . import clip, editing, formats, host

NODE = "LongCatSampler"
MAX_SEED = 2**64 - 1  # ComfyUI's

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a flavour's model card names; renormalisation counts for text to image alone."""

    steps: int
    guidance: float
    renorm: bool


def settle(
    model: comfy.model_patcher.ModelPatcher, positive: Any, own: Settings, flavour_defaults: bool = False
) -> Settings:
    """What to sample with: the user's own settings, or those of the MODEL's flavour.

    The flavour's settings are shown on the running node. It is logged where a conditioning or a setting is not what
    the MODEL was made for.

    Raises:
        LongCatError: the MODEL is no LongCat-Image, or its flavour is asked for and not known.
    """
    formats.scheduler_config(model)
    clip.warn_other_flavour(model, NODE, editing.has_reference(values for _, values in positive or ()))
    checkpoint = formats.source(model)
    if not flavour_defaults:
        if checkpoint is not None and checkpoint.flavour.guidance <= 1 < own.guidance:
            warning = _DISTILLED.format(checkpoint.flavour.key, checkpoint.flavour.steps)
            logger.warning("%s: %s", NODE, warning)
            host.show_text(warning)
        return own
    if checkpoint is None:
        raise LongCatError(
            "flavour_defaults is on, but the MODEL was not loaded by LongCatLoader, so its flavour is not known. "
            "Connect LongCatLoader, or switch it off and set steps and guidance: 50 and 4.5, for edit-turbo 8 and 1.",
            "已打开“使用官方设置”，但模型不是由“LongCat 加载器”加载的，无法得知其版本。请连接“LongCat 加载器”，"
            "或关闭该选项并自行设置步数和引导强度：50 和 4.5，edit-turbo 为 8 和 1。",
        )
    flavour = checkpoint.flavour
    host.show_text(f"{flavour.key}: steps 步数 {flavour.steps}, guidance 引导强度 {flavour.guidance:g}")
    return Settings(flavour.steps, flavour.guidance, flavour.renorm)


_DISTILLED = (
    "the checkpoint is LongCat-Image {0}, made for {1} steps without guidance; set guidance to 1, or switch "
    "flavour_defaults on. 该检查点为 {0}，适用于 {1} 步、无引导；请把引导强度设为 1，或打开“使用官方设置”。"
)


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
    editing.require_one_reference(*([values for _, values in conds or ()] for conds in (positive, negative)))
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
