"""Presets that another library brings: optimum-quanto's int8 and int4, torchao's fp8.

The model is quantised in place, layer by layer, so the device never holds more than one layer in full precision.
Which layers: :func:`precision.is_quantised`. ComfyUI's own formats are made in ``comfy_bridge.kitchen``.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import precision
from .errors import LongCatError
from .precision import Preset

# The module that makes a backend's layers, and the package that it needs.
BACKENDS = {"quanto": ("quanto_layers", "optimum-quanto"), "torchao": ("torchao_layers", "torchao")}

Progress = Callable[[int, int], None]


def quantise(
    model: nn.Module,
    component: str,
    preset: Preset,
    device: torch.device | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Replace the model's linear layers that the preset names by quantised ones, and check that it took.

    The compute dtype is that of the model's weights and cannot be changed afterwards. The new weights need no
    gradient and are no inference tensors, so a LoRA can be trained beside them.

    Args:
        model: of plain ``nn.Linear`` layers under their official names.
        component: a key of ``precision.QUANTISED``.
        device: where the work is done, one layer at a time; results go back to where the layer was. None: there.
        progress: called with (layers done, layers in all).

    Raises:
        LongCatError: see :func:`require` and :func:`verify`; or torchao is asked for and the weights are not bf16.
    """
    layers = dict(_chosen(model, component))
    first = next(iter(layers.values()), None)
    library = require(preset, device or (first.weight.device if first is not None else torch.device("cpu")))
    with torch.inference_mode(False), torch.no_grad():
        for done, name in enumerate(layers):
            layer = layers[name]
            layers[name] = None  # the model alone holds it, so that its full-precision weights are freed
            home = layer.weight.device
            model.set_submodule(name, library.quantised(layer.to(device or home), preset).to(home))
            progress(done + 1, len(layers))
    verify(model, component, preset)
    guard_fusing(model)


def require(preset: Preset, device: torch.device) -> Any:
    """The module that makes the preset's layers, if it can be imported and the device has its kernels.

    Raises:
        LongCatError: the package is missing or does not fit the installed torch, or the device lacks the kernels.
    """
    library = backend(preset)
    library.require(preset, device)
    return library


def backend(preset: Preset) -> Any:
    """The module that makes the preset's layers.

    Raises:
        LongCatError: the package is missing or does not fit the installed torch.
    """
    module, package = BACKENDS[preset.backend]
    try:
        return importlib.import_module(f".{module}", __package__)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise LongCatError(
            f"The precision '{preset.name}' needs the Python package '{package}', which cannot be used here: {error}. "
            f"Install it with: pip install -U {package}. Or choose bf16.",
            f"精度“{preset.name}”需要 Python 包“{package}”，但此处无法使用：{error}。"
            f"请运行 pip install -U {package}，或选择 bf16。",
        ) from error


def verify(model: nn.Module, component: str, preset: Preset) -> None:
    """Check that every layer that the preset names holds weights of its format, in storage that its kernels take.

    Raises:
        LongCatError: a layer holds plain weights or those of another format, or the model has no layer of these names.
    """
    library = backend(preset)
    layers = dict(_chosen(model, component))
    plain = [name for name, layer in layers.items() if not library.took(layer, preset)]
    if plain or not layers:
        raise precision.did_not_take(preset, component, plain, len(layers))


def quantised_layers(model: nn.Module) -> list[str]:
    """Names of the layers whose weights are stored quantised, by whatever library."""
    return [name for name, layer in model.named_modules() if is_packed(getattr(layer, "weight", None))]


def is_packed(tensor: object) -> bool:
    """Whether a tensor wraps others, as quantised weights do."""
    return hasattr(tensor, "__tensor_flatten__")


def leaves(tensor: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors that one consists of, by dotted names that begin with ``name``."""
    if not is_packed(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from leaves(getattr(tensor, part), f"{name}.{part}")


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as they are stored; a quantised weight itself claims its compute dtype."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(leaf.nbytes for tensor in tensors for _, leaf in leaves(tensor, ""))


def check_group_offload(preset: Preset, disk: bool) -> None:
    """Refuse diffusers' group offload of weights that it cannot move: it exchanges a tensor, but not its parts.

    Args:
        disk: whether the weights would wait in a file.

    Raises:
        LongCatError: the weights are quanto's, or torchao's and would wait in a file.
    """
    if preset.backend == "quanto" or (preset.backend == "torchao" and disk):
        place = (" to the disk", "到磁盘") if preset.backend == "torchao" else ("", "")
        raise LongCatError(
            f"Group offload cannot move weights of the precision '{preset.name}'{place[0]}. Choose bf16 with group "
            "offload, or switch group offload off.",
            f"分组卸载无法移动精度“{preset.name}”的权重{place[1]}。请选择 bf16 与分组卸载，或关闭分组卸载。",
        )


def guard_fusing(model: nn.Module) -> None:
    """Make diffusers' ``fuse_lora`` of this model refuse; adapters beside the weights stay allowed.

    Merged into quantised weights they would be dropped without a word.
    """
    if hasattr(model, "fuse_lora"):
        model.fuse_lora = _refuse_fusing


def _refuse_fusing(*args: Any, **kwargs: Any) -> None:
    raise LongCatError(
        "A LoRA cannot be merged into quantised weights: it would be lost. Keep it beside them, or merge it into a "
        "bf16 model and quantise that.",
        "LoRA 无法合并到量化权重中，否则会丢失。请保持其为旁路，或先合并到 bf16 模型再量化。",
    )


def _chosen(model: nn.Module, component: str) -> Iterator[tuple[str, Any]]:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and precision.is_quantised(component, name):
            yield name, layer
