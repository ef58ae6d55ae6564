"""The contact sheet: every training picture as it becomes, with its bucket, its caption and what is wrong with it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import shorten

from PIL import Image, ImageDraw

from ..fonts import MISSING, Fonts, fonts
from .dataset import Dataset, Item
from .problems import KINDS, Problem

MOST_ITEMS = 48
MOST_SKIPPED = 16
COLUMNS = 6
TILE = 240  # pixels, of the picture within its tile
MARGIN = 8
TEXT = 14
LINE = TEXT + 4
LINES = 8
LONGEST_CAPTION = 300  # characters, in the legend

_BACKGROUND, _INK, _QUIET = (24, 24, 24), (235, 235, 235), (150, 150, 150)
_WARNING, _SKIPPED = (255, 170, 60), (255, 95, 85)

Line = tuple[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Tile:
    """A picture, or none, and lines of text with their colours."""

    picture: Image.Image | None
    lines: tuple[Line, ...]


def draw(dataset: Dataset) -> Image.Image:
    """The sheet, RGB: pictures first, then those that were left out; counts above them.

    It shows up to 48 and 16 of them and says how many more there are. An edit pair is shown side by side; what a mask
    takes out is darkened.
    """
    letters = fonts(TEXT)
    tiles = list(_tiles(dataset, letters))
    head = [letters.drawable(line) for line in _head(dataset, letters)]
    columns = min(COLUMNS, max(len(tiles), 2))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    top = len(head) * LINE + 2 * MARGIN
    size = columns * (TILE + MARGIN) + MARGIN, top + sum(map(_height, rows))
    sheet = Image.new("RGB", size, _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for number, text in enumerate(head):
        pen.text((MARGIN, MARGIN + number * LINE), text, fill=_INK, font=letters.of(text))
    for row in rows:
        for column, tile in enumerate(row):
            left, below = MARGIN + column * (TILE + MARGIN), top + _picture_height(row)
            if tile.picture is not None:
                sheet.paste(tile.picture, (left, below - tile.picture.height))
            for number, (text, colour) in enumerate(tile.lines):
                pen.text((left, below + 4 + number * LINE), text, fill=colour, font=letters.of(text))
        top += _height(row)
    return sheet


def _picture_height(row: Sequence[Tile]) -> int:
    return max(0 if tile.picture is None else tile.picture.height for tile in row)


def _height(row: Sequence[Tile]) -> int:
    return _picture_height(row) + max(len(tile.lines) for tile in row) * LINE + 2 * MARGIN


def legend(dataset: Dataset) -> str:
    """The sheet's numbers with names and the beginnings of captions, one a line."""
    shown = dataset.items[:MOST_ITEMS]
    texts = [shorten(item.caption, LONGEST_CAPTION, placeholder="…") for item in shown]
    lines = zip(shown, texts, strict=True)
    return "\n".join(f"{index}: {item.name}: {text}" for index, (item, text) in enumerate(lines, start=1))


def _head(dataset: Dataset, letters: Fonts) -> Iterator[str]:
    skipped = _skipped(dataset)
    more = [max(0, len(dataset.items) - MOST_ITEMS), max(0, len(skipped) - MOST_SKIPPED)]
    yield f"{len(dataset.items)} items, {len(skipped)} skipped, {len(dataset.held_out)} held out"
    if any(more):
        yield f"not shown: {more[0]} items, {more[1]} skipped"
    if not letters.can_draw("".join(item.caption + item.name for item in dataset.items[:MOST_ITEMS])):
        yield f"no font for Chinese here, {MISSING} stands for a character; the report has the captions"


def _tiles(dataset: Dataset, letters: Fonts) -> Iterator[Tile]:
    held_out = set(dataset.held_out)
    for index, item in enumerate(dataset.items[:MOST_ITEMS]):
        lines = _wrap(letters, f"{index + 1}  {item.name}", _INK, 1)
        note = "held out" if index in held_out else f"x{dataset.settings.repeats}"
        lines += _wrap(letters, f"{item.size[0]}x{item.size[1]}  {note}", _QUIET, 1)
        lines += _wrap(letters, item.caption, _INK, 3)
        for problem in dataset.problems:
            if problem.name == item.name and not problem.skipped:
                lines += _wrap(letters, _words(problem, letters), _WARNING, 2)
        yield Tile(_thumbnail(item), tuple(lines[:LINES]))
    for problem in _skipped(dataset)[:MOST_SKIPPED]:
        lines = _wrap(letters, problem.name, _INK, 2)
        lines += _wrap(letters, f"skipped: {_words(problem, letters)}", _SKIPPED, LINES - 2)
        yield Tile(None, tuple(lines))


def _thumbnail(item: Item) -> Image.Image:
    picture = item.image()
    if item.mask is not None:
        weights = item.mask.cut(item.size).convert("L")
        picture = Image.composite(picture, picture.point(lambda value: value // 4), weights)
    shown = [picture] if item.reference is None else [item.reference.cut(item.size), picture]
    width = TILE // len(shown)
    for one in shown:
        one.thumbnail((width, TILE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (sum(one.width for one in shown), shown[0].height))
    for index, one in enumerate(shown):
        canvas.paste(one, (index * shown[0].width, 0))
    return canvas


def _skipped(dataset: Dataset) -> Sequence[Problem]:
    return [problem for problem in dataset.problems if problem.skipped]


def _words(problem: Problem, letters: Fonts) -> str:
    kind = KINDS[problem.kind]
    words = kind.en if letters.chinese is None else f"{kind.en} {kind.zh}"
    return f"{words} ({problem.detail})" if problem.detail else words


def _wrap(letters: Fonts, text: str, colour: tuple[int, int, int], most: int) -> list[Line]:
    return [(line, colour) for line in letters.wrapped(letters.drawable(text), TILE, most)]
