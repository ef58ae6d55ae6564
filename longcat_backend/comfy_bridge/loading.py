"""One checkpoint to MODEL, CLIP and VAE."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from .. import checkpoints, precision, verification
from ..checkpoints import Checkpoint
from ..devices import DevicePolicy
from ..precision import Preset
from . import clip, core_engine, devices, diffusers_engine, formats, host, vae

ENGINES = {"core": core_engine.load, "diffusers": diffusers_engine.load}
DEFAULT_ENGINE = "core"


def find(name: str) -> Path:
    """The folder of a checkpoint name.

    Raises:
        LongCatError: see :func:`checkpoints.resolve_checkpoint`.
    """
    return checkpoints.resolve_checkpoint(name, host.checkpoint_roots())


def verify(name: str) -> None:
    """Check a checkpoint without reading a weight; again only when one of its files changed.

    Raises:
        LongCatError: the checkpoint cannot be found, identified or built, or its weights do not fit its configs.
    """
    folder = find(name)
    _verify(folder, checkpoints.fingerprint(folder))


@lru_cache(maxsize=16)
def _verify(folder: Path, fingerprint: str) -> None:
    checkpoint = checkpoints.open_checkpoint(folder)
    verification.verify(checkpoint)
    vae.class_config(checkpoint.configs["vae"])


def load(
    name: str, engine: str, model_precision: str, encoder_precision: str
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of a checkpoint.

    Raises:
        LongCatError: the checkpoint cannot be found, identified or read, or its weights do not fit its configs.
    """
    verify(name)
    checkpoint = checkpoints.open_checkpoint(find(name))
    encoder = load_encoder(checkpoint, encoder_precision)
    return load_model(checkpoint, engine, model_precision), encoder, vae.load(checkpoint)


def load_encoder(checkpoint: Checkpoint, precision_name: str) -> comfy.sd.CLIP:
    """The text encoder of a checkpoint as a CLIP.

    Raises:
        LongCatError: see :func:`clip.load`.
    """
    policy = devices.policy(comfy.model_management.text_encoder_device())
    dtype = policy.compute_dtype("text_encoder")
    preset = _preset(precision_name, precision.ENCODER_PRESETS, dtype, policy)
    return clip.load(checkpoint, preset.dtype or dtype, preset)


def load_model(
    checkpoint: Checkpoint, engine: str, model_precision: str, tabulate: bool = True
) -> comfy.model_patcher.ModelPatcher:
    """The transformer of a checkpoint as a MODEL that carries the checkpoint's scheduler config.

    Raises:
        LongCatError: see :func:`core_engine.load` and :func:`diffusers_engine.load`.
    """
    chosen = DEFAULT_ENGINE if engine == precision.AUTO else engine
    policy = devices.policy()
    dtype = policy.compute_dtype("transformer")
    preset = _preset(model_precision, precision.ENGINE_PRESETS[chosen], dtype, policy)
    patcher = ENGINES[chosen](checkpoint, preset.dtype or dtype, preset, tabulate)
    formats.attach(patcher, checkpoint)
    patcher.cached_patcher_init = (load_model, (checkpoint, engine, model_precision, tabulate))
    return patcher


def _preset(name: str, allowed: Sequence[str], dtype: torch.dtype, policy: DevicePolicy) -> Preset:
    if name == precision.AUTO:
        return next(preset for preset in precision.PRESETS.values() if preset.dtype == dtype)
    preset = precision.preset(name, allowed)
    policy.require(preset, allowed)
    return preset
