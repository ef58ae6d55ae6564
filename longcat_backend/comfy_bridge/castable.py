"""Layers that ComfyUI can keep on the CPU and cast when they are used, and the patcher that manages them.

With them every component is resident as far as it fits and streamed beyond that, by ComfyUI's own memory
management (dynamic VRAM, ``--lowvram``, ``--novram``), whichever library its forward comes from.
"""

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from torch import nn
from torch.nn import functional

from ..modulation import ModulationTable

Build = Callable[[str, nn.Linear], nn.Module]


def replace_linears(model: nn.Module, build: Build) -> None:
    """Put ``build(name, layer)`` in the place of every linear layer; it may give the layer back."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            comfy.utils.set_attr(model, name, build(name, layer))


def castable(operations: Any, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """A layer of ComfyUI's ``operations`` with the sizes of ``layer``, without weights yet."""
    # Quantised layers put their weights on the device that they were made on.
    device = "meta" if issubclass(operations.Linear, nn.Linear) else None
    linear: nn.Module = operations.Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device=device, dtype=dtype
    )
    return linear


class TabulatedLinear(comfy.ops.manual_cast.Linear):
    """A modulation layer whose weights stay on the CPU; a table answers for the noise levels it knows."""

    def __init__(self, name: str, table: ModulationTable, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=_has_bias(layer), device="meta", dtype=dtype)
        self.name = name
        self.table = table

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        """The table's row, or the layer's own result."""
        row = self.table.row(self.name, conditioning, self._project)
        return self._project([conditioning])[0] if row is None else row

    def _project(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        weight, bias, stream = comfy.ops.cast_bias_weight(self, inputs[0], offloadable=True)
        results = [functional.linear(conditioning, weight, bias) for conditioning in inputs]
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return results

    def keep_aside(self) -> None:
        """Make the weights plain attributes, out of reach for hooks that move parameters one by one."""
        for name, parameter in list(self._parameters.items()):
            del self._parameters[name]
            setattr(self, name, None if parameter is None else parameter.detach())

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Stay on the CPU when the model moves."""
        return self


def _has_bias(layer: nn.Linear) -> bool:
    # With dynamic VRAM a layer of ComfyUI has no bias yet, but knows that it will.
    return layer.bias is not None or getattr(layer, "comfy_need_lazy_init_bias", False)
