"""What the contact sheet writes below each picture: its bucket, its caption, and what is wrong."""

from pathlib import Path

import pytest
from PIL import Image, ImageFont

from longcat_pack.longcat_backend.fonts import Fonts
from longcat_pack.longcat_backend.training import contact_sheet, dataset
from longcat_pack.longcat_backend.training.contact_sheet import _INK, _QUIET, _SKIPPED, _WARNING, Tile
from longcat_pack.longcat_backend.training.dataset import DatasetSettings

LATIN = Fonts(ImageFont.load_default(contact_sheet.TEXT), None)  # the same lines on every system
PICTURES = {
    "a.png": ("a red cat", "red", (64, 64)),
    "b.png": ("a red cat again", "red", (64, 64)),
    "c.png": ("a sign that says OPEN", "blue", (128, 64)),
    "d.png": ("broken", "green", (64, 64)),
}


@pytest.fixture
def tiles(tmp_path: Path) -> list[Tile]:
    """Of a good picture, the same once more, one whose text is not quoted, and one that is no picture."""
    (tmp_path / "set").mkdir()
    for name, (caption, colour, size) in PICTURES.items():
        place = tmp_path / "set" / name
        Image.new("RGB", size, colour).save(place)
        place.with_suffix(".txt").write_text(caption, encoding="utf-8")
    (tmp_path / "set" / "d.png").write_bytes(b"")
    settings = DatasetSettings(folder="set", resolutions="64x64,128x64", grid=16, repeats=3)
    return list(contact_sheet._tiles(dataset.read_folder(settings, [tmp_path]), LATIN))


def joined(tile: Tile) -> list[tuple[str, tuple[int, int, int]]]:
    """The lines of one colour that follow each other as one."""
    found: list[tuple[str, tuple[int, int, int]]] = []
    for text, colour in tile.lines:
        if found and found[-1][1] == colour and colour != _INK:
            found[-1] = (f"{found[-1][0]} {text}", colour)
        else:
            found.append((text, colour))
    return found


def test_each_picture_has_its_bucket_its_caption_and_what_is_wrong(tiles: list[Tile]) -> None:
    good, again, sign, broken = map(joined, tiles)
    assert good == [("1 a.png", _INK), ("64x64 x3", _QUIET), ("a red cat", _INK)]
    assert again[:3] == [("2 b.png", _INK), ("64x64 x3", _QUIET), ("a red cat again", _INK)]
    assert again[3:] == [("is the same picture as (a.png)", _WARNING)]
    assert sign[:3] == [("3 c.png", _INK), ("128x64 x3", _QUIET), ("a sign that says OPEN", _INK)]
    ((warning, colour),) = sign[3:]
    assert warning.startswith("has text in its caption that looks meant to be drawn") and colour == _WARNING
    assert broken[0] == ("d.png", _INK)
    assert broken[1][0].startswith("skipped: cannot be read") and broken[1][1] == _SKIPPED
    assert len(broken) == 2


def test_a_picture_that_is_left_out_has_a_tile_without_one(tiles: list[Tile]) -> None:
    pictures = [tile.picture for tile in tiles]
    assert [picture and picture.size for picture in pictures] == [(64, 64), (64, 64), (128, 64), None]
    assert pictures[0] is not None and pictures[0].getpixel((5, 5)) == (255, 0, 0)
