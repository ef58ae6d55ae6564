"""LoRA files: every dialect in, one layout out (DESIGN.md D7).

What is written has alpha equal to the rank, with the scale in the matrices, since only that is applied with the right
scale everywhere: ComfyUI reads alpha from tensors and ignores headers; diffusers ignores tensors, and reads the header
only when it is told to expect safetensors; SimpleTuner's pipeline refuses a file that has alpha in both.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from . import lora_alpha, lora_dialects, lora_pairs, saving
from .errors import LongCatError
from .layouts import OUTSIDE
from .lora import Adapter, AnyAdapter
from .tensor_files import damaged

SUFFIX = ".safetensors"
FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
SETTINGS = "longcat_settings"
_PREFIX = "transformer."
_PEFT = "base_model.model."  # only files with this prefix belong to a configuration that lies beside them
# ComfyUI finds these layers under its own names only (research, trainers.md 6).
_NATIVE = {official: core for core, officials in OUTSIDE.items() for official in officials if core.startswith("time")}
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle", ".pt2")


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds."""

    adapters: tuple[AnyAdapter, ...]
    unmatched: tuple[str, ...]  # keys that name no layer of the transformer
    dialect: str
    notes: tuple[str, ...]  # where alpha comes from, line by line, in both languages
    metadata: Mapping[str, str]  # the file's header


def write(
    path: Path,
    adapters: Sequence[Adapter],
    settings: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    title: str = "",
    trigger_words: Sequence[str] = (),
) -> None:
    """Write adapters as one file, which is there complete or not at all; an older one is replaced.

    Args:
        settings: of the training run, kept in the header, where the alpha that was trained with belongs; must fit JSON.
        dtype: of the matrices; alphas are always float32.
        title: shown by model browsers; empty: the name of the file.
        trigger_words: words that call up what was learnt.

    Raises:
        LongCatError: there are no adapters, or the disk is full or cannot be written.
    """
    if not adapters:
        raise LongCatError(
            "There is nothing to write: the LoRA has no layers.", "没有可写入的内容：该 LoRA 不含任何层。"
        )
    tensors: dict[str, torch.Tensor] = {}
    for adapter in adapters:
        names = [_PREFIX + adapter.module]
        if adapter.module in _NATIVE:
            names.append(f"diffusion_model.{_NATIVE[adapter.module]}")
        for name in names:
            tensors[f"{name}.lora_A.weight"] = adapter.down.detach().to(dtype)
            tensors[f"{name}.lora_B.weight"] = (adapter.up.detach() * adapter.scale).to(dtype)
    contents = saving.entries(tensors)
    with saving.staged(overwrite=True, what=saving.LORA) as staging:
        temporary = staging.place(path)
        saving.require_space(path.parent, saving.total([contents]), saving.LORA)
        header = _header(adapters, settings or {}, title or path.stem, trigger_words)
        saving.write_file(temporary, contents, header, lambda size: None)


def read(path: Path) -> LoraFile:
    """Read a LoRA file of any dialect, or a PEFT folder.

    Raises:
        LongCatError: the file is damaged, a pickle or no LoRA for this family, or holds something that could not be
            applied; the message names the key.
    """
    file = _weights_file(path)
    tensors, metadata = _load(file)
    if not tensors:
        raise LongCatError(
            f"'{file.name}' is an empty file: it holds no tensors. Choose another LoRA.",
            f"“{file.name}”是空文件，不含任何张量。请选择其他 LoRA。",
        )
    keys = {key: lora_dialects.parse(key) for key in tensors}
    found = {key: parsed for key, parsed in keys.items() if parsed is not None}
    if not found:
        raise _foreign(file, list(tensors))
    peft = any(key.startswith(_PEFT) for key in found)
    alphas = lora_alpha.from_header(metadata, file.name) or (lora_alpha.from_folder(file.parent) if peft else None)
    pairs = lora_pairs.Pairs(file.name, alphas, peft)
    adapters = pairs.build({key: (parsed, tensors[key]) for key, parsed in found.items()})
    return LoraFile(
        adapters,
        tuple(key for key, parsed in keys.items() if parsed is None),
        lora_dialects.summary(parsed.dialect for parsed in found.values()),
        pairs.notes(),
        metadata,
    )


def _header(
    adapters: Sequence[Adapter], settings: Mapping[str, Any], title: str, trigger_words: Sequence[str]
) -> dict[str, str]:
    config = lora_alpha.to_config({adapter.module: adapter.rank for adapter in adapters})
    flavour = settings.get("model_flavour")
    return {
        "format": "pt",
        lora_alpha.HEADER: json.dumps({_PREFIX + key: value for key, value in config.items()}, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"longcat_image-{flavour}/lora" if flavour else "longcat_image/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": title,
        **({"modelspec.trigger_phrase": ", ".join(trigger_words)} if trigger_words else {}),
        SETTINGS: json.dumps(dict(settings), ensure_ascii=False, sort_keys=True),
    }


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        found = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
        if found is not None:
            return found
        pickled = next((entry for entry in sorted(path.iterdir()) if entry.suffix.lower() in _PICKLES), None)
        if pickled is not None:
            raise _pickled(pickled)
        raise LongCatError(
            f"The folder '{path.name}' has no LoRA in it: expected {' or '.join(FOLDER_FILES)}.",
            f"文件夹“{path.name}”中没有 LoRA：应有 {' 或 '.join(FOLDER_FILES)}。",
        )
    if path.suffix.lower() in _PICKLES:
        raise _pickled(path)
    return path


def _load(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error


def _pickled(path: Path) -> LongCatError:
    return LongCatError(
        f"'{path.name}' is a pickle, which can run any program when it is opened, so it is not. Ask its author for a "
        f"{SUFFIX} file, or convert it on a machine where you trust it.",
        f"“{path.name}”是 pickle 文件，打开时可能执行任意程序，因此不予读取。请向作者索取 {SUFFIX} 文件，"
        "或在您信任的环境中转换。",
    )


def _foreign(file: Path, keys: Sequence[str]) -> LongCatError:
    shown = ", ".join(keys[:3])
    return LongCatError(
        f"None of the {len(keys)} keys of '{file.name}' names a layer of LongCat-Image, for example: {shown}. It is a "
        "LoRA for another model, or no LoRA at all.",
        f"“{file.name}”的 {len(keys)} 个键都不对应 LongCat-Image 的层，例如：{shown}。"
        "它属于其他模型，或根本不是 LoRA。",
    )
