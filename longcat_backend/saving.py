"""Write weights so that either everything is there afterwards or nothing is.

safetensors' own writer wants every tensor of a file in memory at once and cannot be interrupted, so the format, a
JSON header before the tensors' bytes, is written here one tensor at a time.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import torch

from .errors import LongCatError
from .layouts import Arranged, Plan, Rows, arrange
from .tensor_files import DTYPES

Tick = Callable[[int], None]

_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f\ud800-\udfff]')
LONGEST_NAME = 100
SPARE_SPACE = 64 * 2**20


class Written(NamedTuple):
    """What is written, in the words of messages, and what else than free space would help."""

    en: str
    zh: str
    advice: str = ""
    advice_zh: str = ""


CHECKPOINT = Written("The checkpoint", "检查点", ", or choose a smaller precision", "，或选择更小的精度")
LORA = Written("The LoRA", "LoRA ")
STATES = Written("The states of the training", "训练状态")


@dataclass(frozen=True)
class Entry:
    """A tensor to be written; its values are asked for when their turn comes."""

    dtype: torch.dtype
    shape: torch.Size
    read: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.shape.numel() * self.dtype.itemsize


def entries(
    tensors: Mapping[str, torch.Tensor], plan: Plan | None = None, dtype: torch.dtype | None = None
) -> dict[str, Entry]:
    """What to write of tensors, rearranged by a plan; those of floating point in ``dtype``, where it is given.

    A tensor is moved to the CPU before anything else is done with it: ComfyUI's patched weights are made by that.
    """
    chosen = plan or {key: (Rows(key),) for key in tensors}
    arranged = Arranged(chosen, lambda rows: rows.of(tensors[rows.key].to("cpu")))
    outlines = {key: torch.empty(value.shape, dtype=value.dtype, device="meta") for key, value in tensors.items()}

    def entry(key: str, outline: torch.Tensor) -> Entry:
        target = dtype if dtype is not None and outline.is_floating_point() else outline.dtype
        return Entry(target, outline.shape, lambda: arranged[key].to(target))

    return {key: entry(key, outline) for key, outline in arrange(chosen, outlines).items()}


def write_file(path: Path, contents: Mapping[str, Entry], metadata: Mapping[str, str], tick: Tick) -> None:
    """Write one safetensors file, and see it safely on the disk.

    Args:
        tick: called with the bytes of each tensor that was written; may raise to stop.

    Raises:
        OSError: the disk is full or the file cannot be written.
    """
    order = sorted(contents, key=lambda key: (-contents[key].dtype.itemsize, key))  # keeps every tensor aligned
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for key in order:
        entry = contents[key]
        end = offset + entry.size
        header[key] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            tensor = contents[key].read().contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            tick(contents[key].size)
        file.flush()
        os.fsync(file.fileno())


class Staging:
    """New files and folders under temporary names beside their targets, until all of them are complete."""

    def __init__(self, overwrite: bool) -> None:
        self._overwrite = overwrite
        self._moves: list[tuple[Path, Path]] = []
        self._new_folders: list[Path] = []

    def place(self, target: Path) -> Path:
        """A path to write to in the place of ``target``; its folder exists.

        Raises:
            LongCatError: the target is there already and may not be overwritten.
        """
        self._require_free(target)
        missing = [folder for folder in target.parents if not folder.exists()]
        self._new_folders += reversed(missing)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        self._moves.append((temporary, target))
        return temporary

    def commit(self) -> None:
        """Give everything its name.

        Raises:
            LongCatError: a target has come into being meanwhile.
            OSError: a target is in use or may not be replaced.
        """
        for _, target in self._moves:
            self._require_free(target)
        for temporary, target in self._moves:
            _exchange(temporary, target)

    def discard(self) -> None:
        """Take away whatever has not got its name."""
        for temporary, _ in self._moves:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)
        for folder in reversed(self._new_folders):
            with suppress(OSError):  # what was given its name lies in it
                folder.rmdir()

    def _require_free(self, target: Path) -> None:
        if target.is_dir() and not (target / "model_index.json").is_file():
            raise LongCatError(
                f"'{target.parent.name}/{target.name}' is a folder with something else in it, and is not touched. "
                "Choose another name.",
                f"“{target.parent.name}/{target.name}”是存有其他内容的文件夹，不会被改动。请换一个名称。",
            )
        if os.path.lexists(target) and not self._overwrite:
            raise LongCatError(
                f"'{target.parent.name}/{target.name}' is there already. Choose another name, or switch overwrite on.",
                f"“{target.parent.name}/{target.name}”已存在。请换一个名称，或打开“覆盖”。",
            )


@contextmanager
def staged(overwrite: bool, what: Written = CHECKPOINT) -> Iterator[Staging]:
    """A :class:`Staging` that is committed at the end, or leaves nothing behind.

    Raises:
        LongCatError: a target is there already, or a file cannot be written.
    """
    staging = Staging(overwrite)
    try:
        yield staging
        staging.commit()
    except OSError as error:
        raise _unwritable(what, error) from error
    finally:
        staging.discard()


def probe(target: Path) -> None:
    """See before long work that a file can be written in the end: a small one is written beside it, and deleted.

    Raises:
        LongCatError: a folder has the target's name.
        OSError: it cannot be written there.
    """
    staging = Staging(overwrite=True)
    try:
        staging.place(target).write_bytes(b"probe")
    finally:
        staging.discard()


def require_writable(target: Path, what: Written) -> None:
    """The same as :func:`probe`, in words.

    Raises:
        LongCatError: the target cannot be written.
    """
    try:
        probe(target)
    except OSError as error:
        raise _unwritable(what, error) from error


def _unwritable(what: Written, error: OSError) -> LongCatError:
    return LongCatError(
        f"{what.en} could not be written ({error}); nothing was left behind. Check the free space and the "
        "rights of the folder, and that no other program uses the files.",
        f"{what.zh}写入失败（{error}），未留下任何文件。请检查文件夹的剩余空间和权限，并确认文件未被其他程序占用。",
    )


def check_name(name: str) -> PurePosixPath:
    """The relative path that a name from a graph stands for: the same on every system, and never outside.

    Raises:
        LongCatError: the name is empty or too long, leaves the model folder, or is none on some system.
    """
    path = PureWindowsPath(name)  # knows both separators, drives and network shares
    parts = path.parts
    bad = (
        not parts
        or path.anchor
        or len(name) > LONGEST_NAME
        or any(
            part.startswith(".") or part != part.strip(" .") or _RESERVED.fullmatch(part) or _FORBIDDEN.search(part)
            for part in parts
        )
    )
    if bad:
        shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
        raise LongCatError(
            f"The name {shown!r} cannot be used. Use up to {LONGEST_NAME} letters, digits, '-', '_', and '/' for "
            "subfolders; nothing outside the model folder can be written.",
            f"名称 {shown!r} 无法使用。请使用不超过 {LONGEST_NAME} 个字母、数字、“-”、“_”，用“/”表示子文件夹；"
            "不能写到模型文件夹之外。",
        )
    return PurePosixPath(*parts)


def require_space(folder: Path, size: int, what: Written = CHECKPOINT) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: where the files will be; it need not exist yet.
        size: bytes to be written.

    Raises:
        LongCatError: there is less free space.
    """
    there = _nearest(folder)
    free = free_space(folder)
    if free < size + SPARE_SPACE:
        needed, has = (f"{value / 2**30:.2f} GB" for value in (size + SPARE_SPACE, free))
        raise LongCatError(
            f"{what.en} needs {needed}, but the disk of '{there.name}' has {has} left. Free some space{what.advice}.",
            f"{what.zh}需要 {needed}，而“{there.name}”所在磁盘仅剩 {has}。请腾出空间{what.advice_zh}。",
        )


def free_space(folder: Path) -> int:
    """Bytes free on the disk where a folder is, or will be."""
    return shutil.disk_usage(_nearest(folder)).free


def total(groups: Sequence[Mapping[str, Entry]]) -> int:
    """Bytes of all tensors of several files."""
    return sum(entry.size for group in groups for entry in group.values())


def _nearest(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _exchange(temporary: Path, target: Path) -> None:
    """Move to the target's place; a folder that is there makes way first, and comes back if that fails."""
    if not (target.is_dir() and not target.is_symlink()):
        os.replace(temporary, target)
        return
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
