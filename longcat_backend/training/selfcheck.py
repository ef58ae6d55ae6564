"""Checks on the real model before and after training: gradients with recomputation, and the file that was written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from .. import latents, lora_files
from ..errors import LongCatError
from ..lora import Adapter
from ..transformer import VelocityModel
from . import engine
from .adapters import NAME, Adapters, disabled

_LATENT = 8  # side of the small picture, in latent pixels
_TEXT = 16  # tokens
_ROUNDED = 0.01  # what rounding to bf16 changes at most
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
    with engine.attention(device):
        _small_forward(model, device).square().mean().backward()
    found = [parameter.grad.float() for parameter in adapters.live() if parameter.grad is not None]
    adapters.forget_gradients()
    return found


def _small_forward(model: VelocityModel, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    width = model.transformer.config.joint_attention_dim
    picture = torch.randn(1, latents.CHANNELS, _LATENT, _LATENT, generator=generator).to(device, model.dtype)
    text = torch.randn(1, _TEXT, width, generator=generator).to(device, model.dtype)
    velocity: torch.Tensor = model(picture, torch.tensor([0.5], device=device), text)
    return velocity.float()


def check_file(model: VelocityModel, file: Path, trained: Sequence[Adapter], device: torch.device) -> None:
    """Read a written LoRA back, into the adapters that the model was trained with, and see that it changes the output.

    Raises:
        LongCatError: the file holds something else than was learnt, or the output is the same with and without it.
    """
    put_on(model, file)
    written = {each.module: each for each in lora_files.read(file).adapters if isinstance(each, Adapter)}
    worst = max(_difference(each, written.get(each.module)) for each in trained)
    with torch.no_grad(), engine.attention(device):
        worn = _small_forward(model, device)
        with disabled(model):
            bare = _small_forward(model, device)
    changed = float((worn - bare).abs().max())
    if not (worst <= _ROUNDED and 0 < changed < float("inf")):
        raise LongCatError(
            f"The LoRA '{file}' was written, but read back it differs from what was learnt by {worst:.1%}, and changes "
            f"the output by {changed:.3g}. The states of the run are whole: train one step more to write it again.",
            f"LoRA“{file}”已写入，但读回后与训练结果相差 {worst:.1%}，对输出的改变为 {changed:.3g}。"
            "训练状态完好：请再训练一步以重新写入。",
        )


@torch.no_grad()
def put_on(model: VelocityModel, file: Path) -> None:
    """Give a model's adapters the weights of a LoRA file that was trained with the same settings.

    Raises:
        LongCatError: the file's layers or ranks are others; or see :func:`lora_files.read`.
    """
    layers = {name: layer for name, layer in model.transformer.named_modules() if isinstance(layer, LoraLayer)}
    read = lora_files.read(file).adapters
    fitting = {
        each.module: each
        for each in read
        if isinstance(each, Adapter) and each.module in layers and layers[each.module].r[NAME] == each.rank
    }
    if fitting.keys() != layers.keys() or len(read) != len(layers):
        raise LongCatError(
            f"The LoRA '{file}' has {len(read)} layers, of which {len(fitting)} are among the {len(layers)} of this "
            "run's targets and rank. It is of other settings: train with these ones first.",
            f"LoRA“{file}”有 {len(read)} 层，其中 {len(fitting)} 层属于本训练目标和秩的 {len(layers)} 层。"
            "它来自其他设置：请先用当前设置训练。",
        )
    for name, layer in layers.items():
        layer.lora_A[NAME].weight.copy_(fitting[name].down)
        layer.lora_B[NAME].weight.copy_(fitting[name].up * fitting[name].scale / layer.scaling[NAME])


def _difference(trained: Adapter, written: Adapter | None) -> float:
    """Between what two adapters add to a weight, relative to the first.

    Of the whole product, by its Frobenius norm: what it does to one input can cancel down to its rounding.
    """
    if written is None:
        return float("inf")
    up, down = trained.scale * trained.up.double(), trained.down.double()
    both_up = torch.cat([up, -written.scale * written.up.double()], dim=1)
    both_down = torch.cat([down, written.down.double()])
    return float(_norm(both_up, both_down) / _norm(up, down).clamp(min=1e-30))


def _norm(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The Frobenius norm of ``up @ down``, which is not made."""
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()


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
