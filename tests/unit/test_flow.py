"""Shift, sigmas, guidance and timestep, against diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.longcat_image.pipeline_longcat_image import calculate_shift, retrieve_timesteps

from longcat_pack.longcat_backend import flow, latents
from longcat_pack.longcat_backend.errors import LongCatError

OFFICIAL: dict[str, Any] = {**flow.DEFAULT_SCHEDULER}
TURBO: dict[str, Any] = {**OFFICIAL, "base_shift": 1.15, "max_shift": 1.15}
TOKENS = {"128": 64, "512": 1024, "1344x768": 4032, "1024": 4096, "2048": 16384}


def pipeline_sigmas(steps: int, tokens: int, config: dict[str, Any]) -> torch.Tensor:
    """Step 5 of LongCatImagePipeline.__call__."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    mu = calculate_shift(
        tokens,
        config["base_image_seq_len"],
        config["max_image_seq_len"],
        config["base_shift"],
        config["max_shift"],
    )
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=np.linspace(1.0, 1.0 / steps, steps), mu=mu)
    return scheduler.sigmas


def pipeline_guidance(cond: torch.Tensor, uncond: torch.Tensor, guidance: float, minimum: float) -> torch.Tensor:
    """Step 6 of LongCatImagePipeline.__call__, on packed tokens."""
    noise_pred = uncond + guidance * (cond - uncond)
    cond_norm = torch.norm(cond, dim=-1, keepdim=True)
    noise_norm = torch.norm(noise_pred, dim=-1, keepdim=True)
    return noise_pred * (cond_norm / (noise_norm + 1e-8)).clamp(min=minimum, max=1.0)


def velocities(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    cond, uncond = torch.randn(2, 2, 16, height, width, generator=generator)
    return cond, uncond * torch.linspace(0.2, 3, width)  # ratios on both sides of 1


@pytest.mark.parametrize(("tokens", "mu"), [(1024, 0.63), (4096, 1.15), (16384, 3.23)])
def test_the_shift_grows_with_the_picture(tokens: int, mu: float) -> None:
    assert flow.shift(tokens, OFFICIAL) == pytest.approx(mu, abs=0.005)
    assert flow.shift(tokens, OFFICIAL) == calculate_shift(tokens)
    assert flow.shift(tokens, {}) == flow.shift(tokens, OFFICIAL)


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_equal_shifts_give_one_shift_for_every_size(tokens: int) -> None:
    assert flow.shift(tokens, TURBO) == 1.15


@pytest.mark.parametrize("config", [OFFICIAL, TURBO], ids=["official", "turbo"])
@pytest.mark.parametrize("steps", [1, 8, 20, 50])
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_sigmas_are_the_pipelines(tokens: int, steps: int, config: dict[str, Any]) -> None:
    levels = flow.sigmas(steps, tokens, config)
    assert levels.shape == (steps + 1,)
    assert levels.dtype == torch.float32
    assert torch.equal(levels, pipeline_sigmas(steps, tokens, config))


@pytest.mark.parametrize(("steps", "denoise", "total"), [(10, 0.5, 20), (10, 0.6, 16), (50, 0.99, 50), (1, 0.01, 100)])
def test_denoise_runs_the_end_of_a_longer_schedule(steps: int, denoise: float, total: int) -> None:
    tail = flow.sigmas(steps, 1024, OFFICIAL, denoise)
    assert torch.equal(tail, pipeline_sigmas(total, 1024, OFFICIAL)[-(steps + 1) :])


def test_denoise_0_runs_no_step() -> None:
    assert flow.sigmas(10, 1024, OFFICIAL, 0.0).numel() == 0


@pytest.mark.parametrize("denoise", [-1.0, 1e-9, 1.01, float("nan"), float("inf")])
def test_a_denoise_without_a_schedule_is_refused(denoise: float) -> None:
    with pytest.raises(LongCatError, match="denoise is"):
        flow.sigmas(10, 1024, OFFICIAL, denoise)


@pytest.mark.parametrize("minimum", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("guidance", [0.5, 1.0, 4.5])
def test_guidance_is_the_pipelines_on_packed_tokens(guidance: float, minimum: float) -> None:
    cond, uncond = velocities(6, 8)
    expected = pipeline_guidance(latents.pack(cond), latents.pack(uncond), guidance, minimum)
    guided = flow.guide(cond, uncond, guidance, True, minimum)
    assert torch.allclose(latents.pack(guided), expected, rtol=1e-6, atol=1e-6)


def test_guidance_without_renormalisation_is_the_plain_formula() -> None:
    cond, uncond = velocities(6, 8)
    guided = flow.guide(cond, uncond, 4.5, False, 0.0)
    assert torch.equal(guided, uncond + 4.5 * (cond - uncond))
    assert not torch.allclose(guided, flow.guide(cond, uncond, 4.5, True, 0.0))


@pytest.mark.parametrize(("height", "width"), [(5, 8), (6, 7), (5, 7), (1, 1)])
def test_guidance_at_odd_sizes_fills_the_last_patch_with_zeros(height: int, width: int) -> None:
    cond, uncond = velocities(height, width)
    whole = [torch.nn.functional.pad(v, (0, width % 2, 0, height % 2)) for v in (cond, uncond)]
    expected = pipeline_guidance(latents.pack(whole[0]), latents.pack(whole[1]), 4.5, 0.1)
    padded = latents.unpack(expected, height + height % 2, width + width % 2)
    guided = flow.guide(cond, uncond, 4.5, True, 0.1)
    assert guided.shape == cond.shape
    assert torch.allclose(guided, padded[..., :height, :width], rtol=1e-6, atol=1e-6)


def test_the_timestep_has_1248_values_in_bf16() -> None:
    sigmas = torch.linspace(0.001, 1, 4_000_001)
    assert flow.model_timestep(sigmas, torch.bfloat16).unique().numel() == 1248


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_timestep_has_the_pipelines_roundings(dtype: torch.dtype) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(OFFICIAL)
    steps = 50
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), mu=0.63)
    expected = torch.stack([timestep.expand(1).to(dtype) / 1000 for timestep in scheduler.timesteps])
    given = flow.model_timestep(scheduler.sigmas[:-1], dtype).unsqueeze(1)
    assert given.dtype == dtype
    assert torch.equal(given, expected)
