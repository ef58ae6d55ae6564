"""Training pictures: read with care, turned into RGB with 8 bits a channel, and cut to the size of their bucket.

A file is read again when its pixels are needed, and has to be the same file then: pictures are known by their content.
"""

import functools
import hashlib
import stat
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn.functional import avg_pool2d

from .. import latents
from ..errors import LongCatError
from .buckets import Size
from .problems import UnusablePicture

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
# MPO: JPEG files of phones with a second picture in them.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
LARGEST_FILE = 256 * 2**20
LARGEST_PIXELS = 100_000_000
# A mask never wholly switches a place off: what is not looked at drifts.
MASK_FLOOR = 0.05

_ORIENTATION = 0x0112  # EXIF's tag
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")


@dataclass(frozen=True)
class Picture:
    """One picture, not in memory unless it came from the graph.

    Attributes:
        name: the file relative to the dataset's folder, or the number in its batch.
        digest: sha256 of the file's bytes, or of size and pixels of a picture from the graph.
        width, height: in pixels, turned as its EXIF data says.
        source: the file, or uint8 pixels (height, width, 3).
    """

    name: str
    digest: str
    width: int
    height: int
    source: Path | torch.Tensor = field(repr=False, compare=False)

    def open(self) -> Image.Image:
        """The whole picture, RGB.

        Raises:
            LongCatError: the file has changed or gone since the dataset was made.
        """
        if isinstance(self.source, torch.Tensor):
            return Image.fromarray(self.source.numpy())
        try:
            data = _bytes(self.source)
            if hashlib.sha256(data).hexdigest() != self.digest:
                raise UnusablePicture("unreadable", "another content")
            return decode(data)[0]
        except UnusablePicture as error:
            raise LongCatError(
                f"'{self.name}' has changed since the dataset was read ({error.detail}). Queue the graph again, so "
                "that the dataset is read anew, and leave its files alone while it trains.",
                f"“{self.name}”在数据集读取之后发生了变化（{error.detail}）。请重新运行工作流以重新读取数据集，"
                "训练期间不要改动其文件。",
            ) from error

    def cut(self, size: Size) -> Image.Image:
        """The picture as it is trained: it covers ``size``, and what is left over is cropped evenly on both sides.

        Raises:
            LongCatError: see :meth:`open`.
        """
        return ImageOps.fit(self.open(), size, Image.Resampling.LANCZOS, centering=(0.5, 0.5))

    def pixels(self, size: Size) -> torch.Tensor:
        """The cut picture as (1, 3, height, width) in -1..1, float32.

        Raises:
            LongCatError: see :meth:`open`.
        """
        values = torch.from_numpy(numpy.array(self.cut(size)))
        return (values.float() / 255 * 2 - 1).permute(2, 0, 1)[None].contiguous()

    def weights(self, size: Size) -> torch.Tensor:
        """The cut picture as a mask on the latent grid: (1, height / 8, width / 8), 0.05 (black) to 1 (white).

        Raises:
            LongCatError: see :meth:`open`.
        """
        grey = ImageOps.fit(self.open().convert("L"), size, Image.Resampling.BILINEAR, centering=(0.5, 0.5))
        values = torch.from_numpy(numpy.array(grey)).float()[None] / 255
        return avg_pool2d(values, latents.PIXELS_PER_LATENT).clamp(min=MASK_FLOOR)


def read(name: str, source: Path | torch.Tensor) -> tuple[Picture, tuple[str, ...]]:
    """A picture that was seen to be readable, and what was noticed: keys of :data:`problems.KINDS`.

    Args:
        source: a file, or pixels (height, width, 3) in 0..1, with alpha as the fourth channel; (height, width) of
            a mask.

    Raises:
        UnusablePicture: it is unreadable or over a limit.
    """
    if isinstance(source, torch.Tensor):
        return _from_pixels(name, source)
    data = _bytes(source)
    image, noticed = decode(data)
    return Picture(name, hashlib.sha256(data).hexdigest(), image.width, image.height, source), noticed


def decode(data: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """The first frame of an image file, upright, RGB with 8 bits a channel, and what was noticed.

    Raises:
        UnusablePicture: it is damaged, of a format that is not read, or has over 100 megapixels.
    """
    try:
        with Image.open(BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > LARGEST_PIXELS:
                raise UnusablePicture("too large", f"{image.width}x{image.height} > {LARGEST_PIXELS:,} px")
            noticed = _noticed(image)
            rgb, transparent = _rgb(image)
            return ImageOps.exif_transpose(rgb), (*noticed, *(("transparent",) if transparent else ()))
    except UnusablePicture:
        raise
    except Image.DecompressionBombError as error:
        raise UnusablePicture("too large", f"> {LARGEST_PIXELS:,} px") from error
    except UnidentifiedImageError as error:
        raise UnusablePicture("unreadable", "no image 不是图像") from error
    except Exception as error:  # decoders raise whatever they stumble over in a damaged file
        raise UnusablePicture("unreadable", f"{type(error).__name__}: {_one_line(str(error))}") from error


def _from_pixels(name: str, pixels: torch.Tensor) -> tuple[Picture, tuple[str, ...]]:
    values = (pixels if pixels.ndim == 3 else pixels[..., None]).float().nan_to_num().clamp(0, 1).cpu()
    if not values.numel():
        raise UnusablePicture("unreadable", f"{tuple(pixels.shape)}")
    noticed: tuple[str, ...] = ()
    if values.shape[-1] == 4:
        alpha = values[..., 3:]
        noticed = ("transparent",) if bool((alpha < 1).any()) else ()
        values = values[..., :3] * alpha + (1 - alpha)
    rgb = values[..., :3] if values.shape[-1] >= 3 else values[..., :1].expand(-1, -1, 3)
    data = (rgb * 255).round().to(torch.uint8).contiguous()
    height, width = data.shape[:2]
    digest = hashlib.sha256(f"{width}x{height}:".encode() + data.numpy().tobytes()).hexdigest()
    return Picture(name, digest, width, height, data), noticed


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of the formats that this Pillow has: AVIF is no part of older ones."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _bytes(path: Path) -> bytes:
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # to read a pipe would be to wait for its other end
            raise UnusablePicture("unreadable", "no regular file 不是普通文件")
        if facts.st_size > LARGEST_FILE:
            raise UnusablePicture("too large", f"{facts.st_size / 2**20:.0f} MiB > {LARGEST_FILE // 2**20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise UnusablePicture("unreadable", error.strerror or type(error).__name__) from error


def _noticed(image: Image.Image) -> tuple[str, ...]:
    """Keys of :data:`problems.KINDS` for what its header says."""
    facts = {
        "animated": getattr(image, "n_frames", 1) > 1 and image.format != "MPO",
        "16 bit": image.mode in _SIXTEEN_BITS,
        "grey": image.mode in ("1", "L", "LA", *_SIXTEEN_BITS),
        "CMYK": image.mode == "CMYK",
    }
    return tuple(kind for kind, holds in facts.items() if holds)


def _rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """RGB with the orientation mark still on it, and whether something shone through to the white behind it."""
    image.load()  # Pillow turns TIFF files by itself then, and takes their mark away
    orientation = image.getexif().get(_ORIENTATION, 1)
    if image.mode in _SIXTEEN_BITS:
        converted, transparent = _from_16_bits(image).convert("RGB"), False
    elif image.mode == "F":
        raise UnusablePicture("unreadable", "floating point 浮点")
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        transparent = layer.getchannel("A").getextrema() != (255, 255)
        converted = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    else:
        converted, transparent = image.convert("RGB"), False
    converted.info.pop("exif", None)
    if orientation != 1:
        mark = Image.Exif()
        mark[_ORIENTATION] = orientation
        converted.info["exif"] = mark.tobytes()
    return converted, transparent


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = numpy.asarray(image).astype(numpy.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnusablePicture("unreadable", "32 bit")
    return Image.fromarray(((values + 128) // 257).astype(numpy.uint8))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:120]
