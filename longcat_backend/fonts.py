"""Fonts for labels: Pillow's own for Latin, one of the system's for Chinese. None comes with the pack."""

import functools
from dataclasses import dataclass

from PIL import ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

MISSING = "□"  # stands for a character that no font here has

# By the names of their files, in the systems' own folders.
_CHINESE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "NotoSerifCJK-Regular.ttc",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "STHeiti Light.ttc",
    "msyh.ttc",
    "simhei.ttf",
    "simsun.ttc",
)
_LAST_LATIN = "\u017f"  # what Pillow's own font has


@dataclass(frozen=True)
class Fonts:
    """A font for Latin, and one for Chinese where the system has one."""

    latin: Font
    chinese: Font | None

    def of(self, text: str) -> Font:
        """The font to draw a text in; see :meth:`can_draw`."""
        return self.latin if is_latin(text) or self.chinese is None else self.chinese

    def can_draw(self, text: str) -> bool:
        """Whether there is a font with all of the text's characters."""
        return is_latin(text) or self.chinese is not None

    def drawable(self, text: str) -> str:
        """The text with a box for every character that cannot be drawn."""
        if self.can_draw(text):
            return text
        return "".join(character if character <= _LAST_LATIN else MISSING for character in text)

    def wrapped(self, text: str, width: int, most: int) -> list[str]:
        """Lines of at most ``width`` pixels, as many as ``most``; what is too long ends in dots."""
        font, lines = self.of(text), [""]
        for character in " ".join(text.split()):
            if font.getlength(lines[-1] + character) > width:
                whole, space, begun = lines[-1].rpartition(" ")
                # A Latin word goes to the next line as a whole; Chinese breaks anywhere.
                in_word = bool(space) and is_latin(begun + character) and character != " "
                lines[-1:] = [whole, begun] if in_word else [lines[-1], ""]
            lines[-1] += character
            if len(lines) > most:
                return [*lines[: most - 1], lines[most - 1][:-3] + "..."]
        return lines


@functools.cache
def fonts(size: int) -> Fonts:
    """The fonts of this machine at a height in pixels."""
    return Fonts(ImageFont.load_default(size), _chinese(size))


def is_latin(text: str) -> bool:
    """Whether Pillow's own font has all characters of a text."""
    return all(character <= _LAST_LATIN for character in text)


def _chinese(size: int) -> Font | None:
    for name in _CHINESE_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:  # the system does not have it
            continue
    return None
