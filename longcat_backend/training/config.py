"""A run without ComfyUI as one JSON file: what LongCatTrainLora exports, or SimpleTuner's ``config.json``."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import flavours, latents, lora_files, saving
from ..errors import LongCatError
from . import simpletuner
from .dataset import DatasetSettings
from .settings import TrainSettings, unknown_keys

_TEXT_OR_COMMENT = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
# Kinds, smallest and largest value; the largest is there to catch a slip.
_RANGES: dict[str, tuple[tuple[type, ...], int, int]] = {
    "steps": ((int,), 1, 10_000),
    "guidance": ((int, float), 0, 100),
    "seed": ((int,), 0, 2**64 - 1),
}
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
    if not dataset.folder:
        raise _pictures_of_a_graph()
    folder = _found(dataset.folder, [*places, *data], "dataset").absolute()
    references = dataset.reference_folder and _found(dataset.reference_folder, [*places, *data], "dataset").absolute()
    return Config(
        name=saving.check_name(_text(values, "name", path.stem).removesuffix(lora_files.SUFFIX)).as_posix(),
        checkpoint=_found(flavours.folder_name(_text(values, "checkpoint", "")), [*places, *models], "checkpoint"),
        dataset=DatasetSettings.from_json(
            {**dataset.to_json(), "folder": str(folder), "reference_folder": str(references)}
        ),
        roots=tuple(root for root in (folder, references) if isinstance(root, Path)),
        settings=TrainSettings.from_json(_section(values, "settings")),
        output=path.parent / _text(values, "output", "output"),
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


def _pictures_of_a_graph() -> LongCatError:
    return LongCatError(
        "The config names no folder of pictures: this run's pictures came from the graph, and training without "
        "ComfyUI needs a folder. Save them into one with their captions beside them, and write it as 'folder' of "
        "'dataset'.",
        "配置没有图像文件夹：该训练的图像来自工作流，而脱离 ComfyUI 训练需要文件夹。"
        "请将图像与描述保存到一个文件夹中，并填入“dataset”的“folder”。",
    )


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise _wrong(name, section, "an object", "对象")
    return section


def _text(values: Mapping[str, Any], name: str, default: str) -> str:
    text = values.get(name)
    if not isinstance(text, (str, type(None))):
        raise _wrong(name, text, "text", "文本")
    return text or default


def _validation(values: Mapping[str, Any]) -> ValidationSettings:
    known = [each.name for each in fields(ValidationSettings)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise unknown_keys(unknown, known)
    given = {name: value for name, value in values.items() if value is not None}
    for name in sorted(set(_RANGES) & set(given)):
        _check_number(name, given[name])
    prompts = given.get("prompts", [])
    if not isinstance(prompts, list) or not all(isinstance(each, str) and each.strip() for each in prompts):
        raise _wrong("validation.prompts", prompts, "a list of texts, none of them empty", "非空文本的列表")
    given["prompts"] = tuple(prompts)
    if "size" in given:
        given["size"] = _size(given["size"])
    return ValidationSettings(**given)


def _check_number(name: str, value: Any) -> None:
    kinds, least, most = _RANGES[name]
    fits = isinstance(value, kinds) and not isinstance(value, bool)
    if not fits or not least <= value <= most:
        whole, whole_zh = ("number", "数字") if float in kinds else ("whole number", "整数")
        en, zh = f"a {whole} between {least} and {most}", f"{least} 到 {most} 之间的{whole_zh}"
        raise _wrong(f"validation.{name}", value, en, zh)


def _size(value: Any) -> tuple[int, int]:
    whole = isinstance(value, list) and all(isinstance(side, int) and not isinstance(side, bool) for side in value)
    if not whole or len(value) != 2:
        raise _wrong("validation.size", value, "[width, height] in pixels", "[宽, 高]（像素）")
    latents.check_size(*value)
    return value[0], value[1]


def _wrong(name: str, value: Any, en: str, zh: str) -> LongCatError:
    return LongCatError(
        f"'{name}' of the config is {value!r}; expected {en}.", f"配置的“{name}”为 {value!r}，应为{zh}。"
    )


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
