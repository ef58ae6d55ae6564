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


def check(
    name: str,
    engine: str,
    model_precision: str | None,
    encoder_precision: str | None,
    offload: GroupOffload | None,
    text_encoder_file: str = files.AUTO,
    vae_file: str = files.AUTO,
) -> None:
    """Check a checkpoint and the choices for it without reading a weight; see :func:`load`.

    Args:
        model_precision, encoder_precision: None is not known yet.

    Raises:
        LongCatError: see :func:`verify`, :func:`auto.settled` and :func:`auto.engine`.
    """
    verify(name, text_encoder_file, vae_file)
    checkpoint = files.find(name, text_encoder_file, vae_file).open()
    settled = auto.settled(checkpoint, "transformer", model_precision or precision.AUTO, engine)
    auto.engine(engine, settled, offload)
    auto.settled(checkpoint, "text_encoder", encoder_precision or precision.AUTO)


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
    check(name, engine, model_precision, encoder_precision, offload, text_encoder_file, vae_file)
    checkpoint = files.find(name, text_encoder_file, vae_file).open()
    encoder = load_encoder(checkpoint, encoder_precision)
    return load_model(checkpoint, engine, model_precision, tabulate, offload), encoder, vae.load(checkpoint)


def load_encoder(checkpoint: Checkpoint, precision_name: str) -> comfy.sd.CLIP:
    """The text encoder of a checkpoint as a CLIP.

    Raises:
        LongCatError: see :func:`auto.settled`, :func:`auto.preset`, :func:`auto.dtype` and :func:`clip.load`.
    """
    policy = devices.policy(comfy.model_management.text_encoder_device())
    name = auto.settled(checkpoint, "text_encoder", precision_name)
    preset = auto.preset(checkpoint, "text_encoder", name, precision.ENCODER_PRESETS, policy, tabulate=True)
    dtype = auto.dtype(checkpoint, "text_encoder", preset, policy)
    encoder = clip.load(checkpoint, dtype, preset, keep_stored=auto.keeps_stored(name, dtype))
    formats.attach_preset(encoder.patcher, preset)
    return encoder


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
        LongCatError: see :func:`auto.settled`, :func:`auto.preset`, :func:`auto.dtype`, :func:`core_engine.load` and
            :func:`diffusers_engine.load`.
    """
    name = auto.settled(checkpoint, "transformer", model_precision, engine)
    chosen = auto.engine(engine, name, offload)
    policy = devices.policy()
    preset = auto.preset(checkpoint, "transformer", name, precision.ENGINE_PRESETS[chosen], policy, tabulate)
    dtype = auto.dtype(checkpoint, "transformer", preset, policy)
    patcher = ENGINES[chosen](checkpoint, dtype, preset, tabulate, dynamic=not disable_dynamic, offload=offload)
    formats.attach(patcher, checkpoint)
    formats.attach_preset(patcher, preset)
    patcher.cached_patcher_init = (load_model, (checkpoint, chosen, preset.name, tabulate, offload))
    return patcher
