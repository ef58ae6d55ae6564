"""The files of one component folder: its weights, in one file or in shards, and its JSON.

A file that LongCatSaveCheckpoint wrote may hold quantised layers; then its header says which, see
:mod:`quantised_state`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import LongCatError
from .tensor_files import DTYPES, FLOATS, damaged, foreign_format

PACKED_LAYERS = "longcat_quantised_layers"
LARGEST_CONFIG = 16 * 2**20
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_LEAF = ".weight."  # in the keys of a quantised weight's parts, and in no others


@dataclass(frozen=True)
class Outlines:
    """What the headers of a component's files say."""

    tensors: Mapping[str, torch.Tensor]  # without their values
    packed: Mapping[str, str]  # the quantised layers, by their names in the model, to the names of their presets


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of one component folder: a single safetensors file, or the shards that its index names.

    Raises:
        LongCatError: no weights, a shard that the index names is absent, or a file is cut short or damaged.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        with _opened(path) as file:
            tensors.update((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118  (a handle, not a dict)
    return tensors


def read_outlines(folder: Path) -> Outlines:
    """The tensors of one component folder without their values; reads headers only, so it takes milliseconds.

    Raises:
        LongCatError: as for :func:`read_weights`, or a tensor is not of floating point and no part of a layer that
            the file says is quantised.
    """
    tensors: dict[str, torch.Tensor] = {}
    packed: dict[str, str] = {}
    for path in _weight_files(folder):
        with _opened(path) as file:
            layers = _packed_layers(path, file.metadata() or {})
            packed.update(layers)
            tensors.update((key, _outline(file, key, bool(layers))) for key in file.keys())  # noqa: SIM118
    return Outlines(tensors, packed)


def header(packed: Mapping[str, str]) -> dict[str, str]:
    """The header of a file with these quantised layers, if any, see :class:`Outlines`."""
    return {"format": "pt", **({PACKED_LAYERS: json.dumps(packed)} if packed else {})}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def _packed_layers(path: Path, header: Mapping[str, str]) -> dict[str, str]:
    try:
        layers = json.loads(header.get(PACKED_LAYERS, "{}"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(layers, dict) or not all(isinstance(name, str) for name in layers.values()):
        raise damaged(path, ValueError(f"{PACKED_LAYERS} is no map of layers"))
    return layers


def _outline(file: Any, key: str, packed: bool) -> torch.Tensor:
    part = file.get_slice(key)
    stored = part.get_dtype()
    if stored not in FLOATS and not (packed and _LEAF in key and stored in _DTYPES):
        raise foreign_format(key, stored)
    return torch.empty(part.get_shape(), dtype=_DTYPES[stored], device="meta")


def _weight_files(folder: Path) -> list[Path]:
    indexes = _visible_files(folder, "*.safetensors.index.json")
    if indexes:
        return _shards(indexes[0])
    files = _visible_files(folder, "*.safetensors")
    if len(files) != 1:
        raise LongCatError(
            f"Expected one .safetensors file (or an index with its shards) in '{folder.name}', found {len(files)}: "
            f"{some([path.name for path in files])}. Download this part of the checkpoint again.",
            f"“{folder.name}”中应有一个 .safetensors 文件（或带分片的索引），实际有 {len(files)} 个："
            f"{some([path.name for path in files])}。请重新下载这一部分。",
        )
    return files


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    foreign = [repr(name) for name in names if not isinstance(name, str) or PureWindowsPath(name).name != name]
    if foreign or not names:
        raise LongCatError(
            f"'{short(index)}' has no weight_map of plain file names in its own folder; found: "
            f"{some(sorted(foreign))}. Nothing outside the folder is read. Download this file again.",
            f"“{short(index)}”的 weight_map 应只包含同一文件夹内的文件名，实际为：{some(sorted(foreign))}。"
            "不会读取文件夹之外的内容。请重新下载该文件。",
        )
    shards = [index.parent / name for name in sorted(names)]
    absent = [path.name for path in shards if not path.is_file()]
    if absent:
        raise LongCatError(
            f"'{short(index)}' names {len(shards)} files, but these are missing: {some(absent)}. "
            f"Download them into '{index.parent.name}'.",
            f"“{short(index)}”列出了 {len(shards)} 个文件，但缺少：{some(absent)}。"
            f"请把它们下载到“{index.parent.name}”。",
        )
    return shards


def _visible_files(folder: Path, pattern: str) -> list[Path]:
    """Files of a pattern; macOS leaves hidden ``._name`` twins on foreign disks."""
    return sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        LongCatError: the file is missing, too large, damaged, or holds something else.
    """
    try:
        # Opening a pipe would wait for ever, and a config is never large.
        if path.exists() and not (path.is_file() and path.stat().st_size <= LARGEST_CONFIG):
            raise ValueError(f"not a file of at most {LARGEST_CONFIG} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LongCatError(
            f"'{short(path)}' is missing or unreadable ({error}). Download this file of the checkpoint again.",
            f"“{short(path)}”缺失或无法读取（{error}）。请重新下载检查点中的这个文件。",
        ) from error
    if not isinstance(content, dict):
        raise LongCatError(
            f"'{short(path)}' does not hold a JSON object. Download this file of the checkpoint again.",
            f"“{short(path)}”不是 JSON 对象。请重新下载检查点中的这个文件。",
        )
    return content


def short(path: Path) -> str:
    """A file's name with that of its folder, for errors."""
    return f"{path.parent.name}/{path.name}"


def some(names: Sequence[str]) -> str:
    """Up to three of some names, for errors."""
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "") if names else "-"
