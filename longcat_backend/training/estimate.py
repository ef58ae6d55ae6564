"""What a run will need on the device, before its first step, and which change would make it fit.

Weights, adapters and optimiser are counted. What a forward keeps for the backward pass is a multiple of the tokens,
measured at full size (benchmarks/results/training*.json, rank 16 beside the 100 attention layers); what more targets
keep on top of that is counted from the inputs of their layers.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import memory, precision
from ..memory import GIB
from ..modulation import is_modulation
from . import base, tabulated
from .adapters import PATTERNS
from .settings import TrainSettings

# What a block keeps, in numbers of the size tokens x hidden size; more targets keep more inputs.
_KEPT = {"attention": 12.4, "official": 14.0, "all": 15.4}
_INPUTS = 1.0  # that many are kept of a block that is computed again
_KEPT_QUANTISED = 1.4  # times as much beside weights that are unpacked for each product, as measured
_WORKSPACE = GIB // 4
_UNPACKING = {"int4-quanto": 0.3, "fp8-torchao": 0.18}  # GiB more of it, measured likewise
# Bytes of an adapter's number: its fp32 master, gradient and copy in the computation, and the optimiser's state.
_STATE = {"adamw": 8.0, "adamw-8bit": 2.1, "prodigy": 16.0, "lion": 4.0}
_TEXT_TOKENS = 512


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device at the peak of a step."""

    weights: int
    adapters: int  # with their gradients and the optimiser's state
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapters + self.activations + self.workspace

    def __str__(self) -> str:
        parts = (self.weights, self.adapters, self.activations, self.workspace)
        weights, adapters, activations, workspace = map(memory.size, parts)
        return (
            f"{memory.size(self.total)}: weights 权重 {weights}, adapters and optimiser 适配器与优化器 {adapters}, "
            f"activations 激活 {activations}, working space 工作空间 {workspace}"
        )


def estimate(
    config: Mapping[str, Any],
    shapes: Mapping[str, torch.Size],
    settings: TrainSettings,
    size: tuple[int, int],
    device: torch.device,
) -> Estimate:
    """Of a LoRA step.

    Args:
        config: the transformer's.
        shapes: of its weights by official name, see :func:`transformer.audited_shapes`.
        size: width and height of the largest picture; an edit pair has twice its tokens, so pass its doubled width.
        device: that is trained on; it may decide the dtype of the computation.
    """
    preset = precision.PRESETS[settings.base_precision]
    dtype = base.compute_dtype(preset, device)
    return Estimate(
        _weights(shapes, settings, preset, dtype),
        _adapters(shapes, settings, dtype),
        _activations(config, settings, size, dtype, _KEPT_QUANTISED if preset.backend else 1.0),
        _WORKSPACE + round(_UNPACKING.get(settings.base_precision, 0.0) * GIB),
    )


def fitting(
    config: Mapping[str, Any],
    shapes: Mapping[str, torch.Size],
    settings: TrainSettings,
    size: tuple[int, int],
    device: torch.device,
    free: int,
) -> str:
    """What would make a run fit that needs more than ``free`` bytes, in both languages; empty where it fits."""
    needed = estimate(config, shapes, settings, size, device).total
    if needed <= free:
        return ""
    for changed, smaller in _turned_down(settings, size, device):
        total = estimate(config, shapes, changed, smaller, device).total
        if total <= free:
            told = list(_changes(settings, changed, size, smaller))
            words, words_zh = ", ".join(word for word, _ in told), "、".join(word for _, word in told)
            return (
                f"It needs about {memory.size(needed)}, and {memory.size(free)} are free. With {words} it needs about "
                f"{memory.size(total)}. 约需 {memory.size(needed)}，可用 {memory.size(free)}；改为{words_zh}后约需 "
                f"{memory.size(total)}。"
            )
    return (
        f"It needs about {memory.size(needed)}, and {memory.size(free)} are free: no setting makes that fit. "
        f"约需 {memory.size(needed)}，可用 {memory.size(free)}：没有设置能满足。"
    )


def _turned_down(
    settings: TrainSettings, size: tuple[int, int], device: torch.device
) -> Iterator[tuple[TrainSettings, tuple[int, int]]]:
    """Settings and sizes that need less and less, each with the changes before it; what costs least comes first."""
    tabulating = replace(settings, modulation_table=True)
    dtype = base.compute_dtype(precision.PRESETS[settings.base_precision], device)
    if not settings.modulation_table and tabulated.wanted(tabulating, dtype):
        settings = tabulating
        yield settings, size
    if settings.checkpointing != "block":
        settings = replace(settings, checkpointing="block")
        yield settings, size
    if settings.batch > 1:
        settings = replace(settings, accumulation=settings.batch * settings.accumulation, batch=1)
        yield settings, size
    if settings.offload == "none":
        for name in ("int8-quanto", "int4-quanto"):
            if precision.PRESETS[settings.base_precision].bits > precision.PRESETS[name].bits:
                settings = replace(settings, base_precision=name)
                yield settings, size
        # Exact, but slower than int8 (benchmarks/results/training_table.json, 512x512; never timed in one run with int4
        # alone on its machine), and it moves no weights of quanto's.
        stream = device.type != "mps"  # which has none
        settings = replace(
            settings, base_precision="bf16", compile=False, offload="block", offload_blocks=1, offload_stream=stream
        )
        yield settings, size
    while min(size) > 512:
        size = (size[0] * 3 // 4, size[1] * 3 // 4)
        yield settings, size


def _changes(
    before: TrainSettings, after: TrainSettings, size: tuple[int, int], smaller: tuple[int, int]
) -> Iterator[tuple[str, str]]:
    """What was turned down, each in both languages."""
    if after.modulation_table != before.modulation_table:
        yield "modulation_table on", "modulation_table 开启"
    if after.checkpointing != before.checkpointing:
        yield "checkpointing 'block'", "梯度检查点“block”"
    if after.batch != before.batch:
        text = f"batch 1, accumulation {after.accumulation}"
        yield text, text
    if after.base_precision != before.base_precision:
        yield f"base precision '{after.base_precision}'", f"基础精度“{after.base_precision}”"
    if after.compile != before.compile:
        yield "compile off", "compile 关闭"
    if after.offload != before.offload:
        no_stream = ("", "") if after.offload_stream else (" without stream", "、关闭流")
        yield f"group offload by block{no_stream[0]}", f"分组卸载（按块{no_stream[1]}）"
    if smaller != size:
        yield (f"resolution {smaller[0]}x{smaller[1]}", f"分辨率 {smaller[0]}x{smaller[1]}")


def _weights(
    shapes: Mapping[str, torch.Size], settings: TrainSettings, preset: precision.Preset, dtype: torch.dtype
) -> int:
    tabulate = tabulated.wanted(settings, dtype)
    whole = memory.weigh(shapes, "transformer", preset, dtype, tabulate).device
    if settings.offload == "none":
        return whole
    blocks: dict[str, int] = {}
    for key, shape in shapes.items():
        if tabulate and is_modulation(key.rpartition(".")[0]):
            continue
        block = ".".join(key.split(".")[:2]) if "transformer_blocks" in key else ""
        blocks[block] = blocks.get(block, 0) + shape.numel() * dtype.itemsize
    rest = blocks.pop("", 0)
    return rest + (2 + settings.offload_blocks) * max(blocks.values(), default=0)


def _adapters(shapes: Mapping[str, torch.Size], settings: TrainSettings, dtype: torch.dtype) -> int:
    pattern = PATTERNS[settings.targets]
    sides = sum(
        sum(shape)
        for key, shape in shapes.items()
        if key.endswith(".weight") and pattern.fullmatch(key.removesuffix(".weight"))
    )
    average = 4.0 if settings.ema else 0.0
    each = 4 + 4 + 2 * dtype.itemsize + _STATE[settings.optimiser] + average
    return round(settings.rank * sides * each)


def _activations(
    config: Mapping[str, Any], settings: TrainSettings, size: tuple[int, int], dtype: torch.dtype, more: float
) -> int:
    tokens = math.ceil(size[0] / 16) * math.ceil(size[1] / 16) + _TEXT_TOKENS
    unit = settings.batch * tokens * config["num_attention_heads"] * config["attention_head_dim"] * dtype.itemsize
    blocks = config["num_layers"] + config["num_single_layers"]
    whole = {"none": blocks, "every-second": blocks // 2, "block": 1}[settings.checkpointing]
    recomputed = {"none": 0, "every-second": blocks - blocks // 2, "block": blocks}[settings.checkpointing]
    return round(unit * (whole * more * _KEPT[settings.targets] + recomputed * _INPUTS))
