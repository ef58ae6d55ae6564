"""Captions: from a text or JSON file beside the picture, or from one table for all of them."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import prompt_care
from ..errors import LongCatError
from .problems import Problem, UnusablePicture

TABLES = ("metadata.jsonl", "metadata.json", "metadata.csv")
TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")  # what other tools write their captions to
TRIGGER = "{trigger}"
LARGEST_CAPTION = 64 * 2**10
LARGEST_TABLE = 64 * 2**20
# Names of columns and JSON fields, in the order in which they are looked for; img_path and ref_img_path are official.
FILE_FIELDS = ("file_name", "file", "img_path", "image", "path", "filename")
CAPTION_FIELDS = ("caption", "text", "prompt", "description")
REFERENCE_FIELDS = ("reference", "ref_img_path", "before", "source")
MASK_FIELDS = ("mask",)

_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")


@dataclass(frozen=True)
class Row:
    """One line of a table; file names are as written there."""

    line: int
    file: str
    caption: str
    reference: str
    mask: str


def find_table(folder: Path) -> Path | None:
    """The folder's table, if there is one.

    Raises:
        LongCatError: there are several.
    """
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise LongCatError(
            f"'{folder.name}' has several tables ({names}), and it is not clear which one counts. Keep one.",
            f"“{folder.name}”中有多个表格（{names}），无法确定使用哪一个。请只保留一个。",
        )
    return found[0] if found else None


def read_table(path: Path) -> tuple[list[Row], list[Problem]]:
    """The rows of a table, and the lines that could not be read: number 1 is the first line, or entry of a list.

    Raises:
        LongCatError: the table as a whole cannot be read.
    """
    data = _table_bytes(path)
    read = {".jsonl": _json_lines, ".json": _json_list, ".csv": _csv_rows}[path.suffix.lower()]
    rows, problems = [], []
    for line, entry in read(path, data):
        try:
            rows.append(_row(line, entry))
        except ValueError as error:
            problems.append(Problem(f"{path.name}:{line}", "bad line", str(error)))
    return rows, problems


def beside(picture: Path, may_read: Callable[[Path], bool]) -> str:
    """The caption in the ``.txt`` or ``.json`` file beside a picture; empty if there is neither.

    Raises:
        UnusablePicture: the file may not be read, is no UTF-8, too large, or JSON without a caption.
    """
    for suffix in (".txt", ".json"):
        path = picture.with_suffix(suffix)
        if path.is_file():
            if not may_read(path):
                raise UnusablePicture("outside", path.name)
            text = _caption_text(path)
            return text.strip() if suffix == ".txt" else _json_caption(path, text)
    return ""


def with_trigger(caption: str, trigger: str) -> str:
    """The caption with the trigger word: in the place of ``{trigger}``, else in front unless it is in it already.

    Raises:
        LongCatError: there is the place but no trigger word.
    """
    if TRIGGER in caption:
        if not trigger:
            raise LongCatError(
                f"A caption has the place {TRIGGER} for a trigger word, but none is set: “{caption[:80]}”. Set the "
                "trigger word, or take the place out of the captions.",
                f"某条描述含有触发词占位符 {TRIGGER}，但没有设置触发词：“{caption[:80]}”。"
                "请设置触发词，或从描述中删除占位符。",
            )
        return caption.replace(TRIGGER, trigger)
    # Within a longer Latin word it is another word; Chinese has no spaces between words.
    there = re.search(f"(?<![a-zA-Z0-9]){re.escape(trigger)}(?![a-zA-Z0-9])", caption)
    if not caption or not trigger or there:
        return caption or trigger
    return f"{trigger}{'，' if _CHINESE.search(caption) else ', '}{caption}"


def inspect(name: str, caption: str) -> list[Problem]:
    """What the model would probably not read as it is meant; see :mod:`prompt_care`."""
    care = prompt_care.inspect(caption)
    quotes = {"not quoted": care.unquoted, "foreign quotes": care.foreign}
    return [Problem(name, kind, "  ".join(texts)) for kind, texts in quotes.items() if texts]


def _table_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_TABLE:
            raise _bad_table(path, f"over {LARGEST_TABLE // 2**20} MiB", f"超过 {LARGEST_TABLE // 2**20} MiB")
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise _bad_table(path, str(error.strerror), str(error.strerror)) from error


def _json_lines(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield number, ValueError("not UTF-8 不是 UTF-8 编码")
        except (ValueError, RecursionError) as error:
            yield number, ValueError(f"no JSON 不是 JSON: {error}")


def _json_list(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    try:
        entries = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _bad_table(path, f"no JSON in UTF-8 ({error})", f"不是 UTF-8 编码的 JSON（{error}）") from error
    if not isinstance(entries, list):
        raise _bad_table(path, "not a list of entries", "不是条目列表")
    yield from enumerate(entries, start=1)


def _csv_rows(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""), strict=True)
        names = set(reader.fieldnames or ())
        if not names & set(FILE_FIELDS):
            wanted = ", ".join(FILE_FIELDS)
            raise _bad_table(path, f"its first line names none of: {wanted}", f"首行缺少列名（{wanted} 之一）")
        for entry in reader:
            yield reader.line_num, _too_many(entry) if None in entry else entry
    except UnicodeDecodeError as error:
        raise _bad_table(path, "not UTF-8", "不是 UTF-8 编码") from error
    except csv.Error as error:
        raise _bad_table(path, f"line {reader.line_num}: {error}", f"第 {reader.line_num} 行：{error}") from error


def _too_many(entry: Mapping[str | None, Any]) -> ValueError:
    """DictReader keeps the fields beyond the columns, most often the rest of a caption, under None."""
    columns = len(entry) - 1
    count = columns + len(entry[None])
    return ValueError(
        f"more fields ({count}) than columns ({columns}), put captions with commas in quotes "
        "字段多于列数，含逗号的描述请加英文双引号"
    )


def _bad_table(path: Path, en: str, zh: str) -> LongCatError:
    return LongCatError(
        f"The table '{path.name}' cannot be read: {en}. Write it in UTF-8 with a column for the file "
        f"({FILE_FIELDS[0]}) and one for the caption ({CAPTION_FIELDS[0]}), or take it away and put a .txt file beside "
        "each picture.",
        f"表格“{path.name}”无法读取：{zh}。请以 UTF-8 编码保存，包含文件列（{FILE_FIELDS[0]}）和描述列"
        f"（{CAPTION_FIELDS[0]}）；或删除表格，在每张图像旁放置 .txt 文件。",
    )


def _row(line: int, entry: Any) -> Row:
    if isinstance(entry, ValueError):
        raise entry
    if not isinstance(entry, dict):
        raise ValueError(f"{type(entry).__name__}, no object 不是对象")
    file = _value(entry, FILE_FIELDS)
    if not file:
        raise ValueError(f"no file name 缺少文件名 ({', '.join(FILE_FIELDS)})")
    return Row(line, file, _value(entry, CAPTION_FIELDS), _value(entry, REFERENCE_FIELDS), _value(entry, MASK_FIELDS))


def _value(entry: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of some fields that is there; empty if none is.

    Raises:
        ValueError: it is no text, or half of a character is in it.
    """
    found = next(((name, entry[name]) for name in names if entry.get(name) is not None), None)
    if found is None:
        return ""
    name, value = found
    if not isinstance(value, str):
        raise ValueError(f"{name}: {type(value).__name__}, no text 不是文本")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name}: half a character 含不完整字符")
    return value.strip()


def _caption_text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_CAPTION:
            raise UnusablePicture("bad caption", f"{path.name} > {LARGEST_CAPTION // 2**10} KiB")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        detail = f"{path.name}: not UTF-8, save it as UTF-8 不是 UTF-8 编码，请另存为 UTF-8"
        raise UnusablePicture("bad caption", detail) from error
    except OSError as error:
        raise UnusablePicture("bad caption", f"{path.name}: {error.strerror}") from error


def _json_caption(path: Path, text: str) -> str:
    try:
        entry = json.loads(text)
        if not isinstance(entry, dict):
            raise ValueError(f"{type(entry).__name__}, no object 不是对象")
        if not any(name in entry for name in CAPTION_FIELDS):
            raise ValueError(f"no field 缺少字段 {' / '.join(CAPTION_FIELDS)}")
        return _value(entry, CAPTION_FIELDS)
    except (ValueError, RecursionError) as error:
        raise UnusablePicture("bad caption", f"{path.name}: {error}") from error
