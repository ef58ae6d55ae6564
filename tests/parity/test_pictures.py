"""The same seed gives the picture of the reference pipeline, through both engines."""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from longcat_pack.longcat_backend import latents
from longcat_pack.longcat_backend.comfy_bridge import clip as clip_bridge
from longcat_pack.longcat_backend.comfy_bridge import guidance, sampling
from longcat_pack.longcat_backend.comfy_bridge import vae as vae_bridge
from parity import reference as ref

PROMPT = "a small yellow circle at the top on a purple background"
STEPS = 20
SEED = 7
GUIDANCE = [(1.0, True), (4.5, True), (4.5, False)]
CASES = [((*size, 1), *guided) for size in ((128, 128), (192, 128), (256, 256)) for guided in GUIDANCE]
CASES += [((128, 128, 2), *guided) for guided in GUIDANCE]
LATENT_TOLERANCE = 1e-4
PIXEL_TOLERANCE = 1e-3


@functools.cache
def reference_latents(pipe: Any, size: tuple[int, int], scale: float, renorm: bool, batch: int) -> torch.Tensor:
    width, height = size
    return ref.draw(
        pipe,
        PROMPT,
        seed=SEED,
        output="latent",
        width=width,
        height=height,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        enable_cfg_renorm=renorm,
        num_images_per_prompt=batch,
    )


def reference_pixels(pipe: Any, packed: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The end of the pipeline's __call__: unpack, unscale, decode; (batch, height, width, 3) in 0..1."""
    width, height = size
    config = pipe.vae.config
    samples = pipe._unpack_latents(packed, height, width, pipe.vae_scale_factor)
    with torch.no_grad():
        decoded = pipe.vae.decode(samples / config.scaling_factor + config.shift_factor).sample
    return pipe.image_processor.postprocess(decoded, output_type="pt").movedim(1, -1)


@pytest.mark.parametrize("engine", ["core", "diffusers"])
@pytest.mark.parametrize(("shape", "scale", "renorm"), CASES, ids=str)
@torch.inference_mode()
def test_full_run_equals_the_pipeline(
    engine: str, shape: tuple[int, int, int], scale: float, renorm: bool, loaded: Any, reference: Any
) -> None:
    *size, batch = shape
    model, clip, vae = loaded(engine)
    expected = reference_latents(reference, tuple(size), scale, renorm, batch)

    positive, _ = clip_bridge.encode(clip, PROMPT)
    negative, _ = clip_bridge.encode(clip, "")
    latent = {"samples": latents.empty_latent(*size, batch)}
    patched = guidance.patch(model, renorm=renorm)
    sigmas = sampling.schedule(patched, latent, STEPS)
    drawn = sampling.sample(patched, positive, negative, latent, sigmas, scale, SEED)["samples"]

    packed = latents.pack(model.model.process_latent_in(drawn))
    assert (packed - expected).norm() / expected.norm() <= LATENT_TOLERANCE
    pixels = vae_bridge.decode(vae, drawn, tiled=False)
    assert (pixels - reference_pixels(reference, expected, size)).abs().max() <= PIXEL_TOLERANCE
    from_packed = vae_bridge.decode(vae, packed, False, *size)
    assert torch.allclose(from_packed, pixels, atol=1e-5)


@torch.inference_mode()
def test_both_engines_draw_a_latent_with_odd_sides_alike(loaded: Any) -> None:
    """Core's VAEEncode makes such latents of pictures whose sides are multiples of 8 only."""
    drawn = []
    for engine in ("core", "diffusers"):
        model, clip, _ = loaded(engine)
        positive, _ = clip_bridge.encode(clip, PROMPT)
        negative, _ = clip_bridge.encode(clip, "")
        canvas = {"samples": torch.zeros(1, latents.CHANNELS, 17, 15)}
        patched = guidance.patch(model)
        sigmas = sampling.schedule(patched, canvas, 4)
        drawn.append(sampling.sample(patched, positive, negative, canvas, sigmas, 4.5, SEED)["samples"])
    core, diffusers = drawn
    assert core.shape == (1, latents.CHANNELS, 17, 15)
    assert (core - diffusers).norm() / core.norm() <= LATENT_TOLERANCE
