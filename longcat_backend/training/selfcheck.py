"""Checks on the real model before and after training: gradients with recomputation, and the file that was written."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import latents
from ..errors import LongCatError
from ..transformer import VelocityModel
from . import engine
from .adapters import Adapters

_LATENT = 8  # side of the small picture, in latent pixels
_TEXT = 16  # tokens
# Largest difference of gradients, relative to the largest gradient. The same kernels give the same bits on most
# devices; some add in another order each time.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}


def check_gradients(model: VelocityModel, adapters: Adapters, device: torch.device) -> None:
    """Compare the gradients of the first block of each kind with and without recomputation, on a small input.

    These blocks and what is outside the blocks end on the device.

    Raises:
        LongCatError: they differ, are zero or are not finite: with this model, device and set of libraries training
            would go wrong without a sign.
    """
    with _two_blocks(model.transformer):
        model.transformer.to(device)
        plain = _gradients(model, adapters, device, "none")
        recomputed = _gradients(model, adapters, device, "block")
    adapters.publish()
    largest = max((float(gradient.abs().max()) for gradient in plain), default=0.0)
    worst = max((float((a - b).abs().max()) for a, b in zip(plain, recomputed, strict=True)), default=0.0)
    if not (0 < largest < float("inf")) or not worst <= _TOLERANCE[model.dtype] * largest:
        raise LongCatError(
            f"The gradient self-check failed: gradients with and without recomputation differ by {worst:.3g}, the "
            f"largest is {largest:.3g}. Training would go wrong. Use the library versions of requirements.txt, another "
            "base precision, or another device.",
            f"梯度自检失败：重计算与不重计算的梯度相差 {worst:.3g}，最大梯度为 {largest:.3g}。训练会出错。"
            "请使用 requirements.txt 中的库版本、其他基础精度或其他设备。",
        )


def _gradients(model: VelocityModel, adapters: Adapters, device: torch.device, mode: str) -> list[torch.Tensor]:
    """Of all adapters in the two blocks, with B drawn at random, since at its zeros A has no gradient."""
    generator = torch.Generator().manual_seed(0)
    adapters.publish([torch.randn(master.shape, generator=generator) * 0.02 for master in adapters.masters])
    engine.set_checkpointing(model.transformer, mode)
    width = model.transformer.config.joint_attention_dim
    picture = torch.randn(1, latents.CHANNELS, _LATENT, _LATENT, generator=generator).to(device, model.dtype)
    text = torch.randn(1, _TEXT, width, generator=generator).to(device, model.dtype)
    with engine.attention(device):
        velocity = model(picture, torch.tensor([0.5], device=device), text)
        velocity.float().square().mean().backward()
    found = [parameter.grad.float() for parameter in adapters.live() if parameter.grad is not None]
    adapters.forget_gradients()
    return found


@contextmanager
def _two_blocks(transformer: Any) -> Iterator[None]:
    """Leave the first block of each kind, for a while."""
    whole = transformer.transformer_blocks, transformer.single_transformer_blocks
    transformer.transformer_blocks = nn.ModuleList(whole[0][:1])
    transformer.single_transformer_blocks = nn.ModuleList(whole[1][:1])
    try:
        yield
    finally:
        transformer.transformer_blocks, transformer.single_transformer_blocks = whole
