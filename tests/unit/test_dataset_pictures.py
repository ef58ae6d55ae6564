"""Training pictures of every kind become RGB with 8 bits; what is damaged or too large is refused in words."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training import pictures
from longcat_pack.longcat_backend.training.problems import UnusablePicture


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    data = BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def marked() -> Image.Image:
    """Red, 40 by 20, with a blue corner at the top left."""
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 8, 8))
    return image


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_as_exif_says(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise: the top left comes to the top right
    image, noticed = pictures.decode(encoded(marked(), kind, exif=exif))
    assert image.size == (20, 40) and not noticed
    red, _, blue = image.getpixel((17, 2))
    assert blue > 200 and red < 60


PALETTE = Image.new("P", (4, 4), 0)
PALETTE.putpalette([10, 20, 30] * 256)
KINDS = {
    "opaque": (encoded(Image.new("RGBA", (4, 4), (10, 20, 30, 255))), (10, 20, 30), ()),
    "half transparent": (encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128))), (255, 127, 127), ("transparent",)),
    "transparent grey": (encoded(Image.new("LA", (4, 4), (0, 0))), (255, 255, 255), ("grey", "transparent")),
    "palette": (encoded(PALETTE), (10, 20, 30), ()),
    "transparent palette": (encoded(PALETTE, transparency=0), (255, 255, 255), ("transparent",)),
    "transparent colour": (
        encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)),
        (255, 255, 255),
        ("transparent",),
    ),
    "grey": (encoded(Image.new("L", (4, 4), 7)), (7, 7, 7), ("grey",)),
    "one bit": (encoded(Image.new("1", (4, 4), 1)), (255, 255, 255), ("grey",)),
    "16 bit": (encoded(Image.fromarray(np.full((4, 4), 257 * 9, np.uint16))), (9, 9, 9), ("16 bit", "grey")),
    "CMYK": (encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0), ("CMYK",)),
    "animated": (
        encoded(Image.new("RGB", (4, 4), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4))]),
        (255, 0, 0),
        ("animated",),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_becomes_rgb(kind: str) -> None:
    data, colour, expected = KINDS[kind]
    image, noticed = pictures.decode(data)
    assert (image.mode, image.getpixel((2, 2)), noticed) == ("RGB", colour, expected)


def test_16_bits_are_scaled_and_not_cut_off() -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image, _ = pictures.decode(encoded(Image.fromarray(values)))
    assert np.array_equal(np.asarray(image)[..., 0].reshape(-1), np.arange(256))


BROKEN = {
    "empty": b"",
    "text": b"this is no picture",
    "cut PNG": encoded(marked())[:70],
    "cut JPEG": encoded(marked(), "JPEG")[:250],
    "cut WebP": encoded(marked(), "WEBP")[:60],
    "a format that is not read": encoded(marked(), "PPM"),
    "floating point": encoded(Image.new("F", (4, 4)), "TIFF"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_is_unreadable(kind: str) -> None:
    with pytest.raises(UnusablePicture) as caught:
        pictures.decode(BROKEN[kind])
    assert caught.value.kind == "unreadable" and "0x" not in caught.value.detail


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_001, 20_000], ids=["over the limit", "over Pillow's own"])
def test_a_decompression_bomb_is_not_unpacked(side: int) -> None:
    data = encoded(Image.new("1", (side, side)))
    assert len(data) < 100_000
    with pytest.raises(UnusablePicture) as caught:
        pictures.decode(data)
    assert caught.value.kind == "too large" and "100,000,000" in caught.value.detail


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(pictures.LARGEST_FILE + 1)  # takes no room
    with pytest.raises(UnusablePicture) as caught:
        pictures.read("huge.png", path)
    assert caught.value.kind == "too large" and "256 MiB" in caught.value.detail


def test_a_picture_covers_its_size_and_is_cropped_evenly(tmp_path: Path) -> None:
    columns = np.repeat(np.arange(200, dtype=np.uint8)[None], 100, axis=0)
    path = tmp_path / "ramp.png"
    Image.fromarray(columns).convert("RGB").save(path)
    picture, _ = pictures.read("ramp.png", path)
    values = picture.pixels((64, 64))
    assert values.shape == (1, 3, 64, 64) and values.dtype == torch.float32
    grey = (values[0, 0, 32] + 1) / 2 * 255
    # The middle 100 of 200 columns are left: 50 at the left edge, 149 at the right one.
    assert abs(float(grey[0]) - 50) < 2 and abs(float(grey[-1]) - 149) < 2
    assert abs(float(grey.mean()) - 99.5) < 0.5


def test_a_mask_becomes_weights_on_the_latent_grid() -> None:
    mask = torch.zeros(64, 64)
    mask[:, 32:] = 1
    picture, _ = pictures.read("mask", mask)
    weights = picture.weights((64, 64))
    assert weights.shape == (1, 8, 8)
    assert torch.all(weights[:, :, :4] == pictures.MASK_FLOOR) and torch.all(weights[:, :, 4:] == 1)


def test_pixels_of_the_graph_keep_their_values_and_transparency_goes_on_white() -> None:
    given = torch.rand(8, 8, 3)
    picture, noticed = pictures.read("#1", given)
    assert not noticed
    assert torch.allclose(picture.pixels((8, 8))[0].permute(1, 2, 0), given * 2 - 1, atol=1 / 255)
    clear, noticed = pictures.read("#2", torch.cat([given, torch.zeros(8, 8, 1)], dim=-1))
    assert noticed == ("transparent",) and torch.all(clear.pixels((8, 8)) == 1)
    same = pictures.read("#3", given)[0]
    assert same.digest == picture.digest != clear.digest


def test_a_file_that_changed_since_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    marked().save(path)
    picture, _ = pictures.read("a.png", path)
    Image.new("RGB", (40, 20), "green").save(path)
    with pytest.raises(LongCatError, match="has changed since the dataset was read"):
        picture.open()
    path.unlink()
    with pytest.raises(LongCatError, match="'a.png' has changed"):
        picture.open()
