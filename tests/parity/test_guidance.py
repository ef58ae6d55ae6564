"""Guidance only where it is wanted: the interval, its saving, and a guidance of 1 and less."""

from typing import Any

import pytest
import torch

from longcat_pack.longcat_backend import latents
from longcat_pack.longcat_backend.comfy_bridge import clip as clip_bridge
from longcat_pack.longcat_backend.comfy_bridge import guidance, sampling

STEPS = 4


@pytest.fixture(scope="module")
def parts(loaded: Any) -> tuple[Any, Any, Any]:
    model, clip, _ = loaded("diffusers")
    return model, clip_bridge.encode(clip, "红圆")[0], clip_bridge.encode(clip, "")[0]


@torch.inference_mode()
def run(parts: tuple[Any, Any, Any], model: Any, scale: float) -> tuple[torch.Tensor, list[int]]:
    """The sampled latent, and how many latents each forward of the network had."""
    original, positive, negative = parts
    batches: list[int] = []
    network = original.model.diffusion_model
    hook = network.register_forward_pre_hook(lambda _, args: batches.append(args[0].shape[0]))
    canvas = {"samples": latents.empty_latent(128, 128, 1)}
    sigmas = sampling.schedule(model, canvas, STEPS)
    try:
        drawn = sampling.sample(model, positive, negative, canvas, sigmas, scale, seed=0)["samples"]
    finally:
        hook.remove()
    return drawn, batches


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_a_guidance_of_one_and_less_is_the_conditional_alone_in_half_the_passes(parts: Any, scale: float) -> None:
    drawn, batches = run(parts, guidance.patch(parts[0]), scale)
    assert batches == [1] * STEPS
    never, _ = run(parts, guidance.patch(parts[0], end_percent=0.0, start_percent=1.0), 4.5)
    assert torch.allclose(drawn, never, atol=1e-5)


def test_outside_the_interval_the_unconditional_pass_is_saved(parts: Any) -> None:
    full, batches = run(parts, guidance.patch(parts[0]), 4.5)
    assert batches == [2] * STEPS
    part, batches = run(parts, guidance.patch(parts[0], end_percent=0.5), 4.5)
    assert 0 < batches.count(1) < STEPS
    assert batches == sorted(batches, reverse=True)
    assert not torch.allclose(full, part, atol=1e-3)


def test_the_sampler_keeps_the_interval_of_a_guidance_before_it(parts: Any) -> None:
    before = guidance.patch(parts[0], renorm=False, end_percent=0.5)
    expected, batches = run(parts, guidance.patch(parts[0], renorm=True, end_percent=0.5), 4.5)
    kept, kept_batches = run(parts, guidance.patch_renorm(before, renorm=True, renorm_min=0.0), 4.5)
    assert kept_batches == batches
    assert torch.equal(kept, expected)
