"""A run without ComfyUI as one JSON file: what LongCatTrainLora exports, or SimpleTuner's ``config.json``."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import latents, lora_files, saving
from ..errors import LongCatError
from . import simpletuner
from .dataset import DatasetSettings
from .settings import TrainSettings, unknown_keys

_TEXT_OR_COMMENT = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
SECTIONS = ("name", "checkpoint", "dataset", "settings", "validation", "output")


@dataclass(frozen=True)
class ValidationSettings:
    """The pictures that ``validate`` draws.

    Attributes:
        prompts: none: captions of the dataset.
        size: width and height in pixels; None: the first picture's of the dataset.
    """

    prompts: tuple[str, ...] = ()
    steps: int = 30
    guidance: float = 4.5
    seed: int = 0
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
        checkpoint: an official folder.
        roots: folders below which the dataset may lie.
        output: the LoRA is written here; states and caches below it.
        notes: what was recognised in the file and is ignored or done in another way, for the log.
    """

    name: str
    checkpoint: Path
    dataset: DatasetSettings
    roots: tuple[Path, ...]
    settings: TrainSettings
    output: Path
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    notes: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """The LoRA."""
        return self.output / f"{self.name}.safetensors"

    @property
    def run_folder(self) -> Path:
        """The states."""
        return self.output / "runs" / self.name

    @property
    def cache(self) -> Path:
        """Encoded pictures and captions."""
        return self.output / "cache"


def read(path: Path, models: Sequence[Path] = (), data: Sequence[Path] = ()) -> Config:
    """The run that a file describes; relative names are looked up beside the file, then here, then in the folders.

    Args:
        models: folders that hold checkpoints.
        data: folders that hold datasets.

    Raises:
        LongCatError: the file is no JSON object, a key is unknown or a value wrong, or a folder is not there; see also
            :func:`saving.check_name`.
    """
    values = read_json(path)
    notes: list[str] = []
    if simpletuner.recognise(values):
        values, notes = simpletuner.convert(values, lambda name: read_list(_found(name, [path.parent, Path()], "file")))
    unknown = sorted(set(values) - set(SECTIONS))
    if unknown:
        raise unknown_keys(unknown, list(SECTIONS))
    places = [path.parent, Path()]
    dataset = DatasetSettings.from_json(_section(values, "dataset"))
    folder = _found(dataset.folder, [*places, *data], "dataset").absolute()
    references = dataset.reference_folder and _found(dataset.reference_folder, [*places, *data], "dataset").absolute()
    return Config(
        name=saving.check_name(str(values.get("name") or path.stem).removesuffix(lora_files.SUFFIX)).as_posix(),
        checkpoint=_found(str(values.get("checkpoint") or ""), [*places, *models], "checkpoint"),
        dataset=DatasetSettings.from_json(
            {**dataset.to_json(), "folder": str(folder), "reference_folder": str(references)}
        ),
        roots=tuple(root for root in (folder, references) if isinstance(root, Path)),
        settings=TrainSettings.from_json(_section(values, "settings")),
        output=path.parent / str(values.get("output") or "output"),
        validation=_validation(_section(values, "validation")),
        notes=tuple(notes),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        LongCatError: it cannot be read, or holds something else.
    """
    values = _json(path)
    if not isinstance(values, dict):
        raise _no_config(path, f"it holds a {type(values).__name__}, not an object")
    return values


def read_list(path: Path) -> list[Any]:
    """A JSON list from a file.

    Raises:
        LongCatError: it cannot be read, or holds something else.
    """
    values = _json(path)
    if not isinstance(values, list):
        raise _no_config(path, f"it holds a {type(values).__name__}, not a list")
    return values


def _json(path: Path) -> Any:
    """What a file holds; comments, as SimpleTuner's guides write them, are left out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(_TEXT_OR_COMMENT.sub(lambda found: found[1] or "", text))
    except (OSError, ValueError) as error:
        raise _no_config(path, str(error)) from error


def _no_config(path: Path, why: str) -> LongCatError:
    return LongCatError(
        f"'{path}' cannot be read as a training config: {why}. Give the JSON that LongCatTrainLora exports.",
        f"无法将“{path}”作为训练配置读取：{why}。请使用 LongCatTrainLora 导出的 JSON。",
    )


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise LongCatError(
            f"'{name}' of the config is {section!r}; expected an object.", f"配置的“{name}”为 {section!r}，应为对象。"
        )
    return section


def _validation(values: Mapping[str, Any]) -> ValidationSettings:
    known = [each.name for each in fields(ValidationSettings)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise unknown_keys(unknown, known)
    given = dict(values)
    try:
        given["prompts"] = tuple(str(prompt) for prompt in given.get("prompts") or ())
        given["size"] = tuple(int(side) for side in given["size"]) if given.get("size") else None
        settings = ValidationSettings(**given)
        if settings.size is not None:
            latents.check_size(*settings.size)
        if settings.steps < 1:
            raise ValueError(f"steps is {settings.steps}")
    except (TypeError, ValueError) as error:
        raise LongCatError(f"The validation settings are wrong: {error}.", f"验证设置有误：{error}。") from error
    return settings


def _found(name: str, places: Sequence[Path], kind: str) -> Path:
    for place in places:
        if name and (place / name).exists():
            return place / name
    looked = ", ".join(str(place.absolute()) for place in places)
    raise LongCatError(
        f"There is no {kind} '{name}' (looked in {looked}). Write its path, or name the folder that holds it with "
        "--models or --data.",
        f"找不到{kind}“{name}”（已查找 {looked}）。请填写其路径，或用 --models / --data 指定所在文件夹。",
    )
