"""Quantised weights to plain tensors with a map, and back.

A quantised weight is no tensor that a file can hold, and a library that finds its parts under unknown keys leaves
the layer randomly initialised with a warning. So the parts are saved by name beside a map of the layers, and loading
accepts exactly these.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import precision, quantisation
from .checkpoints import audit, shapes
from .errors import LongCatError
from .precision import Preset

# quanto's scales for quantised activations, which no preset uses.
_UNUSED = (".input_scale", ".output_scale")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def quantised_state(model: nn.Module, preset: Preset) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The model's weights as plain tensors, and which layers hold the parts of a quantised one.

    Returns:
        Tensors by key, sharing memory with the model; and the map, layer name to preset name, for the file's header.
    """
    tensors: dict[str, torch.Tensor] = {}
    for key, value in model.state_dict().items():
        if not key.endswith(_UNUSED):
            tensors.update(quantisation.leaves(value, key))
    return tensors, dict.fromkeys(quantisation.quantised_layers(model), preset.name)


def load_quantised(
    model: nn.Module,
    component: str,
    tensors: Mapping[str, torch.Tensor],
    layers: Mapping[str, str],
    device: torch.device,
) -> None:
    """Put saved weights into a model of plain layers, on the CPU or without storage; dtypes are the file's.

    Every tensor is copied: one that is mapped from a file can begin at any byte, where the CPU's int8 kernel crashes.

    Args:
        component: names the model in errors.
        tensors: see :func:`quantised_state`.
        layers: see :func:`quantised_state`.
        device: where the model will run; its weights are left on the CPU.

    Raises:
        LongCatError: a key is missing, unknown or of another shape or kind; the map names a layer or a preset that
            there is not; or a backend is not available, see :func:`quantisation.require`.
    """
    shells = {name: _shell(model, name, preset_name, device) for name, preset_name in layers.items()}
    _check_tensors(model, component, shells, tensors)
    with torch.inference_mode(False), torch.no_grad():
        own = {key: value.clone() for key, value in tensors.items()}
        for name, shell in shells.items():
            _fill(shell, name, own)
            model.set_submodule(name, shell)
        model.load_state_dict(own, assign=True, strict=False)  # what is left; the keys were checked
        model.requires_grad_(False)
    quantisation.guard_fusing(model)


def _shell(model: nn.Module, name: str, preset_name: str, device: torch.device) -> nn.Module:
    """The quantised layer without storage, which says what its parts are called and how large they are."""
    found = dict(model.named_modules()).get(name)
    preset = precision.PRESETS.get(preset_name)
    if preset is None or not preset.backend or not isinstance(found, nn.Linear):
        raise LongCatError(
            f"The file says that its layer '{name}' is quantised to '{preset_name}', which this pack cannot load. "
            "Update the pack, or save the file again.",
            f"文件声明其层“{name}”量化为“{preset_name}”，本节点包无法加载。请更新节点包，或重新保存该文件。",
        )
    with torch.device("meta"), torch.inference_mode(False), torch.no_grad():
        plain = nn.Linear(found.in_features, found.out_features, found.bias is not None, dtype=torch.bfloat16)
        shell: nn.Module = quantisation.require(preset, device).quantised(plain, preset)
    return shell


def _check_tensors(
    model: nn.Module, component: str, shells: Mapping[str, nn.Module], tensors: Mapping[str, torch.Tensor]
) -> None:
    expected = dict(model.state_dict())
    for name, shell in shells.items():
        del expected[f"{name}.weight"]
        expected.update(quantisation.leaves(shell.weight, f"{name}.weight"))
    audit(component, shapes(expected), shapes(tensors))
    wrong = [key for key, value in expected.items() if _kind(value) != _kind(tensors[key])]
    if wrong:
        found = str(tensors[wrong[0]].dtype).removeprefix("torch.")
        raise LongCatError(
            f"The weights of '{component}' hold {found} in '{wrong[0]}', which is no number format of that layer. "
            "Save the file again.",
            f"“{component}”的权重在“{wrong[0]}”中为 {found}，不是该层的数值格式。请重新保存该文件。",
        )


def _kind(tensor: torch.Tensor) -> object:
    return "float" if tensor.dtype in _FLOATS else tensor.dtype


def _fill(shell: nn.Module, name: str, own: dict[str, torch.Tensor]) -> None:
    """Give the layer its tensors, taken out of ``own``."""
    shell.weight = nn.Parameter(_filled(shell.weight, f"{name}.weight", own), requires_grad=False)
    if shell.bias is not None:
        shell.bias = nn.Parameter(own.pop(f"{name}.bias"), requires_grad=False)
    for unused, _ in list(shell.named_buffers()):
        setattr(shell, unused, torch.ones((), dtype=shell.weight.dtype))


def _filled(shell: Any, key: str, own: dict[str, torch.Tensor]) -> Any:
    if not quantisation.is_packed(shell):
        return own.pop(key)
    parts, layout = shell.__tensor_flatten__()
    inner = {part: _filled(getattr(shell, part), f"{key}.{part}", own) for part in parts}
    return type(shell).__tensor_unflatten__(inner, layout, shell.size(), shell.stride())
