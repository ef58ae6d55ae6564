"""One checkpoint to MODEL, CLIP and VAE."""

from collections.abc import Callable
from functools import lru_cache

import comfy.model_management
import comfy.model_patcher
import comfy.sd

from .. import precision, verification
from ..checkpoints import Checkpoint
from ..memory import GroupOffload
from . import auto, clip, core_engine, devices, diffusers_engine, files, formats, vae

Engine = Callable[..., comfy.model_patcher.ModelPatcher]
ENGINES: dict[str, Engine] = {"core": core_engine.load, "diffusers": diffusers_engine.load}


def verify(name: str, text_encoder_file: str = files.AUTO, vae_file: str = files.AUTO) -> None:
    """Check a checkpoint without reading a weight; again only when one of its files changed.

    Raises:
        LongCatError: the checkpoint cannot be found, identified or built, or its weights do not fit its configs.
    """
    place = files.find(name, text_encoder_file, vae_file)
    _verify(place, place.fingerprint())


@lru_cache(maxsize=16)
def _verify(place: files.Place, fingerprint: str) -> None:
    checkpoint = place.open()
    verification.verify(checkpoint)
    vae.class_config(checkpoint.configs["vae"])


def load(
    name: str,
    engine: str,
    model_precision: str,
    encoder_precision: str,
    tabulate: bool = True,
    offload: GroupOffload | None = None,
    text_encoder_file: str = files.AUTO,
    vae_file: str = files.AUTO,
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of a checkpoint.

    Args:
        engine: a key of ``ENGINES``, or "auto".
        model_precision, encoder_precision: names of presets, or "auto".
        tabulate: keep the modulation weights on the CPU, behind a table.
        offload: let diffusers' group offload move the transformer.
        text_encoder_file, vae_file: for single files, see :func:`files.find`.

    Raises:
        LongCatError: the checkpoint cannot be found, identified or read, its weights do not fit its configs, or the
            settings contradict each other or the device.
    """
    verify(name, text_encoder_file, vae_file)
    checkpoint = files.find(name, text_encoder_file, vae_file).open()
    encoder = load_encoder(checkpoint, encoder_precision)
    return load_model(checkpoint, engine, model_precision, tabulate, offload), encoder, vae.load(checkpoint)


def load_encoder(checkpoint: Checkpoint, precision_name: str) -> comfy.sd.CLIP:
    """The text encoder of a checkpoint as a CLIP.

    Raises:
        LongCatError: see :func:`auto.preset` and :func:`clip.load`.
    """
    policy = devices.policy(comfy.model_management.text_encoder_device())
    preset = auto.preset(checkpoint, "text_encoder", precision_name, precision.ENCODER_PRESETS, policy, tabulate=True)
    dtype = preset.dtype or policy.compute_dtype("text_encoder")
    return clip.load(checkpoint, dtype, preset, keep_stored=auto.keeps_stored(precision_name, dtype))


def load_model(
    checkpoint: Checkpoint,
    engine: str,
    model_precision: str,
    tabulate: bool = True,
    offload: GroupOffload | None = None,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """The transformer of a checkpoint as a MODEL that carries the checkpoint's scheduler config.

    Args:
        disable_dynamic: for ComfyUI, which asks for a twin without dynamic VRAM where it compiles a model.

    Raises:
        LongCatError: see :func:`auto.preset`, :func:`core_engine.load` and :func:`diffusers_engine.load`.
    """
    chosen = auto.engine(engine, model_precision, offload)
    policy = devices.policy()
    preset = auto.preset(checkpoint, "transformer", model_precision, precision.ENGINE_PRESETS[chosen], policy, tabulate)
    dtype = preset.dtype or policy.compute_dtype("transformer")
    patcher = ENGINES[chosen](checkpoint, dtype, preset, tabulate, dynamic=not disable_dynamic, offload=offload)
    formats.attach(patcher, checkpoint)
    patcher.cached_patcher_init = (load_model, (checkpoint, chosen, preset.name, tabulate, offload))
    return patcher
