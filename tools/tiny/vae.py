"""Train the VAE on composed pictures, then measure its own scaling and shift."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from tools.tiny.pictures import VaePictures

KL_WEIGHT = 1e-3


@dataclass
class VaeSettings:
    """How long and how fast the VAE is trained."""

    steps: int = 3000
    batch: int = 64
    learning_rate: float = 1.5e-3
    warmup: int = 200
    ema_decay: float = 0.998
    compile: bool = True
    seconds: float = math.inf  # it ends after this time at the latest, its learning rate fully decayed


def _reconstruct(vae: AutoencoderKL, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstruction (B, 3, H, W) through a posterior sample, and the KL divergence per latent element."""
    mean, log_variance = vae.encoder(pictures).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return vae.decoder(latents).float(), divergence


def cosine(step: int, steps: int, warmup: int, spent: float = 0.0) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to zero at the end of the steps or of the time.

    `spent` is the share of the time that has passed.
    """
    progress = min(1.0, max(0.0, spent, (step - warmup) / max(1, steps - warmup)))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))


def train_vae(vae: AutoencoderKL, pictures: VaePictures, settings: VaeSettings, log: Callable[[str], None]) -> None:
    """Train `vae` in place, on its own device; it ends with its averaged weights."""
    parameters = list(vae.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    vae.to(memory_format=torch.channels_last)
    reconstruct = torch.compile(_reconstruct) if settings.compile else _reconstruct
    started = time.monotonic()
    for step in range(settings.steps):
        spent = (time.monotonic() - started) / settings.seconds
        if spent >= 1:
            log(f"vae out of time at step {step}")
            break
        rate = cosine(step, settings.steps, settings.warmup, spent)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * rate
        batch = pictures.batch(settings.batch).to(memory_format=torch.channels_last)
        with torch.autocast(batch.device.type, torch.bfloat16):
            drawn, divergence = reconstruct(vae, batch)
        loss = F.l1_loss(drawn, batch) + F.mse_loss(drawn, batch) + KL_WEIGHT * divergence
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(settings.ema_decay, step / (step + 20)))
        if step % 500 == 0 or step == settings.steps - 1:
            psnr = 10 * math.log10(4 / F.mse_loss(drawn, batch).item())
            log(f"vae step {step} psnr {psnr:.2f} kl {divergence.item():.3f} at {time.monotonic() - started:.0f} s")
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)


@torch.no_grad()
def encode_means(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Unscaled latents (B, 16, 16, 16) fp32: the posterior's mean."""
    return vae.encode(pictures.to(vae.dtype)).latent_dist.mean.float()


@torch.no_grad()
def measure(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Set the VAE's scaling and shift from the latents of `pictures` (B, 3, 128, 128), and return its PSNR in dB."""
    latents = encode_means(vae, pictures)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(scaling_factor=round(scale, 4), shift_factor=round(shift, 4))
    drawn = vae.decode(latents.to(vae.dtype)).sample.float().clamp(-1, 1)
    return 10 * math.log10(4 / F.mse_loss(drawn, pictures).item())
