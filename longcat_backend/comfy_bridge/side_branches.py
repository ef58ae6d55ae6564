"""LoRAs beside the layers of a model whose weights cannot be changed: quantised by another library, or offloaded.

A layer's output gains what its branches make of the layer's input. The patcher's own list of patches is the only
record of them: clones copy it, ComfyUI compares it when it switches between clones, and the branches of a model are
made anew from the list of whichever clone is loaded, all at once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.weight_adapter
import torch
from torch import nn
from torch.nn import functional

from ..errors import LongCatError
from .castable import TabulatedLinear

_HANDLES = "longcat_branches"
# Those of ComfyUI's adapters that add to a layer's output and need not know its weight.
_ADAPTERS = (
    comfy.weight_adapter.LoRAAdapter,
    comfy.weight_adapter.LoHaAdapter,
    comfy.weight_adapter.LoKrAdapter,
)
_DORA = {"lora": 4, "loha": 7, "lokr": 8}  # where an adapter's ``weights`` hold what does need the weight
_RESHAPE = 5  # of a LoRA that changes the layer's size

Branch = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def require_possible(key: Any, patch: Any, strength_model: float, linear: bool) -> None:
    """Refuse a patch that cannot work beside a layer.

    Args:
        linear: whether the key names the weight or the bias of a linear layer.

    Raises:
        LongCatError: it would scale or replace the weight, or has to know it.
    """
    name = key if isinstance(key, str) else key[0]
    if linear and strength_model == 1.0 and (_is_addition(patch) or _is_difference(patch)):
        return
    kind = getattr(patch, "name", None) or (patch[0] if isinstance(patch, tuple) else type(patch).__name__)
    raise LongCatError(
        f"A patch of the kind '{kind}' on '{name}' cannot be applied to the weights of this precision or offload: "
        "only LoRA, LoHa and LoKr without DoRA can. Choose bf16, or fp8 or int8 of the core engine, in LongCatLoader.",
        f"“{name}”上的“{kind}”类补丁无法用于该精度或卸载方式的权重：仅支持不含 DoRA 的 LoRA、LoHa、LoKr。"
        "请在 LongCatLoader 中选择 bf16，或 core 引擎的 fp8、int8。",
    )


def install(model: nn.Module, patches: Mapping[str, Sequence[Any]], device: torch.device, dtype: torch.dtype) -> None:
    """Give the layers of a model the branches of these patches, and no others.

    Args:
        patches: as a patcher keeps them, by tensor: (strength, patch, …). Tabulated layers are left out, since they
            have weights of their own that can be patched.
        device: where the model runs; the branches wait there too.
        dtype: in which it computes.
    """
    remove(model)
    handles: list[Any] = []
    setattr(model, _HANDLES, handles)  # before the first branch: the device's memory may end in the middle
    for name, layer in model.named_modules():
        branches = [] if isinstance(layer, TabulatedLinear) else _branches(name, patches, device, dtype)
        if branches:
            handles.append(layer.register_forward_hook(_hook(branches)))


def remove(model: nn.Module) -> None:
    """Take all branches from a model."""
    for handle in getattr(model, _HANDLES, ()):
        handle.remove()
    setattr(model, _HANDLES, [])


def _branches(
    name: str, patches: Mapping[str, Sequence[Any]], device: torch.device, dtype: torch.dtype
) -> list[Branch]:
    return [
        _branch(patch[1], part, patch[0], device, dtype)
        for part in ("weight", "bias")
        for patch in patches.get(f"{name}.{part}", ())
    ]


def _branch(patch: Any, part: str, strength: float, device: torch.device, dtype: torch.dtype) -> Branch:
    if _is_difference(patch):
        values = patch[1][0].to(device, dtype) * strength
        if part == "bias":
            return lambda inputs, output: output + values
        return lambda inputs, output: output + functional.linear(inputs, values)
    weights = [value.to(device, dtype) if isinstance(value, torch.Tensor) else value for value in patch.weights]
    adapter = type(patch)(set(), tuple(weights))
    adapter.multiplier = strength
    return lambda inputs, output: output + adapter.h(inputs, output)


def _hook(branches: Sequence[Branch]) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
    def add(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        for branch in branches:
            output = branch(inputs[0], output)
        return output

    return add


def _is_addition(patch: Any) -> bool:
    if not isinstance(patch, _ADAPTERS) or patch.weights[_DORA[patch.name]] is not None:
        return False
    return patch.name != "lora" or patch.weights[_RESHAPE] is None


def _is_difference(patch: Any) -> bool:
    return isinstance(patch, tuple) and len(patch) == 2 and patch[0] == "diff" and len(patch[1]) == 1
