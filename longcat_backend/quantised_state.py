"""Quantised weights to plain tensors with a map, and back.

A quantised weight is no tensor that a file can hold, and a library that finds its parts under unknown keys leaves
the layer randomly initialised with a warning. So the parts are saved by name beside a map of the layers, and loading
accepts exactly these.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from . import precision, quantisation
from .checkpoints import Checkpoint, audit, shapes
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
    with torch.inference_mode(False):  # in which quantised tensors cannot be detached
        for key, value in model.state_dict().items():
            if not key.endswith(_UNUSED):
                tensors.update(quantisation.leaves(value, key))
    return tensors, dict.fromkeys(quantisation.quantised_layers(model), preset.name)


def stored_preset(checkpoint: Checkpoint, component: str) -> Preset | None:
    """The preset that a component is stored in; None if its file holds no layers of such a preset.

    Raises:
        LongCatError: it is none of this pack's, or there are several.
    """
    outlines = checkpoint.packed(component)
    return None if outlines is None else _preset(outlines.packed)


def require_plain(checkpoint: Checkpoint, component: str) -> None:
    """Refuse a component that is stored quantised where weights of floating point are needed.

    Raises:
        LongCatError: it is.
    """
    preset = stored_preset(checkpoint, component)
    if preset is not None:
        raise LongCatError(
            f"The {component} of this checkpoint is stored in {preset.name}, and can be used in that precision only. "
            "Choose it, or the checkpoint that this one was made from.",
            f"此检查点的 {component} 以 {preset.name} 存储，只能以该精度使用。请选择该精度，或使用它的来源检查点。",
        )


def audit_quantised(
    model: nn.Module, component: str, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, str]
) -> None:
    """Compare the weights that a model of plain layers would have, quantised, with those of a file.

    Args:
        component: names the model in errors.
        tensors: by the model's names; with or without storage.
        layers: see :func:`quantised_state`.

    Raises:
        LongCatError: a key is missing, unknown or of another shape or kind; the map names a layer or a preset that
            there is not, or several presets; or the preset's package is missing.
    """
    preset = _preset(layers)
    library = quantisation.backend(preset)
    expected = dict(model.state_dict())
    for name in layers:
        plain = _plain(model, name, preset)
        del expected[f"{name}.weight"]
        expected.update(quantisation.leaves(library.outline(plain, preset), f"{name}.weight"))
    audit(component, shapes(expected), shapes(tensors))
    wrong = [key for key, value in expected.items() if _kind(value) != _kind(tensors[key])]
    if wrong:
        found = str(tensors[wrong[0]].dtype).removeprefix("torch.")
        raise LongCatError(
            f"The weights of '{component}' hold {found} in '{wrong[0]}', which is no number format of that layer. "
            "Save the file again.",
            f"“{component}”的权重在“{wrong[0]}”中为 {found}，不是该层的数值格式。请重新保存该文件。",
        )


def load_quantised(
    model: nn.Module,
    component: str,
    tensors: Mapping[str, torch.Tensor],
    layers: Mapping[str, str],
    device: torch.device,
    prepare: Callable[[nn.Module], None] = lambda model: None,
) -> None:
    """Put saved weights into a model of plain layers, on the CPU or without storage; dtypes are the file's.

    Every tensor is copied: one that is mapped from a file can begin at any byte, where the CPU's int8 kernel crashes.

    Args:
        component: a key of ``precision.QUANTISED``.
        tensors: see :func:`quantised_state`.
        layers: see :func:`quantised_state`.
        device: where the model will run; its weights are left on the CPU.
        prepare: exchanges layers that are not quantised while the model has no weights yet.

    Raises:
        LongCatError: see :func:`audit_quantised`, :func:`quantisation.require` and :func:`quantisation.verify`.
    """
    preset = _preset(layers)
    library = quantisation.require(preset, device)
    audit_quantised(model, component, tensors, layers)
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):
            shells = {name: library.quantised(_plain(model, name, preset), preset) for name in layers}
        prepare(model)
        own = {key: value.clone() for key, value in tensors.items()}
        for name, shell in shells.items():
            _fill(shell, name, own)
            model.set_submodule(name, shell)
        model.load_state_dict(own, assign=True, strict=False)  # what is left; the keys were checked
        model.requires_grad_(False)
    quantisation.verify(model, component, preset)
    quantisation.guard_fusing(model)


def _preset(layers: Mapping[str, str]) -> Preset:
    names = sorted(set(layers.values()))
    preset = precision.PRESETS.get(names[0]) if len(names) == 1 else None
    if preset is None or preset.backend not in quantisation.BACKENDS:
        found = ", ".join(map(repr, names)) or "-"
        raise LongCatError(
            f"The file says that its layers are quantised to {found}, which this pack cannot load. Update the pack, "
            "or save the file again.",
            f"文件声明其各层量化为 {found}，本节点包无法加载。请更新节点包，或重新保存该文件。",
        )
    return preset


def _plain(model: nn.Module, name: str, preset: Preset) -> nn.Linear:
    """A layer without storage, of the sizes of the model's layer of that name."""
    found = dict(model.named_modules()).get(name)
    if not isinstance(found, nn.Linear):
        raise LongCatError(
            f"The file says that its layer '{name}' is quantised to '{preset.name}', but the model has no such linear "
            "layer. Save the file again.",
            f"文件声明其层“{name}”量化为“{preset.name}”，但模型没有这个线性层。请重新保存该文件。",
        )
    with torch.device("meta"), torch.inference_mode(False):
        return nn.Linear(found.in_features, found.out_features, found.bias is not None, dtype=torch.bfloat16)


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
