"""Pictures in rows and columns, with what they are written beside them."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from .fonts import Fonts, fonts

LARGEST_SIDE = 8192
MARGIN = 6
LINES = 3  # of a row's label at most
_BACKGROUND = (24, 24, 24)
_INK = (230, 230, 230)


def legend(rows: Sequence[str]) -> str:
    """The rows' labels by their numbers, one a line."""
    return "\n".join(_numbered(index, label) for index, label in enumerate(rows))


def grid(pictures: Sequence[torch.Tensor], rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """One picture of all, row by row, labels included; where one is still to come there is an empty place.

    A label goes in with its number. Where it is not Latin and this system has no font for Chinese, the number stands
    alone, and :func:`legend` says what it means.

    Args:
        pictures: (height, width, 3) in 0..1, of one size, at least one; those at the end may be missing.
    """
    height, width = pictures[0].shape[:2]
    size = max(12, round(min(height, width) * 0.045))
    letters = fonts(size)
    column_width = max(width, max(round(letters.of(label).getlength(label)) for label in columns) + 2 * MARGIN)
    total_width = len(columns) * (column_width + MARGIN) + MARGIN
    labels = [_lines(letters, index, label, total_width - 2 * MARGIN) for index, label in enumerate(rows)]
    line = size + size // 3
    heights = [line * len(lines) + MARGIN + height + MARGIN for lines in labels]
    top = line + 2 * MARGIN
    canvas = Image.new("RGB", (total_width, top + sum(heights)), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(columns):
        left = MARGIN + column * (column_width + MARGIN)
        draw.text((left, MARGIN), label, fill=_INK, font=letters.of(label))
    for row, lines in enumerate(labels):
        for number, text in enumerate(lines):
            draw.text((MARGIN, top + number * line), text, fill=_INK, font=letters.of(text))
        for column, picture in enumerate(pictures[row * len(columns) : (row + 1) * len(columns)]):
            place = MARGIN + column * (column_width + MARGIN), top + len(lines) * line + MARGIN
            canvas.paste(as_image(picture), place)
        top += heights[row]
    canvas.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return canvas


def as_image(picture: torch.Tensor) -> Image.Image:
    """(height, width, 3) in 0..1 in 8 bits."""
    return Image.fromarray((picture.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy())


def as_tensor(image: Image.Image) -> torch.Tensor:
    """(1, height, width, 3) in 0..1 of an RGB picture."""
    return torch.from_numpy(np.array(image.convert("RGB"))).float()[None] / 255


def _lines(letters: Fonts, index: int, label: str, width: int) -> list[str]:
    """A row's label with its number, broken to the width in pixels; the number alone if it cannot be drawn."""
    text = _numbered(index, label)
    return letters.wrapped(text, width, LINES) if letters.can_draw(text) else [str(index + 1)]


def _numbered(index: int, label: str) -> str:
    return f"{index + 1}: {label}"
