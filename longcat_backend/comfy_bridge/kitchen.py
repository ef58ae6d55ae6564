"""Presets of ComfyUI's own quantised layers (comfy-kitchen): weights quantised one by one while loading."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from torch import nn

from .. import precision
from ..precision import Preset
from . import devices

# What the layout is asked for: one scale per output channel halves the error of int8 and costs nothing.
_QUANTISE: dict[str, dict[str, Any]] = {
    "float8_e4m3fn": {"scale": "recalculate"},
    "int8_tensorwise": {"per_channel": True},
}


def operations(dtype: torch.dtype, preset: Preset, weight_only: bool = False) -> Any:
    """ComfyUI's layers that hold quantised weights and compute in ``dtype``.

    Args:
        weight_only: unpack each weight when it is used instead of multiplying in its format: less error, and the
            better choice for a few tokens.
    """
    cpu = comfy.model_management.get_torch_device().type == "cpu"
    unpack = weight_only or (cpu and preset.format == "float8_e4m3fn")  # there is no such product on a CPU
    return comfy.ops.mixed_precision_ops({}, dtype, full_precision_mm=unpack)


def quantise(
    weights: Mapping[str, torch.Tensor],
    component: str,
    preset: Preset,
    dtype: torch.dtype,
    stored: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, torch.Tensor]:
    """Weights under the keys of ComfyUI's quantised layers; those that the preset leaves alone are cast.

    Each weight visits the device by itself, so there is never a full-precision copy of the model on it.

    Args:
        weights: a component's tensors, by the names of the layers that they will be loaded into.
        dtype: of the tensors that are not quantised, and of the computation.
        stored: weights that the checkpoint already holds in the preset's format, see
            :meth:`checkpoints.Checkpoint.quantised`; they are taken as they are.
        progress: called with (layers done, layers in all).
    """
    chosen = _chosen(weights, component)
    stored = stored or {}
    quantised = {key: weights[key].to(dtype) for key in weights if key not in chosen}
    for done, key in enumerate(sorted(chosen)):
        quantised.update(stored[key] if key in stored else pack(key, weights[key], preset, dtype))
        progress(done + 1, len(chosen))
    return quantised


def pack(key: str, weight: torch.Tensor, preset: Preset, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One weight in the preset's format with its companions, on the CPU, by the keys that they have in a file.

    Args:
        dtype: in which the weight is quantised.
    """
    algorithm = QUANT_ALGOS[preset.format]
    policy = devices.policy()
    # MPS has no 8-bit floats; there they can be made and used on the CPU only, as by an encoder that stays on it.
    place = policy.device if policy.holds(algorithm["storage_t"]) else torch.device("cpu")
    on_device = weight.to(device=place, dtype=dtype)
    packed = QuantizedTensor.from_float(on_device, algorithm["comfy_tensor_layout"], **_QUANTISE[preset.format])
    tensors = {name: value.cpu() for name, value in packed.state_dict(key).items()}
    return {**tensors, f"{key.removesuffix('weight')}comfy_quant": _marker(preset.format)}


def verify(model: nn.Module, component: str, preset: Preset) -> None:
    """Check that every layer that the preset names holds weights of its format.

    Raises:
        LongCatError: a layer does not, or there is no such layer.
    """
    layout = QUANT_ALGOS[preset.format]["comfy_tensor_layout"]
    layers = {name: layer for name, layer in model.named_modules() if precision.is_quantised(component, name)}
    plain = [name for name, layer in layers.items() if getattr(layer.weight, "_layout_cls", None) != layout]
    if plain or not layers:
        raise precision.did_not_take(preset, component, plain, len(layers))


def _chosen(weights: Iterable[str], component: str) -> set[str]:
    suffix = ".weight"
    return {
        key for key in weights if key.endswith(suffix) and precision.is_quantised(component, key.removesuffix(suffix))
    }


def _marker(quant_format: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": quant_format}).encode()), dtype=torch.uint8)
