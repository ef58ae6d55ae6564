"""Saved states of a run: one folder each, complete or not there at all, and checked by its own sums when read.

A state is written beside its place, flushed to the disk and renamed; a process that is killed at any moment leaves the
states before it whole. Tensors are in safetensors, the rest in JSON.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import LongCatError

VERSION = 1
INDEX = "state.json"
_NAME = re.compile(r"state-(\d{8})")
_PARTIAL = ".partial"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """A run at the end of a step.

    Attributes:
        tensors: by file (adapters, optimiser, ema) and name, on the CPU.
        values: everything else, of JSON's own types.
    """

    step: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    values: Mapping[str, Any]


class DamagedState(Exception):
    """A state that is not as it was written; its text says in what."""


def save(folder: Path, state: State) -> Path:
    """Write a state into the run folder, complete or not at all.

    Raises:
        LongCatError: the folder cannot be written, or the disk is full; states before this one are whole.
    """
    place = path(folder, state.step)
    partial = place.with_name(f".{place.name}{_PARTIAL}")
    try:
        _discard(partial)
        partial.mkdir(parents=True)
        _fill(partial, state)
        _discard(place)
        partial.rename(place)
        _flush_folder(folder)
    except (OSError, SafetensorError) as error:
        _discard(partial)
        kept = steps(folder)
        intact = (f"; the state of step {kept[-1]} is whole", f"；第 {kept[-1]} 步的状态完好") if kept else ("", "")
        raise LongCatError(
            f"The state of step {state.step} could not be saved in '{folder}': {error}{intact[0]}. Make room on the "
            "disk or make the folder writable, and start the same run again: it goes on from its last state.",
            f"无法在“{folder}”中保存第 {state.step} 步的状态：{error}{intact[1]}。"
            "请清理磁盘空间或使文件夹可写，然后重新运行相同设置：将从最后的状态继续。",
        ) from error
    return place


def steps(folder: Path) -> list[int]:
    """Steps of the states in a run folder, the latest last; whether they are whole is not looked at."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def path(folder: Path, step: int) -> Path:
    """The folder of the state of a step."""
    return folder / f"state-{step:08d}"


def load(place: Path) -> State:
    """Read one state.

    Raises:
        DamagedState: a file is missing, cut or changed, or of a later version of the pack.
    """
    try:
        index = json.loads((place / INDEX).read_text(encoding="utf-8"))
        values = index["values"]
        if index["version"] != VERSION:
            raise DamagedState(f"it has version {index['version']}, and this pack reads {VERSION}")
        if index.pop("sum") != _sum_of_values(index):
            raise DamagedState(f"{INDEX} was changed")
        tensors = {}
        for name, expected in index["files"].items():
            file = place / f"{name}.safetensors"
            found = {"bytes": file.stat().st_size, "sha256": _sum_of_file(file)}
            if found != expected:
                raise DamagedState(f"{file.name} is cut or was changed")
            tensors[name] = load_file(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedState(f"{type(error).__name__}: {error}") from error
    return State(int(index["step"]), tensors, values)


def latest(folder: Path) -> State | None:
    """The last whole state of a run, or None where there is no state at all. Damaged ones are told in the log.

    Raises:
        LongCatError: there are states, but not one is whole.
    """
    told: list[str] = []
    for step in reversed(steps(folder)):
        try:
            return load(path(folder, step))
        except DamagedState as damage:
            told.append(f"{path(folder, step).name}: {damage}")
            log.warning("The state of step %d is damaged (%s); the one before it is used.", step, damage)
    if told:
        raise LongCatError(
            f"No state in '{folder}' is whole ({'; '.join(told)}). Move the folder away to start from the first step.",
            f"“{folder}”中没有完好的状态（{'；'.join(told)}）。请移走该文件夹以从头开始训练。",
        )
    return None


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Delete all states but the last ``keep`` and that of step ``best``, and what broken-off writes left."""
    kept = {*steps(folder)[-keep:], best}
    for step in steps(folder):
        if step not in kept:
            _discard(path(folder, step))
    for left in folder.glob(f".state-*{_PARTIAL}"):
        _discard(left)


def _fill(folder: Path, state: State) -> None:
    files = {}
    for name, tensors in state.tensors.items():
        file = folder / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, file)
        _flush(file)
        files[name] = {"bytes": file.stat().st_size, "sha256": _sum_of_file(file)}
    index: dict[str, Any] = {
        "version": VERSION,
        "step": state.step,
        "files": files,
        "values": state.values,
    }
    index["sum"] = _sum_of_values(index)
    (folder / INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False), encoding="utf-8")
    _flush(folder / INDEX)
    _flush_folder(folder)


def _sum_of_values(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _sum_of_file(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(file: Path) -> None:
    with file.open("r+b") as stream:
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    """The names in a folder, where the system can do that; Windows cannot open one."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _discard(place: Path) -> None:
    """Out of the row first, so that a deletion that is broken off leaves no state that is half there."""
    if not place.exists():
        return
    if not place.name.endswith(_PARTIAL):
        place = place.rename(place.with_name(f".{place.name}.old{_PARTIAL}"))
    shutil.rmtree(place)
