"""LongCatSaveCheckpoint: what is loaded, written as an official folder or as ComfyUI's single files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from transformers import PreTrainedTokenizerBase

from .. import checkpoints, component_files, layouts, official_folder, precision, saving, single_files, verification
from ..errors import LongCatError
from ..precision import Preset
from ..saving import Entry
from ..tensor_files import DTYPES
from . import files, host, kitchen, loaded_weights
from .loaded_weights import Loaded

FOLDER, FILES = "folder", "comfyui"
LAYOUTS = (FOLDER, FILES)
KEEP = "keep"
PACKED = tuple(name for name, preset in precision.PRESETS.items() if preset.backend == "kitchen")
PRECISIONS = (KEEP, *precision.PLAIN, *PACKED)
_TOKENIZER_TEXTS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class _File:
    target: Path
    contents: Mapping[str, Entry]
    metadata: Mapping[str, str]


def save(
    model: comfy.model_patcher.ModelPatcher | None,
    clip: comfy.sd.CLIP | None,
    vae: comfy.sd.VAE | None,
    name: str,
    layout: str,
    precision_name: str,
    overwrite: bool,
) -> str:
    """Write what is connected, all of it or nothing; a report of what was written, line by line.

    Raises:
        LongCatError: a part is missing or not LongCatLoader's, name, layout and precision do not go together, the
            name is taken, or the disk is full.
    """
    path = check(name, layout, precision_name)
    if not any((model, clip, vae)) or (layout == FOLDER and not all((model, clip, vae))):
        raise _parts_missing(layout)
    parts = [loaded_weights.of_model(model)] if model else []
    parts += [loaded_weights.of_clip(clip)] if clip else []
    parts += [loaded_weights.of_vae(vae)] if vae else []
    tokenizer = _tokenizer_texts(clip.tokenizer.tokenizer) if clip else {}
    write = _write_folder if layout == FOLDER else _write_files
    lines = write(path, parts, precision_name, tokenizer, overwrite)
    for part in parts:
        if part.patches:
            lines.append(
                f"{part.part}: {part.patches} weights with LoRA or other patches baked in "
                f"已合并 {part.patches} 个权重上的 LoRA 等补丁"
            )
        lines += [f"{part.part}: {note}" for note in part.notes]
    return "\n".join(lines)


def check(name: str, layout: str, precision_name: str) -> Path:
    """The relative path of a name, if it can be written in that layout and precision.

    Raises:
        LongCatError: see :func:`saving.check_name`; or an official folder would be quantised.
    """
    if layout == FOLDER and precision_name in PACKED:
        raise LongCatError(
            f"An official folder cannot hold {precision_name} weights. Choose the layout comfyui, or a precision of "
            f"{', '.join((KEEP, *precision.PLAIN))}.",
            f"官方目录结构不能存放 {precision_name} 权重。请选择 comfyui 结构，"
            f"或以下精度之一：{', '.join((KEEP, *precision.PLAIN))}。",
        )
    return Path(saving.check_name(name))


def targets(path: Path) -> dict[str, Path]:
    """The three files that a name stands for, by part; LongCatLoader offers only those called longcat…."""
    name = path.name.removesuffix(files.SUFFIX)
    stem = name if name.lower().startswith(files.LISTED) else f"{files.LISTED}_{name}"
    return {
        part: host.write_folder(kind) / path.parent / files.companion(stem, part) for part, kind in files.KINDS.items()
    }


def _write_folder(
    path: Path, parts: list[Loaded], precision_name: str, tokenizer: Mapping[str, str], overwrite: bool
) -> list[str]:
    target = host.write_folder(host.MODEL_FOLDER) / path
    contents = {part.part: _official(part, precision_name) for part in parts}
    quantised = {part.part: part.quantised for part in parts if part.quantised and precision_name == KEEP}
    presets = {part: kept.preset.name for part, kept in quantised.items()}
    size = saving.total(list(contents.values()))
    with saving.staged(overwrite) as staging:
        folder = staging.place(target)
        saving.require_space(target, size)
        folder.mkdir()
        sources = {part.part: part.checkpoint for part in parts}
        complete = official_folder.write_rest(folder, sources, tokenizer, presets)
        tick = _progress(size)
        for part, entries in contents.items():
            layers = quantised[part].layers if part in quantised else {}
            saving.write_file(folder / official_folder.WEIGHTS[part], entries, component_files.header(layers), tick)
        verification.verify(checkpoints.open_checkpoint(folder))
    lines = [f"{target}: {_size(size)}"]
    lines += [f"{part}: {presets.get(part) or _dtypes(entries)}" for part, entries in contents.items()]
    missing = (
        "text_processor is missing: the CLIP's checkpoint has none. LongCatLoader does not need it. "
        "缺少 text_processor：CLIP 的来源中没有；LongCatLoader 不需要它。"
    )
    return lines if complete else [*lines, missing]


def _write_files(
    path: Path, parts: list[Loaded], precision_name: str, tokenizer: Mapping[str, str], overwrite: bool
) -> list[str]:
    places = targets(path)
    with saving.staged(overwrite) as staging:
        temporary = {part.part: staging.place(places[part.part]) for part in parts}
        written = [
            _File(places[part.part], _single_file(part, precision_name), _metadata(part, tokenizer)) for part in parts
        ]
        for file in written:
            saving.require_space(file.target.parent, saving.total([other.contents for other in written]))
        tick = _progress(saving.total([file.contents for file in written]))
        for part, file in zip(parts, written, strict=True):
            saving.write_file(temporary[part.part], file.contents, file.metadata, tick)
        if len(parts) == len(single_files.PARTS):
            verification.verify(single_files.open_single_files(temporary, files.tokenizer_folder()))
    return [f"{file.target}: {_dtypes(file.contents)}, {_size(saving.total([file.contents]))}" for file in written]


def _official(part: Loaded, precision_name: str) -> dict[str, Entry]:
    """A part's tensors for an official folder."""
    if part.formats and part.quantised is None and precision_name == KEEP:
        formats = ", ".join(sorted(part.formats))
        raise LongCatError(
            f"The {part.part} is loaded in {formats}, which an official folder cannot hold. Choose the layout "
            f"comfyui, or a precision of {', '.join(precision.PLAIN)} to multiply the weights out.",
            f"{part.part} 以 {formats} 加载，官方目录结构不能存放。请选择 comfyui 结构，"
            f"或选择 {', '.join(precision.PLAIN)} 之一以还原权重。",
        )
    dtype = _dtype(precision_name)
    tensors = part.plain(dtype) if dtype is not None else part.tensors
    outlines = {key: value.shape for key, value in tensors.items()}
    plan = layouts.plan_official(outlines) if layouts.is_core(outlines) else None
    return saving.entries(tensors, plan, dtype)


def _single_file(part: Loaded, precision_name: str) -> dict[str, Entry]:
    """A part's tensors for a file in ComfyUI's layout; the VAE is never quantised."""
    if part.part == "vae":
        return saving.entries(layouts.vae_to_single_file(part.tensors), None, _dtype(precision_name))
    if precision_name in PACKED:
        return _packed(part, precision.PRESETS[precision_name])
    dtype = _dtype(precision_name)
    if dtype is None and part.quantised is not None:
        raise _no_single_file(part.part, part.quantised.preset)
    tensors = part.plain(dtype) if dtype is not None else part.tensors
    return saving.entries(tensors, _core_plan(part, tensors), dtype)


def _packed(part: Loaded, preset: Preset) -> dict[str, Entry]:
    if part.formats - {preset.format}:
        loaded = ", ".join(sorted(part.formats))
        raise LongCatError(
            f"The {part.part} is loaded in {loaded}; quantising it again as {preset.name} would lose more than either. "
            "Load it in bf16, or choose keep.",
            f"{part.part} 以 {loaded} 加载；再量化为 {preset.name} 会损失更多。请以 bf16 加载，或选择 keep。",
        )
    if part.formats:
        return saving.entries(part.tensors, None)
    plan = _core_plan(part, part.tensors) or {key: (layouts.Rows(key),) for key in part.tensors}
    tensors = layouts.arrange(plan, {key: value.to("cpu") for key, value in part.tensors.items()})
    packed: dict[str, torch.Tensor] = {}
    for key in tensors:
        comfy.model_management.throw_exception_if_processing_interrupted()
        layer = key.removesuffix(".weight").removeprefix("model.")
        if key.endswith(".weight") and precision.is_quantised(part.part, layer):
            packed.update(kitchen.pack(key, tensors[key], preset, tensors[key].dtype))
        else:
            packed[key] = tensors[key]
    return saving.entries(packed)


def _core_plan(part: Loaded, tensors: Mapping[str, torch.Tensor]) -> layouts.Plan | None:
    if part.part != "transformer" or layouts.is_core(tensors):
        return None
    return layouts.plan_core({key: value.shape for key, value in tensors.items()})


def _metadata(part: Loaded, tokenizer: Mapping[str, str]) -> dict[str, str]:
    configs = part.checkpoint.configs
    if part.part == "transformer":
        own = {name: configs[name] for name in ("transformer", "scheduler")}
        return single_files.metadata(own, pipeline=part.checkpoint.flavour.pipeline)
    more: dict[str, Any] = {"tokenizer": dict(tokenizer)} if part.part == "text_encoder" else {}
    return single_files.metadata({part.part: configs[part.part]}, **more)


def _tokenizer_texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    with TemporaryDirectory(prefix="longcat-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        paths = [Path(folder) / name for name in _TOKENIZER_TEXTS]
        return {path.name: path.read_text(encoding="utf-8") for path in paths if path.is_file()}


def _progress(total: int) -> saving.Tick:
    bar = comfy.utils.ProgressBar(total)

    def tick(size: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(size)

    return tick


def _dtype(precision_name: str) -> torch.dtype | None:
    return precision.PRESETS[precision_name].dtype if precision_name in precision.PLAIN else None


def _dtypes(contents: Mapping[str, Entry]) -> str:
    sizes: dict[str, int] = {}
    for entry in contents.values():
        name = DTYPES[entry.dtype]
        sizes[name] = sizes.get(name, 0) + entry.size
    return " + ".join(name for name, _ in sorted(sizes.items(), key=lambda item: -item[1]) if name != "U8")


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GB" if size >= 2**30 else f"{size / 2**20:.1f} MB"


def _no_single_file(part: str, preset: Preset) -> LongCatError:
    plain = ", ".join(precision.PLAIN)
    return LongCatError(
        f"The {part} is loaded in {preset.name}, for which ComfyUI has no file layout: its loaders could not read the "
        f"file. Choose the layout folder, or a precision of {plain} to multiply the weights out.",
        f"{part} 以 {preset.name} 加载，ComfyUI 没有对应的单文件结构，其加载器无法读取。请选择 folder 结构，"
        f"或选择 {plain} 之一以还原权重。",
    )


def _parts_missing(layout: str) -> LongCatError:
    if layout == FOLDER:
        return LongCatError(
            "An official folder needs model, clip and vae. Connect all three, or choose the layout comfyui.",
            "官方目录结构需要模型、CLIP 和 VAE。请全部连接，或选择 comfyui 结构。",
        )
    return LongCatError(
        "There is nothing to save. Connect model, clip or vae.", "没有可保存的内容。请连接模型、CLIP 或 VAE。"
    )
