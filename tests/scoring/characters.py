"""The 46 characters of LongCat-Tiny: how each is drawn, and how one is asked for in a caption.

Letters and digits come from Pillow's own font; the numerals that it lacks, and the two characters that it draws like
another one, from strokes.
"""

from __future__ import annotations

import math
import random
import string
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

NUMERALS = "一二三四五六七八九十"
CHARACTERS = string.ascii_uppercase + string.digits + NUMERALS
QUOTES = ("''", '""', "‘’", "“”")  # the pairs that LongCat reads character by character

Points = tuple[tuple[float, float], ...]
_GLYPH_SIDE = 256  # px, of the square that a glyph fills in height or width
_FONT_SIZE = 300
_FONT_STROKE = 12  # px at that size, so that lines are as bold as the strokes
_STROKE = 0.16  # width, in glyph heights
_SUPERSAMPLING = 4


def _ellipse(width: float) -> Points:
    turns = [2 * math.pi * i / 48 for i in range(49)]
    return tuple((0.5 + width / 2 * math.cos(a), 0.5 + 0.5 * math.sin(a)) for a in turns)


_STROKES: dict[str, tuple[Points, ...]] = {  # in the unit square, y down
    "I": (((0.2, 0.0), (0.8, 0.0)), ((0.5, 0.0), (0.5, 1.0)), ((0.2, 1.0), (0.8, 1.0))),
    "0": (_ellipse(0.62), ((0.36, 0.72), (0.64, 0.28))),
    "一": (((0.0, 0.5), (1.0, 0.5)),),
    "二": (((0.15, 0.2), (0.85, 0.2)), ((0.0, 0.85), (1.0, 0.85))),
    "三": (((0.1, 0.08), (0.9, 0.08)), ((0.2, 0.5), (0.8, 0.5)), ((0.0, 0.94), (1.0, 0.94))),
    "四": (
        ((0.05, 0.08), (0.95, 0.08), (0.95, 0.92), (0.05, 0.92), (0.05, 0.08)),
        ((0.35, 0.08), (0.34, 0.45), (0.24, 0.58)),
        ((0.65, 0.08), (0.65, 0.55), (0.78, 0.58)),
    ),
    "五": (
        ((0.1, 0.04), (0.9, 0.04)),
        ((0.46, 0.04), (0.34, 0.96)),
        ((0.14, 0.46), (0.78, 0.46), (0.74, 0.96)),
        ((0.0, 0.96), (1.0, 0.96)),
    ),
    "六": (
        ((0.44, 0.0), (0.56, 0.14)),
        ((0.0, 0.34), (1.0, 0.34)),
        ((0.36, 0.56), (0.06, 1.0)),
        ((0.64, 0.56), (0.94, 1.0)),
    ),
    "七": (((0.0, 0.5), (1.0, 0.34)), ((0.42, 0.0), (0.42, 0.8), (0.54, 0.94), (0.94, 0.94), (0.96, 0.72))),
    "八": (((0.36, 0.12), (0.28, 0.6), (0.0, 1.0)), ((0.6, 0.04), (0.72, 0.6), (1.0, 1.0))),
    "九": (
        ((0.38, 0.0), (0.36, 0.5), (0.02, 1.0)),
        ((0.06, 0.32), (0.74, 0.32), (0.7, 0.8), (0.78, 0.96), (1.0, 0.96), (1.0, 0.76)),
    ),
    "十": (((0.0, 0.45), (1.0, 0.45)), ((0.5, 0.0), (0.5, 1.0))),
}


def _drawn_in_strokes(character: str) -> Image.Image:
    side, width = _GLYPH_SIDE, round(_STROKE * _GLYPH_SIDE)
    picture = Image.new("L", (side, side))
    pen = ImageDraw.Draw(picture)
    inner = side - width
    for stroke in _STROKES[character]:
        points = [(width / 2 + x * inner, width / 2 + y * inner) for x, y in stroke]
        pen.line(points, fill=255, width=width, joint="curve")
        for x, y in (points[0], points[-1]):
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    return picture


def _drawn_by_font(character: str) -> Image.Image:
    canvas = Image.new("L", (2 * _FONT_SIZE, 2 * _FONT_SIZE))
    font = ImageFont.load_default(_FONT_SIZE)
    ImageDraw.Draw(canvas).text(
        (_FONT_SIZE, _FONT_SIZE), character, fill=255, font=font, anchor="mm", stroke_width=_FONT_STROKE
    )
    ink = canvas.crop(canvas.getbbox())
    factor = _GLYPH_SIDE / max(ink.size)
    ink = ink.resize((round(ink.width * factor), round(ink.height * factor)), Image.Resampling.BILINEAR)
    picture = Image.new("L", (_GLYPH_SIDE, _GLYPH_SIDE))
    picture.paste(ink, ((_GLYPH_SIDE - ink.width) // 2, (_GLYPH_SIDE - ink.height) // 2))
    return picture


@lru_cache(maxsize=len(CHARACTERS))
def _glyph(character: str) -> Image.Image:
    return _drawn_in_strokes(character) if character in _STROKES else _drawn_by_font(character)


def character_mask(character: str, centre: tuple[float, float], height: float, image_size: int) -> np.ndarray:
    """Coverage (image_size, image_size) float32 in [0, 1] of a character that is `height` px high or wide.

    `centre` is (x, y) in px. Raises ValueError for a character that is not one of the 46.
    """
    if len(character) != 1 or character not in CHARACTERS:
        raise ValueError(f"expected one of {CHARACTERS}, got {character!r}")
    fine = image_size * _SUPERSAMPLING
    scale = _GLYPH_SIDE / (height * _SUPERSAMPLING)
    offsets = (_GLYPH_SIDE / 2 - scale * _SUPERSAMPLING * c for c in centre)
    x, y = offsets
    picture = _glyph(character).transform(
        (fine, fine), Image.Transform.AFFINE, (scale, 0, x, 0, scale, y), Image.Resampling.BILINEAR
    )
    cells = np.asarray(picture).reshape(image_size, _SUPERSAMPLING, image_size, _SUPERSAMPLING)
    return cells.mean(axis=(1, 3), dtype=np.float32) / 255


_CLAUSES = {
    "en": (
        ", with {quoted} written on it",
        ", with the {kind} {quoted} on it",
        ", {quoted} written on the shape",
        ", and it says {quoted}",
    ),
    "zh": ("，上面写着{quoted}", "，写着{kind}{quoted}", "，上面有{kind}{quoted}", "，写着{quoted}"),
}
_KINDS = {"en": ("letter", "number"), "zh": ("字母", "数字")}


def with_character(text: str, character: str, language: str, rng: random.Random) -> str:
    """`text`, a caption in "zh" or "en", that also asks for a quoted character."""
    opening, closing = rng.choice(QUOTES)
    kind = _KINDS[language][character not in string.ascii_uppercase]
    clause = rng.choice(_CLAUSES[language]).format(quoted=f"{opening}{character}{closing}", kind=kind)
    return text.rstrip(".。") + clause


def without_quotes(text: str) -> str:
    """`text` without its quotation marks."""
    return text.translate({ord(mark): None for pair in QUOTES for mark in pair})
