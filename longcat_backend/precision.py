"""The precisions a component can be loaded in, one table.

A quantised preset changes the weights of the linear layers named by ``QUANTISED`` only. What the patterns leave out
stays in the compute dtype, by benchmarks/results/precision_error.json: the modulation projections, because a table
replaces them (:mod:`modulation`), and what lies outside the blocks. There, the first and the last projection
(``x_embedder``, ``proj_out``) hold 0.006 % of the weights and cause about two thirds of the squared error of a model
that is quantised throughout; the other embedders hold a third of a percent, too little to be worth an error.
Inside the blocks, ``proj_out`` of the single blocks causes a third to a half of the squared error that is left. It is
quantised, since it holds 15 % of all weights.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .errors import LongCatError

AUTO = "auto"


@dataclass(frozen=True)
class Preset:
    """One precision: where its kernels come from, how it stores a quantised weight, and what that costs."""

    name: str
    dtype: torch.dtype | None = None  # of weights that are not quantised, and of the computation; None: the device's
    backend: str = ""  # "kitchen" (ComfyUI's own kernels), "quanto", "torchao", or "" for plain weights
    format: str = ""  # the name that the backend gives to the weight format
    bits: int = 16  # of one quantised weight

    @property
    def exact(self) -> bool:
        """Whether the weights keep the bits of the checkpoint's own bf16."""
        return not self.backend and self.dtype is not torch.float16


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("bf16", torch.bfloat16),
        Preset("fp16", torch.float16),
        Preset("fp32", torch.float32, bits=32),
        Preset("fp8", backend="kitchen", format="float8_e4m3fn", bits=8),
        Preset("int8", backend="kitchen", format="int8_tensorwise", bits=8),
        Preset("int8-quanto", backend="quanto", format="qint8", bits=8),
        Preset("int4-quanto", backend="quanto", format="qint4", bits=4),
        Preset("fp8-torchao", backend="torchao", format="float8_dynamic_rowwise", bits=8),
    )
}
PLAIN = ("bf16", "fp16", "fp32")
ENGINE_PRESETS = {
    "core": (*PLAIN, "fp8", "int8"),
    "diffusers": (*PLAIN, "int8-quanto", "int4-quanto", "fp8-torchao"),
}
ENCODER_PRESETS = (*PLAIN, "fp8", "int8", "int8-quanto")

# Linear layers by their official names, and by those of ComfyUI's class.
_BLOCK_LINEARS = (
    r"(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff(_context)?\.net\.(0\.proj|2)"
    r"|proj_mlp|proj_out)"
)
_CORE_BLOCK_LINEARS = r"(double|single)_blocks\.\d+\.((img|txt)_(attn\.(qkv|proj)|mlp\.(0|2))|linear[12])"
_ENCODER_LINEARS = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
QUANTISED = {
    "transformer": re.compile(f"{_BLOCK_LINEARS}|{_CORE_BLOCK_LINEARS}"),
    "text_encoder": re.compile(_ENCODER_LINEARS),
}


def preset(name: str, allowed: Iterable[str]) -> Preset:
    """The preset of that name.

    Raises:
        LongCatError: the engine or component has no such preset.
    """
    known = tuple(allowed)
    if name not in known:
        raise LongCatError(
            f"The precision '{name}' is not available here. Choose one of: {', '.join(known)}.",
            f"此处没有精度“{name}”。请选择：{', '.join(known)}。",
        )
    return PRESETS[name]


def is_quantised(component: str, layer: str) -> bool:
    """Whether a quantised preset changes the linear layer of that name; ``component`` is a key of ``QUANTISED``."""
    return QUANTISED[component].fullmatch(layer) is not None


def did_not_take(preset: Preset, component: str, plain: Sequence[str], layers: int) -> LongCatError:
    """The error for a quantisation that left layers as they were; ``layers`` of them should have changed."""
    some = ", ".join(plain[:3]) or "-"
    return LongCatError(
        f"The precision '{preset.name}' did not take on '{component}': {len(plain)} of {layers} layers still hold "
        f"plain weights ({some}). Use the pack with the library versions of its requirements.txt, or choose bf16.",
        f"精度“{preset.name}”未能应用到“{component}”：{layers} 层中有 {len(plain)} 层仍是普通权重（{some}）。"
        "请按本节点包的 requirements.txt 安装依赖版本，或选择 bf16。",
    )
