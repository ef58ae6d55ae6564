"""One checkpoint to MODEL, CLIP and VAE."""

from functools import lru_cache
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from .. import checkpoints, precision, verification
from ..checkpoints import Checkpoint
from . import clip, core_engine, diffusers_engine, formats, host, vae

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
    encoder = clip.load(checkpoint, encoder_dtype(encoder_precision))
    return load_model(checkpoint, engine, model_precision), encoder, vae.load(checkpoint)


def load_model(checkpoint: Checkpoint, engine: str, model_precision: str) -> comfy.model_patcher.ModelPatcher:
    """The transformer of a checkpoint as a MODEL that carries the checkpoint's scheduler config.

    Raises:
        LongCatError: see :func:`transformer.audited_weights`.
    """
    chosen = DEFAULT_ENGINE if engine == precision.AUTO else engine
    patcher = ENGINES[chosen](checkpoint, model_dtype(model_precision))
    formats.attach(patcher, checkpoint)
    patcher.cached_patcher_init = (load_model, (checkpoint, engine, model_precision))
    return patcher


def model_dtype(choice: str) -> torch.dtype:
    """The dtype of a precision choice; auto is the best that the device computes in: bf16, else fp16, else fp32."""
    dtype: torch.dtype = precision.DTYPES.get(choice) or comfy.model_management.unet_dtype(
        supported_dtypes=[torch.bfloat16, torch.float16, torch.float32]
    )
    return dtype


def encoder_dtype(choice: str) -> torch.dtype:
    """The dtype of a precision choice for the encoder; auto is bf16, or fp32 on a device without it."""
    if choice != precision.AUTO:
        return precision.DTYPES[choice]
    device = comfy.model_management.text_encoder_device()
    return torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float32
