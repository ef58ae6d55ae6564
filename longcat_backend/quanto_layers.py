"""Weight-only int8 and int4 linear layers of optimum-quanto, without its five known defects.

Imported when a preset asks for it, so that the pack runs without the package. "Weight-only" is the design of these
presets: weights are unpacked for each product and the product runs in the compute dtype. There is no int8 or int4
matrix product that could fall back to another one; they save memory and cost time.

Groups of 64 for int4 are a choice with a reason. For groups of 128, quanto's own, it repacks weights for kernels made
for a few rows: ten times slower than unpacking for the 4,608 rows of a picture, not compilable, changed slightly by
every move between devices, and in fp16 built with nvcc at run time.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from optimum.quanto import QTensor, qint4, qtypes
from optimum.quanto.nn import QLinear
from optimum.quanto.tensor.grouped import ungroup
from optimum.quanto.tensor.qbits import QBitsTensor
from torch import nn
from torch.nn import functional

from .errors import LongCatError
from .precision import Preset

GROUP = 64


class _Int4Product(torch.autograd.Function):
    """A product with a frozen int4 weight. quanto's own would compile a kernel with nvcc."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: QBitsTensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return functional.linear(input, unpacked(weight), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0] @ unpacked(ctx.weight), None, None


class QuantisedLinear(QLinear):
    """A frozen quanto layer that runs in inference mode, can be copied, and refuses a cast in words."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As in the base class, whose int4 product makes a view that inference mode does not allow.

        With gradients the packed weight is unpacked once more in the backward pass, not kept until then.
        """
        if self.weight_qtype == qint4:
            product: torch.Tensor = _Int4Product.apply(input, self.weight, self.bias)
            return product
        result: torch.Tensor = super().forward(input)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantisedLinear":
        """A copy with weights of its own; the base class cannot be copied."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        memo[id(self.weight)] = _parameter(self.weight.to(self.weight.device, copy=True))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantisedLinear":
        probe = torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)
        if self.frozen and fn(probe).dtype != probe.dtype:
            name, wanted = self.weight_qtype.name, str(fn(probe).dtype).removeprefix("torch.")
            raise LongCatError(
                f"Weights quantised to {name} cannot be cast to {wanted}. Choose the compute dtype before "
                "quantising: load the checkpoint again with it.",
                f"量化为 {name} 的权重无法转换为 {wanted}。请在量化之前选定计算精度：用该精度重新加载检查点。",
            )
        applied: QuantisedLinear = super()._apply(fn, recurse)
        return applied


def unpacked(weight: QBitsTensor) -> torch.Tensor:
    """An int4 weight in the dtype of its scales; what quanto's ``dequantize`` gives.

    On CUDA that one is a kernel which quanto compiles when it is first used, with nvcc, for a minute or in vain.
    """
    packed = weight._data
    values = torch.cat([packed._data & 0x0F, packed._data // 0x10])[: packed.shape[0]]  # two to a byte
    scaled = weight._scale * values - weight._shift
    plain: torch.Tensor = ungroup(scaled, axis=weight.axis, orig_shape=weight.shape)
    return plain


def dequantised(weight: QTensor) -> torch.Tensor:
    """A weight with the very values that its layer computes with, in the dtype of its scales."""
    plain: torch.Tensor = unpacked(weight) if isinstance(weight, QBitsTensor) else weight.dequantize()
    return plain


def require(preset: Preset, device: torch.device) -> None:
    """Every device can unpack these weights."""


def quantised(layer: nn.Linear, preset: Preset) -> QuantisedLinear:
    """A frozen layer in the place of ``layer``, on its device; the scales have the dtype of its weights."""
    result = QuantisedLinear.from_module(layer, weights=qtypes[preset.format])
    if preset.bits == 4 and layer.in_features % GROUP == 0:
        result.weight_group_size = GROUP
    result.weight = _parameter(result.qweight)
    return result


def outline(layer: nn.Linear, preset: Preset) -> torch.Tensor:
    """The weight that :func:`quantised` gives, without storage as that of ``layer``."""
    weight: torch.Tensor = quantised(layer, preset).weight
    return weight


def took(layer: nn.Module, preset: Preset) -> bool:
    """Whether the layer holds weights of the preset's format, and in groups that are not repacked."""
    weight = layer.weight
    if not isinstance(weight, QTensor) or weight.qtype.name != preset.format:
        return False
    return preset.bits != 4 or weight._group_size == GROUP


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
