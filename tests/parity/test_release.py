"""A model that was used goes with its last reference: its weights don't wait for the garbage collector."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from longcat_pack.longcat_backend import precision
from longcat_pack.longcat_backend.comfy_bridge import clip as clip_bridge
from longcat_pack.longcat_backend.comfy_bridge import devices, guidance, host, loading, sampling
from longcat_pack.longcat_backend.comfy_bridge import vae as vae_bridge

ENGINES = [(engine, name, "bf16") for engine, names in precision.ENGINE_PRESETS.items() for name in names]
ENCODERS = [("core", "bf16", name) for name in precision.ENCODER_PRESETS]


@pytest.fixture(scope="module")
def libraries(comfy_dir: Any) -> None:
    """quanto keeps the frames in which it first looked for its kernels, until they are collected."""
    host.register_model_folder()
    with torch.inference_mode():
        used_parts("diffusers", "int8-quanto", "bf16")


@pytest.fixture
def no_collector(libraries: None) -> Iterator[None]:
    """Only counted references free anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def supported() -> list[tuple[str, str, str]]:
    policy = devices.policy(torch.device("cpu"))
    return [case for case in ENGINES + ENCODERS if all(policy.supports(precision.PRESETS[name]) for name in case[1:])]


def used_parts(engine: str, name: str, encoder: str) -> dict[str, Any]:
    """Weak references to the layers of a checkpoint that has drawn a picture."""
    model, clip, vae = loading.load("LongCat-Tiny", engine, name, encoder)
    positive, _ = clip_bridge.encode(clip, "a red star")
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    patched = guidance.patch(model)
    sigmas = sampling.schedule(patched, latent, 2)
    drawn = sampling.sample(patched, positive, positive, latent, sigmas, 4.5, 1)
    vae_bridge.decode(vae, drawn["samples"], tiled=False)
    parts = {"model": model.model, "text encoder": clip.cond_stage_model, "vae": vae.first_stage_model}
    return {f"{part} {name}": weakref.ref(layer) for part, module in parts.items() for name, layer in layers(module)}


def layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Those that hold weights of their own, and the module itself."""
    return [("", module), *((name, layer) for name, layer in module.named_modules() if layer._parameters)]


@pytest.mark.parametrize(("engine", "name", "encoder"), supported())
@torch.inference_mode()
def test_a_used_model_goes_with_its_last_reference(no_collector: None, engine: str, name: str, encoder: str) -> None:
    import comfy.model_management

    parts = used_parts(engine, name, encoder)
    comfy.model_management.cleanup_models()
    assert [part for part, module in parts.items() if module() is not None] == []
