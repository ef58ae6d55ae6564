"""What both engines tell ComfyUI about a checkpoint: latent scaling, default shift, and its own configs."""

from collections.abc import Mapping
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models_base
import torch

from .. import flow
from ..checkpoints import Checkpoint
from ..errors import LongCatError
from ..precision import Preset

_ATTACHMENT = "longcat_scheduler"
_SOURCE = "longcat_checkpoint"
_PRESET = "longcat_precision"


def configure(config: comfy.supported_models_base.BASE, checkpoint: Checkpoint) -> None:
    """Set latent scale and shift from the VAE's config, and the sampler's shift from the scheduler's."""
    config.latent_format.scale_factor = checkpoint.configs["vae"]["scaling_factor"]
    config.latent_format.shift_factor = checkpoint.configs["vae"]["shift_factor"]
    scheduler = {**flow.DEFAULT_SCHEDULER, **checkpoint.configs["scheduler"]}
    config.sampling_settings["shift"] = scheduler["max_shift"]


def attach(patcher: comfy.model_patcher.ModelPatcher, checkpoint: Checkpoint) -> None:
    """Let the scheduler config and the source travel with the MODEL, through clones too."""
    patcher.set_attachments(_ATTACHMENT, dict(checkpoint.configs["scheduler"]))
    attach_source(patcher, checkpoint)


def attach_source(patcher: comfy.model_patcher.ModelPatcher, checkpoint: Checkpoint) -> None:
    """Let a MODEL, CLIP or VAE know what it was loaded from: its configs, and where its files were."""
    patcher.set_attachments(_SOURCE, checkpoint)


def source(patcher: comfy.model_patcher.ModelPatcher) -> Checkpoint | None:
    """The checkpoint that a component was loaded from; None if core's own loader brought it."""
    checkpoint: Checkpoint | None = patcher.get_attachment(_SOURCE)
    return checkpoint


def attach_preset(patcher: comfy.model_patcher.ModelPatcher, preset: Preset) -> None:
    """Let a MODEL or CLIP know the precision that it was loaded in."""
    patcher.set_attachments(_PRESET, preset)


def preset(patcher: comfy.model_patcher.ModelPatcher) -> Preset | None:
    """The precision that LongCatLoader loaded a MODEL or CLIP in; None if another loader brought it."""
    attached: Preset | None = patcher.get_attachment(_PRESET)
    return attached


def scheduler_config(patcher: comfy.model_patcher.ModelPatcher | None) -> Mapping[str, Any]:
    """The scheduler config of a MODEL; the official one for a LongCat that core's own loader brought.

    Raises:
        LongCatError: the MODEL is no LongCat-Image.
    """
    if patcher is None or not isinstance(patcher.model, comfy.model_base.LongCatImage):
        found = "nothing" if patcher is None else type(patcher.model).__name__
        raise LongCatError(
            f"This node needs a LongCat-Image model, but the MODEL is {found}. Connect the MODEL of LongCatLoader.",
            f"该节点需要 LongCat-Image 模型，但接入的 MODEL 是 {found}。请连接 LongCatLoader 的 MODEL。",
        )
    config: Mapping[str, Any] | None = patcher.get_attachment(_ATTACHMENT)
    return flow.DEFAULT_SCHEDULER if config is None else config


def schedule(transformer_options: Mapping[str, Any] | None) -> torch.Tensor | None:
    """The noise levels of the run, (steps,), where the sampler tells them."""
    levels: torch.Tensor | None = (transformer_options or {}).get("sample_sigmas")
    return None if levels is None else levels[levels > 0]
