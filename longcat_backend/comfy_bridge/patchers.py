"""ComfyUI's memory managers for models that are not wholly made of ComfyUI's layers."""

import uuid
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import comfy.model_patcher
import torch
from torch import nn

from .. import quantisation
from ..errors import LongCatError
from ..modulation import ModulationTable
from ..quantisation import stored_bytes
from . import patch_keys, side_branches
from .castable import TabulatedLinear

_TABLE = "longcat_modulation"
_HOME = "longcat_home"
_HEADER = "lora_metadata"


def castable_patcher(
    model: nn.Module, load_device: torch.device, offload_device: torch.device, dynamic: bool = True
) -> Any:
    """The host's memory manager for a model whose large layers are castable: resident as far as it fits.

    Args:
        dynamic: use dynamic VRAM where the host does; on a CPU it never does.
    """
    static = load_device.type == "cpu" or not dynamic
    base = comfy.model_patcher.ModelPatcher if static else comfy.model_patcher.CoreModelPatcher
    return _castable_class(base)(model, load_device, offload_device, size=managed_size(model))


def whole_patcher(model: nn.Module, load_device: torch.device, offload_device: torch.device) -> Any:
    """A manager that moves the model as one piece: quantised layers of other libraries cannot be cast on use."""
    return _whole_class()(model, load_device, offload_device, size=managed_size(model))


def group_patcher(model: nn.Module, load_device: torch.device, offload_device: torch.device) -> Any:
    """A manager that leaves the weights to diffusers' group offload, which has hooked the model."""
    largest = max((stored_bytes(part) for part in _blocks(model)), default=1)
    return _group_class()(model, load_device, offload_device, size=2 * largest)


def is_group_offloaded(patcher: Any) -> bool:
    """Whether diffusers' group offload owns the model's weights."""
    return isinstance(patcher, _group_class())


def like(patcher: Any, make: Any) -> Any:
    """A patcher made by ``make`` in the place of one that ComfyUI made for a text encoder."""
    made = make(patcher.model, patcher.load_device, patcher.offload_device)
    made.is_clip = True
    made.hook_mode = patcher.hook_mode
    return made


def set_table(model: nn.Module, table: ModulationTable) -> None:
    """Let the patchers of a model know its modulation table."""
    setattr(model, _TABLE, table)


def get_table(model: nn.Module) -> ModulationTable | None:
    """The modulation table of a model, if it has one."""
    table: ModulationTable | None = getattr(model, _TABLE, None)
    return table


def managed_size(model: nn.Module) -> int:
    """Bytes of the weights that go to the device, as they are stored: all but those of tabulated layers."""
    tabulated = [layer for layer in model.modules() if isinstance(layer, TabulatedLinear)]
    return stored_bytes(model) - sum(stored_bytes(layer) for layer in tabulated)


@lru_cache
def _castable_class(base: Any) -> Any:
    class CastablePatcher(base):
        """Weights of castable layers are managed by ``base``; tabulated layers stay on the CPU.

        The rest, norms and buffers of a few kilobytes, always goes to the device, since no layer of the other
        libraries would fetch it.
        """

        def _load_list(self, *args: Any, **kwargs: Any) -> list[Any]:
            entries = super()._load_list(*args, **kwargs)
            return [entry for entry in entries if _is_managed(entry[-2], self.is_dynamic())]

        def load(self, device_to: Any = None, *args: Any, **kwargs: Any) -> Any:
            """As in the base class; then bring along what it does not manage, and keep the table true."""
            result = super().load(device_to, *args, **kwargs)
            if not self.is_dynamic():
                _move_small_parts(self.model, device_to)
            _patch_tabulated(self.model, self.patches)
            _sync_table(self.model, self.patches_uuid)
            return result

        def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
            """As in the base class, but patches for a transformer's layers arrive, or it says why they do not."""
            if patch_keys.is_transformer(self.model):
                patches = patch_keys.translated(self.model, patches)
                self.longcat_latest = patches
            return super().add_patches(patches, strength_patch, strength_model)

        def set_attachments(self, key: str, attachment: Any) -> None:
            """As in the base class; core's LoRA loader attaches the header of the file that it has just applied."""
            if key == _HEADER and patch_keys.is_transformer(self.model):
                patch_keys.require_header(self.model, getattr(self, "longcat_latest", {}), attachment)
            super().set_attachments(key, attachment)

        def add_hook_patches(self, hook: Any, patches: Any, *args: Any, **kwargs: Any) -> Any:
            """As :meth:`add_patches`, for patches that come and go while it samples."""
            if patch_keys.is_transformer(self.model):
                patches = patch_keys.translated(self.model, patches)
            return super().add_hook_patches(hook, patches, *args, **kwargs)

        def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
            """As in the base class; the rows go with the weights, as both take memory of the device."""
            if unpatch_weights:
                _sync_table(self.model, None)
            with torch.inference_mode(_mode(self.backup)):
                super().unpatch_model(device_to, unpatch_weights)

        def apply_hooks(self, hooks: Any, *args: Any, **kwargs: Any) -> Any:
            """Weight hooks change weights between steps, and the rows with them."""
            if hooks != self.current_hooks:
                _sync_table(self.model, None)
            return super().apply_hooks(hooks, *args, **kwargs)

    return CastablePatcher


@lru_cache
def _whole_class() -> Any:
    class WholePatcher(_castable_class(comfy.model_patcher.ModelPatcher)):  # type: ignore[misc]
        """All or nothing; its weights stay as they are, and LoRAs run beside them."""

        def partially_load(self, device_to: Any, *args: Any, **kwargs: Any) -> Any:
            """As in the base class, which would move all weights to and fro where another clone was loaded."""
            if self.model.model_loaded_weight_memory and self.model.current_weight_patches_uuid != self.patches_uuid:
                _note_loaded(self, device_to)
            return super().partially_load(device_to, *args, **kwargs)

        def partially_unload(self, *args: Any, **kwargs: Any) -> int:
            """Free nothing, so that the host unloads all of it; torchao's weights could not be asked for their size."""
            return 0

        def load(self, device_to: Any = None, *args: Any, **kwargs: Any) -> None:
            """Copy all weights to the device; the originals wait where they are, so unloading copies nothing."""
            if not _is_away(self.model):
                _copy_to(self.model, device_to)
            _note_loaded(self, device_to)

        def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
            """Put the originals back; there is nothing left for the base class to move."""
            if unpatch_weights:
                side_branches.remove(self.model)
                _take_home(self.model)
            super().unpatch_model(None, unpatch_weights)

        def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
            """Note LoRAs for the side branches; refuse what would change nothing, and say nothing."""
            if not patch_keys.is_transformer(self.model):
                _refuse_patches(self.model, patches)
                return super().add_patches(patches, strength_patch, strength_model)
            patches = patch_keys.translated(self.model, patches)
            own = {key: patch for key, patch in patches.items() if patch_keys.names_layer(self.model, key)}
            linear = {place.key for place in patch_keys.places(self.model).values()}
            for key, patch in own.items():
                side_branches.require_possible(key, patch, strength_model, key in linear)
            for key, patch in own.items():
                self.patches.setdefault(key, []).append((strength_patch, patch, strength_model, None, None))
            self.patches_uuid = uuid.uuid4()
            self.longcat_latest = patches
            return list(own)

        def add_hook_patches(self, hook: Any, patches: Any, *args: Any, **kwargs: Any) -> Any:
            """Refuse: side branches stay the same while it samples."""
            if patch_keys.is_transformer(self.model):
                patches = patch_keys.translated(self.model, patches)
            _refuse_patches(self.model, patches)
            return super().add_hook_patches(hook, patches, *args, **kwargs)

    return WholePatcher


@lru_cache
def _group_class() -> Any:
    class GroupPatcher(_whole_class()):  # type: ignore[misc]
        """Counts as loaded and moves nothing: the weights' only owner is the group offload."""

        def load(self, device_to: Any = None, *args: Any, **kwargs: Any) -> None:
            """Note that the model is in use on the device."""
            _note_loaded(self, device_to)

    return GroupPatcher


def _note_loaded(patcher: Any, device: Any) -> None:
    patcher.model.device = device
    patcher.model.model_loaded_weight_memory = patcher.model_size()
    patcher.model.current_weight_patches_uuid = None  # should the device's memory end in the next lines
    if patch_keys.is_transformer(patcher.model):
        side_branches.install(patcher.model, patcher.patches, device, _compute_dtype(patcher.model))
        _patch_tabulated(patcher.model, patcher.patches)
    _sync_table(patcher.model, patcher.patches_uuid)
    patcher.model.current_weight_patches_uuid = patcher.patches_uuid


def _compute_dtype(model: Any) -> torch.dtype:
    dtype: torch.dtype = model.manual_cast_dtype or model.get_dtype()
    return dtype


def _refuse_patches(model: nn.Module, patches: Any) -> None:
    """Patches on weights of this kind would change nothing, and say nothing."""
    if any(patch_keys.names_layer(model, key) for key in patches):
        raise LongCatError(
            "Weights of this precision or offload cannot be patched, nor changed while it samples. Choose bf16, or "
            "fp8 or int8 of the core engine, in LongCatLoader.",
            "该精度或卸载方式的权重无法打补丁，也不能在采样过程中改变。"
            "请在 LongCatLoader 中选择 bf16，或 core 引擎的 fp8、int8。",
        )


def _is_away(model: nn.Module) -> bool:
    return bool(getattr(model, _HOME, None))


@torch.inference_mode(False)  # in which quantised tensors can be neither copied nor made parameters
def _copy_to(model: nn.Module, device: Any) -> None:
    """Put copies on the device in the place of parameters and buffers, and keep the originals."""
    home: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for layer in model.modules():
            if not isinstance(layer, TabulatedLinear):
                for tensors in (layer._parameters, layer._buffers):
                    for name, original in tensors.items():
                        if original is not None:
                            copy = original.to(device)
                            is_parameter = isinstance(original, nn.Parameter)
                            tensors[name] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
                            home.append((tensors, name, original))
    finally:  # half a model on the device has to find its way back too
        setattr(model, _HOME, home)


def _take_home(model: nn.Module) -> None:
    for tensors, name, original in getattr(model, _HOME, ()):
        tensors[name] = original
    setattr(model, _HOME, [])


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for layer in model.modules():
        if isinstance(layer, nn.ModuleList):
            yield from layer


def _mode(backup: dict[str, Any]) -> bool:
    """The inference mode in which patched weights can be put back.

    Quantised weights that nodes loaded are tensors of inference mode. Put back outside of it, as by ComfyUI's button
    that unloads all models, they would be no longer, and could neither be patched nor put back again within it.
    """
    packed = (kept.weight for kept in backup.values() if quantisation.is_packed(kept.weight))
    weight = next(packed, None)
    return torch.is_inference_mode_enabled() if weight is None else weight.is_inference()


def _is_managed(layer: nn.Module, dynamic: bool) -> bool:
    # Dynamic VRAM brings the small parts to the device by itself.
    return not isinstance(layer, TabulatedLinear) and (dynamic or hasattr(layer, "comfy_cast_weights"))


def _move_small_parts(model: nn.Module, device: Any) -> None:
    for layer in model.modules():
        if not hasattr(layer, "comfy_cast_weights"):
            for parameter in layer._parameters.values():
                if parameter is not None:
                    parameter.data = parameter.data.to(device)
            for name, buffer in layer._buffers.items():
                if buffer is not None:
                    layer._buffers[name] = buffer.to(device)


def _patch_tabulated(model: nn.Module, patches: dict[str, Any]) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, TabulatedLinear):
            for part in ("weight", "bias"):
                key = f"{name}.{part}"
                functions = [comfy.model_patcher.LowVramPatch(key, patches)] if key in patches else []
                setattr(layer, f"{part}_function", functions)


def _sync_table(model: nn.Module, version: Any) -> None:
    table = get_table(model)
    if table is not None:
        table.sync(version)
