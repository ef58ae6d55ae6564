"""Find, identify and read a LongCat-Image checkpoint in the official (diffusers) folder layout.

Every weight that is read is audited against the shapes its own config asks for, because ComfyUI and
diffusers both only log a missing key and go on with random weights (DESIGN.md trap 6).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from . import flavours
from .errors import LongCatError

COMPONENTS = ("transformer", "vae", "text_encoder", "scheduler")
SEARCH_DEPTH = 3


@dataclass(frozen=True)
class Checkpoint:
    """An official folder whose configs were read; no weight has been touched yet."""

    folder: Path
    flavour: flavours.Flavour
    configs: Mapping[str, Mapping[str, Any]]

    def weights(self, component: str) -> dict[str, torch.Tensor]:
        """All tensors of a component, by their name in the file, on the CPU."""
        return read_weights(self.folder / component)


def list_checkpoints(roots: Iterable[Path]) -> dict[str, Path]:
    """LongCat-Image folders up to three levels below the roots, by their path relative to the root.

    The first root wins where two hold the same relative path.
    """
    found: dict[str, Path] = {}
    for root in roots:
        for depth in range(1, SEARCH_DEPTH + 1):
            for index in sorted(root.glob("/".join(["*"] * depth + ["model_index.json"]))):
                if _pipeline_class(index.parent) in (flavours.TEXT_TO_IMAGE, flavours.EDIT):
                    found.setdefault(index.parent.relative_to(root).as_posix(), index.parent)
    return found


def resolve_checkpoint(name: str, roots: Sequence[Path]) -> Path:
    """The folder that a checkpoint name from a graph stands for.

    Graphs come from anywhere, so a name may only point below the model folders.

    Raises:
        LongCatError: the name leaves the model folders, or no folder of that name holds a LongCat-Image checkpoint.
    """
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or ".." in PureWindowsPath(name).parts:
        raise LongCatError(
            f"The checkpoint name '{name}' points outside the model folders. Choose a name from the list of "
            "LongCatLoader; to use another place, add it to ComfyUI's extra_model_paths.yaml.",
            f"检查点名称“{name}”指向模型文件夹之外。请从 LongCatLoader 的列表中选择；"
            "若要使用其他位置，请把它加入 ComfyUI 的 extra_model_paths.yaml。",
        )
    for root in roots:
        if name and (root / name).is_dir():
            return root / name
    listed = ", ".join(sorted(list_checkpoints(roots))) or "none"
    places = ", ".join(str(root) for root in roots)
    raise LongCatError(
        f"There is no checkpoint folder '{name}'. Found: {listed}. Put the official folder (with model_index.json) "
        f"below one of: {places}.",
        f"找不到检查点文件夹“{name}”。现有：{listed}。请把官方文件夹（含 model_index.json）放到以下位置之一：{places}。",
    )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and identify an official folder.

    Raises:
        LongCatError: the folder is no LongCat-Image pipeline, or a config is missing or unreadable.
    """
    pipeline = _pipeline_class(folder)
    if pipeline not in (flavours.TEXT_TO_IMAGE, flavours.EDIT):
        raise LongCatError(
            f"'{folder.name}' is not a LongCat-Image checkpoint: its model_index.json says {pipeline or 'nothing'}, "
            f"expected {flavours.TEXT_TO_IMAGE} or {flavours.EDIT}. Choose a LongCat-Image folder.",
            f"“{folder.name}”不是 LongCat-Image 检查点：其 model_index.json 写的是 {pipeline or '空'}，"
            f"应为 {flavours.TEXT_TO_IMAGE} 或 {flavours.EDIT}。请选择 LongCat-Image 文件夹。",
        )
    names = {"scheduler": "scheduler_config.json"}
    configs = {part: _read_json(folder / part / names.get(part, "config.json")) for part in COMPONENTS}
    flavour = flavours.identify(pipeline, folder.name, configs["scheduler"])
    return Checkpoint(folder, flavour, configs)


def fingerprint(folder: Path) -> str:
    """A text that changes when any file of the checkpoint does (size or time of change)."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors"))
    return "\n".join(f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of one component folder: a single safetensors file, or the shards that its index names.

    Raises:
        LongCatError: no weights, a shard that the index names is absent, or a file is cut short or damaged.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for key in file.keys():  # noqa: SIM118  (a handle, not a dict)
                    tensors[key] = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise LongCatError(
                f"'{_short(path)}' is damaged or was not downloaded completely ({error}). Download this file again.",
                f"“{_short(path)}”已损坏或下载不完整（{error}）。请重新下载该文件。",
            ) from error
    return tensors


def audit(
    component: str,
    expected: Mapping[str, torch.Size],
    found: Mapping[str, torch.Tensor],
) -> None:
    """Compare what a component's config asks for with what its files hold.

    Raises:
        LongCatError: a key is missing, unknown or of another shape; names up to three of each kind.
    """
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{key} {tuple(found[key].shape)} ≠ {tuple(expected[key])}"
        for key in sorted(expected.keys() & found.keys())
        if found[key].shape != expected[key]
    ]
    if not (missing or unknown or misshapen):
        return
    kinds = (
        ("missing", "缺少", missing),
        ("unknown", "多余", unknown),
        ("wrong shape (file ≠ config)", "形状不符（文件 ≠ 配置）", misshapen),
    )
    en = "; ".join(f"{len(keys)} {name}: {_some(keys)}" for name, _, keys in kinds if keys)
    zh = "；".join(f"{name} {len(keys)} 个：{_some(keys)}" for _, name, keys in kinds if keys)
    raise LongCatError(
        f"The weights in '{component}' do not fit '{component}/config.json': {en}. The file or its config is from "
        "another model or was changed; download this part of the checkpoint again.",
        f"“{component}”中的权重与“{component}/config.json”不一致：{zh}。文件或配置来自其他模型或被改动过，请重新下载这一部分。",
    )


def _weight_files(folder: Path) -> list[Path]:
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
        absent = [path for path in shards if not path.is_file()]
        if absent:
            raise LongCatError(
                f"'{_short(index)}' names {len(shards)} files, but these are missing: "
                f"{_some([path.name for path in absent])}. Download them into '{folder.name}'.",
                f"“{_short(index)}”列出了 {len(shards)} 个文件，但缺少：{_some([path.name for path in absent])}。"
                f"请把它们下载到“{folder.name}”。",
            )
        return shards
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise LongCatError(
            f"Expected one .safetensors file (or an index with its shards) in '{folder.name}', found {len(files)}: "
            f"{_some([path.name for path in files])}. Download this part of the checkpoint again.",
            f"“{folder.name}”中应有一个 .safetensors 文件（或带分片的索引），实际有 {len(files)} 个："
            f"{_some([path.name for path in files])}。请重新下载这一部分。",
        )
    return files


def _pipeline_class(folder: Path) -> str | None:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return index.get("_class_name") if isinstance(index, dict) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LongCatError(
            f"'{_short(path)}' is missing or unreadable ({error}). Download this file of the checkpoint again.",
            f"“{_short(path)}”缺失或无法读取（{error}）。请重新下载检查点中的这个文件。",
        ) from error
    if not isinstance(content, dict):
        raise LongCatError(
            f"'{_short(path)}' does not hold a JSON object. Download this file of the checkpoint again.",
            f"“{_short(path)}”不是 JSON 对象。请重新下载检查点中的这个文件。",
        )
    return content


def _short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "") if names else "-"
