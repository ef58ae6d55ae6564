"""LoRAs on a MODEL: any engine, any precision, any number of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.weight_adapter
import folder_paths
import torch

from .. import lora, lora_alpha, lora_files
from ..errors import LongCatError
from ..lora import Adapter, AnyAdapter, Difference, Factored
from . import formats, patch_keys

FOLDER = "loras"
_LISTED = 8
_KEY = "layer"


def names() -> list[str]:
    """The LoRA files that there are, pickles too, so that choosing one says why it is not read."""
    listed: list[str] = folder_paths.get_filename_list(FOLDER)
    return listed


def find(name: str) -> Path:
    """The file of a LoRA's name.

    Raises:
        LongCatError: there is none.
    """
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise LongCatError(
            f"There is no LoRA '{name}' in models/loras. Choose another, or refresh the nodes (R).",
            f"models/loras 中没有 LoRA“{name}”。请选择其他文件，或刷新节点（R）。",
        )
    return Path(path)


def fingerprint(name: str) -> str:
    """Changes when a LoRA file, or the PEFT configuration beside it, does.

    ComfyUI notes it in saved pictures, so it tells no folder.

    Raises:
        LongCatError: see :func:`find`.
    """
    path = find(name)
    places = [place for place in (path, path.parent / lora_alpha.CONFIG) if place.is_file()]
    return repr([(place.name, place.stat().st_mtime_ns, place.stat().st_size) for place in places])


def load(
    model: comfy.model_patcher.ModelPatcher, name: str, strength: float
) -> tuple[comfy.model_patcher.ModelPatcher, str]:
    """A clone of a MODEL with a LoRA file of the loras folder on it, and a report, line by line.

    Raises:
        LongCatError: see :func:`find`, :func:`lora_files.read` and :func:`apply`.
    """
    file = lora_files.read(find(name))
    patched, applied = apply(model, file.adapters, strength)
    lines = [f"{name}: {file.dialect}", applied, *file.notes]
    if file.unmatched:
        rest = ", …" if len(file.unmatched) > _LISTED else ""
        listed = ", ".join(file.unmatched[:_LISTED]) + rest
        lines.append(
            f"{len(file.unmatched)} keys are for no layer of the model and were left out "
            f"{len(file.unmatched)} 个键不对应模型的任何层，已略过: {listed}"
        )
    return patched, "\n".join(lines)


def apply(
    model: comfy.model_patcher.ModelPatcher, adapters: Sequence[AnyAdapter], strength: float
) -> tuple[comfy.model_patcher.ModelPatcher, str]:
    """A clone of a MODEL with the adapters live on it, and what they are, line by line.

    Weights that ComfyUI manages are patched as by core's LoraLoader; beside those of other libraries the adapters run
    as branches (:mod:`side_branches`). LoRAs that the MODEL already has stay. At strength 0 it draws what it drew.

    Raises:
        LongCatError: the MODEL is no LongCat-Image, there are no adapters, or one fits no layer of the model.
    """
    formats.scheduler_config(model)  # refuses what is no LongCat-Image
    if not adapters:
        raise LongCatError(
            "The LoRA matches no layer of the model. Choose a LoRA for LongCat-Image.",
            "该 LoRA 与模型的任何层都不匹配。请选择 LongCat-Image 的 LoRA。",
        )
    places = patch_keys.places(model.model)
    products: dict[Any, Any] = {}
    differences: dict[Any, Any] = {}
    for adapter in adapters:
        part = adapter.part if isinstance(adapter, Difference) else "weight"
        place = places.get(f"{adapter.module}.{part}")
        lora.require_fit(adapter, None if place is None else tuple(place.shape))
        assert place is not None
        (differences if isinstance(adapter, Difference) else products)[place.key] = _patch(adapter)
    patched = model.clone()
    if strength != 0:
        for patches in (products, differences):
            if patches:
                patched.add_patches(patches, strength)
    return patched, report(adapters, strength)


def report(adapters: Sequence[AnyAdapter], strength: float) -> str:
    """What adapters are and how strongly they are applied, line by line, in both languages."""
    layers = {adapter.module for adapter in adapters}
    kinds = Counter(_kind(adapter) for adapter in adapters)
    lines = [f"{len(layers)} layers matched, strength {strength:g} 匹配 {len(layers)} 层，强度 {strength:g}"]
    lines += [f"{kind}: {count}" for kind, count in kinds.most_common(_LISTED)]
    if len(kinds) > _LISTED:
        lines.append(f"… {len(kinds) - _LISTED} more kinds 另有 {len(kinds) - _LISTED} 种")
    return "\n".join(lines)


def _kind(adapter: AnyAdapter) -> str:
    if isinstance(adapter, Difference):
        return f"{adapter.part} difference 差值"
    name = "LoRA" if isinstance(adapter, Adapter) else {"loha": "LoHa", "lokr": "LoKr"}[adapter.algorithm]
    if adapter.rank is None:
        return f"{name}, full matrices 完整矩阵"
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    return f"{name}, rank 秩 {adapter.rank}, alpha {alpha:g} (scale 缩放 {adapter.scale:g})"


def _patch(adapter: AnyAdapter) -> Any:
    if isinstance(adapter, Difference):
        return ("diff", (adapter.values,))
    if isinstance(adapter, Factored):
        kind: Any = _FACTORED[adapter.algorithm]
        return _adapter(kind, adapter.factors, adapter.alpha)
    matrices = {"lora_down.weight": adapter.down, "lora_up.weight": adapter.up}
    return _adapter(comfy.weight_adapter.LoRAAdapter, matrices, adapter.alpha)


_FACTORED = {"loha": comfy.weight_adapter.LoHaAdapter, "lokr": comfy.weight_adapter.LoKrAdapter}


def _adapter(kind: Any, tensors: Mapping[str, torch.Tensor], alpha: float | None) -> Any:
    """ComfyUI's adapter, made as its own loaders make it."""
    named = {f"{_KEY}.{name}": tensor.detach() for name, tensor in tensors.items()}
    return kind.load(_KEY, named, alpha, None, set())
