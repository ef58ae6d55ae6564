"""Find, identify and read a LongCat-Image checkpoint in the official (diffusers) folder layout.

Every weight that is read is audited against the shapes its own config asks for, because ComfyUI and
diffusers both only log a missing key and go on with random weights (DESIGN.md trap 6).
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

import torch

from . import flavours
from .component_files import Outlines, read_json, read_outlines, read_weights, short, some
from .errors import LongCatError

COMPONENTS = ("transformer", "vae", "text_encoder", "scheduler")
SEARCH_DEPTH = 3
# One of these sets makes a tokenizer.
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
# diffusers and transformers raise at one without "quant_method"; at an unknown method transformers only warns.
_MARK = "quantization_config"
_PRESET = "longcat_preset"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint(ABC):
    """A checkpoint whose configs were read; no weight has been touched yet."""

    flavour: flavours.Flavour
    configs: Mapping[str, Mapping[str, Any]]

    @abstractmethod
    def weights(self, component: str) -> Mapping[str, torch.Tensor]:
        """All tensors of a component, by their official names, on the CPU; some are made when they are asked for."""

    @abstractmethod
    def shapes(self, component: str) -> dict[str, torch.Size]:
        """The shape of every tensor of a component, from the headers of its files alone."""

    def quantised(self, component: str, quantisation: str) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Weights that are stored quantised in ComfyUI's format of that name, with their companions.

        Returns:
            By the key that the weight has in ComfyUI's class, or in the bare text model: the tensors that ComfyUI's
            quantised layer loads.
        """
        return {}

    def packed(self, component: str) -> Outlines | None:
        """What the files hold where layers are quantised by a library of :mod:`quantisation`; None: no such layers."""
        return None

    @abstractmethod
    def tokenizer_folder(self) -> AbstractContextManager[Path]:
        """A folder with the tokenizer's files, there as long as the context lasts."""

    @abstractmethod
    def processor_config(self) -> Mapping[str, Any]:
        """The config of the image processor in front of the vision tower, for editing."""


@dataclass(frozen=True)
class FolderCheckpoint(Checkpoint):
    """An official folder."""

    folder: Path

    def weights(self, component: str) -> dict[str, torch.Tensor]:
        """All tensors of a component, by their name in the file."""
        return read_weights(self.folder / component)

    def shapes(self, component: str) -> dict[str, torch.Size]:
        """The shape of every tensor of a component."""
        return shapes(read_outlines(self.folder / component).tensors)

    def packed(self, component: str) -> Outlines | None:
        """As the headers say."""
        outlines = read_outlines(self.folder / component)
        return outlines if outlines.packed else None

    def tokenizer_folder(self) -> AbstractContextManager[Path]:
        """The folder's own tokenizer."""
        return nullcontext(self.folder / "tokenizer")

    def processor_config(self) -> Mapping[str, Any]:
        """The folder's own; transformers 5 keeps it inside the config of the whole processor.

        Raises:
            LongCatError: the file is missing or unreadable.
        """
        whole = self.folder / "text_processor" / "processor_config.json"
        config = read_json(whole).get("image_processor") if whole.is_file() else None
        return config if isinstance(config, dict) else read_json(whole.with_name("preprocessor_config.json"))


def list_checkpoints(roots: Iterable[Path]) -> dict[str, Path]:
    """LongCat-Image folders up to three levels below the roots, by their path relative to the root.

    The first root wins where two hold the same relative path. Hidden folders are left out.
    """
    found: dict[str, Path] = {}
    for root in roots:
        for depth in range(1, SEARCH_DEPTH + 1):
            for index in sorted(root.glob("/".join(["*"] * depth + ["model_index.json"]))):
                name = index.parent.relative_to(root)
                if not any(part.startswith(".") for part in name.parts) and _is_longcat(index.parent):
                    found.setdefault(name.as_posix(), index.parent)
    return found


def resolve_checkpoint(name: str, roots: Sequence[Path]) -> Path:
    """The folder that a checkpoint name from a graph stands for.

    Graphs come from anywhere, so a name may only point below the model folders. Where several roots hold the
    name, a LongCat-Image folder goes before any other, as in the list.

    Raises:
        LongCatError: the name leaves the model folders, or no folder of that name holds a LongCat-Image checkpoint.
    """
    path = PureWindowsPath(str(name))  # knows both separators, drives and network shares
    if path.anchor or ".." in path.parts:
        raise LongCatError(
            f"The checkpoint name '{name}' points outside the model folders. Choose a name from the list of "
            "LongCatLoader; to use another place, add it to ComfyUI's extra_model_paths.yaml.",
            f"检查点名称“{name}”指向模型文件夹之外。请从 LongCatLoader 的列表中选择；"
            "若要使用其他位置，请把它加入 ComfyUI 的 extra_model_paths.yaml。",
        )
    folders = [root / str(name) for root in roots if path.parts and _is_folder(root / str(name))]
    if folders:
        return next(filter(_is_longcat, folders), folders[0])
    listed = ", ".join(sorted(list_checkpoints(roots))) or "none"
    places = ", ".join(str(root) for root in roots)
    raise LongCatError(
        f"There is no checkpoint folder '{name}'. Found: {listed}. Put the official folder (with model_index.json) "
        f"below one of: {places}.",
        f"找不到检查点文件夹“{name}”。现有：{listed}。"
        f"请把官方文件夹（含 model_index.json）放到以下位置之一：{places}。",
    )


def open_checkpoint(folder: Path) -> FolderCheckpoint:
    """Read and identify an official folder.

    Raises:
        LongCatError: the folder is no LongCat-Image pipeline, or a config or the tokenizer is missing or unreadable.
    """
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if pipeline not in (flavours.TEXT_TO_IMAGE, flavours.EDIT):
        raise LongCatError(
            f"'{folder.name}' is not a LongCat-Image checkpoint: its model_index.json says {pipeline or 'nothing'}, "
            f"expected {flavours.TEXT_TO_IMAGE} or {flavours.EDIT}. Choose a LongCat-Image folder.",
            f"“{folder.name}”不是 LongCat-Image 检查点：其 model_index.json 写的是 {pipeline or '空'}，"
            f"应为 {flavours.TEXT_TO_IMAGE} 或 {flavours.EDIT}。请选择 LongCat-Image 文件夹。",
        )
    names = {"scheduler": "scheduler_config.json"}
    configs = {part: _unmarked(read_json(folder / part / names.get(part, "config.json"))) for part in COMPONENTS}
    require_tokenizer(folder / "tokenizer")
    flavour = flavours.identify(pipeline, folder.name, configs["scheduler"])
    return FolderCheckpoint(flavour, configs, folder)


def marked(config: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """The config of a component with quantised layers, which other libraries refuse.

    They would find no weights for these layers and leave them random, with a warning.
    """
    return {**config, _MARK: {_PRESET: preset}}


def _unmarked(config: dict[str, Any]) -> dict[str, Any]:
    mark = config.get(_MARK)
    ours = isinstance(mark, dict) and _PRESET in mark
    return {key: value for key, value in config.items() if key != _MARK} if ours else config


def fingerprint(folder: Path) -> str:
    """A hash that changes when any file of the checkpoint does (name, size or time of change).

    ComfyUI notes it in saved pictures, so it tells nothing about the machine.
    """
    parts = [folder, *(folder / part for part in (*COMPONENTS, "tokenizer", "text_processor"))]
    files = sorted(path for part in parts for path in part.glob("*") if path.is_file())
    lines = [f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def build(component: str, factory: Callable[[], _T]) -> _T:
    """What ``factory`` makes of a component's config.

    Raises:
        LongCatError: it cannot be made; the cause is named and chained.
    """
    try:
        return factory()
    except LongCatError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise LongCatError(
            f"The config of '{component}' does not describe a {component} of LongCat-Image ({cause}). It is from "
            "another model or was changed; download this part of the checkpoint again.",
            f"“{component}”的配置不符合 LongCat-Image（{cause}）。它来自其他模型或被改动过，请重新下载这一部分。",
        ) from error


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    """The shape of every tensor."""
    return {key: value.shape for key, value in tensors.items()}


def audit(component: str, expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> None:
    """Compare the shapes that a component's config asks for with those that its files hold.

    Raises:
        LongCatError: a key is missing, unknown or of another shape; names up to three of each kind.
    """
    found_differences = differences(expected, found)
    if found_differences is None:
        return
    en, zh = found_differences
    raise LongCatError(
        f"The weights in '{component}' do not fit '{component}/config.json': {en}. The file or its config is from "
        "another model or was changed; download this part of the checkpoint again.",
        f"“{component}”中的权重与“{component}/config.json”不一致：{zh}。文件或配置来自其他模型或被改动过，请重新下载这一部分。",
    )


def differences(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> tuple[str, str] | None:
    """What two sets of shapes differ in, in English and Chinese, up to three keys of each kind; None if they agree."""
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{key} {tuple(found[key])} ≠ {tuple(expected[key])}"
        for key in sorted(expected.keys() & found.keys())
        if found[key] != expected[key]
    ]
    if not (missing or unknown or misshapen):
        return None
    kinds = (
        ("missing", "缺少", missing),
        ("unknown", "多余", unknown),
        ("wrong shape (file ≠ config)", "形状不符（文件 ≠ 配置）", misshapen),
    )
    en = "; ".join(f"{len(keys)} {name}: {some(keys)}" for name, _, keys in kinds if keys)
    zh = "；".join(f"{name} {len(keys)} 个：{some(keys)}" for _, name, keys in kinds if keys)
    return en, zh


def require_tokenizer(folder: Path) -> None:
    """Refuse a folder without a whole tokenizer.

    Raises:
        LongCatError: a file is missing.
    """
    if any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        return
    wanted = " / ".join(" + ".join(names) for names in TOKENIZER_FILES)
    raise LongCatError(
        f"The folder '{short(folder)}' is missing or incomplete: expected {wanted}. Download it again.",
        f"文件夹“{short(folder)}”缺失或不完整，应包含 {wanted}。请重新下载。",
    )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # no name that a file could have: too long, or with a NUL
        return False


def _is_longcat(folder: Path) -> bool:
    try:
        pipeline = read_json(folder / "model_index.json").get("_class_name")
    except LongCatError:
        return False
    return pipeline in (flavours.TEXT_TO_IMAGE, flavours.EDIT)
