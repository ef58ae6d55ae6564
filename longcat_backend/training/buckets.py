"""Sizes to train at: aspect buckets on a pixel grid.

Source: the official training code's table for 1024 x 1024, which is exactly the set of sizes on the 64-pixel grid
with 0.9 to 1 times that area and a ratio of at most 2; the same rule gives the buckets of every other area.
"""

import math
import re

from .. import latents
from ..errors import LongCatError

Size = tuple[int, int]  # width and height in pixels
GRIDS = (64, 32, 16)
LEAST_AREA = 0.9
LARGEST_RATIO = 2.0

_SIZE = re.compile(r"(\d{1,5})(?:\s*[x×*]\s*(\d{1,5}))?", re.IGNORECASE)


def parse(text: str, grid: int = GRIDS[0]) -> tuple[tuple[Size, ...], ...]:
    """The passes that a list of resolutions stands for; each picture is trained once in every pass.

    A single number is an area (``1024``: 1024 x 1024 pixels) and a pass of its own, whose sizes are its aspect
    buckets. All sizes ``WIDTHxHEIGHT`` together are one pass.

    Args:
        text: such as ``1024`` or ``1024x1024,1344x768`` or ``512,1024``.
        grid: 64, 32 or 16; sides of buckets are multiples of it.

    Returns:
        The sizes of each pass.

    Raises:
        LongCatError: the text names no size, or one that is off the grid or larger than 4096 pixels.
    """
    if grid not in GRIDS:
        known = ", ".join(map(str, GRIDS))
        raise LongCatError(f"The grid is {grid}. Choose one of: {known}.", f"网格为 {grid}。请选择：{known}。")
    areas: dict[int, None] = {}
    sizes: dict[Size, None] = {}
    for part in filter(None, (part.strip() for part in re.split("[,，;；\n]", text))):
        match = _SIZE.fullmatch(part)
        if match is None:
            raise _unclear(part)
        width, height = int(match[1]), int(match[2] or match[1])
        if match[2]:
            _check_sides(part, width, height, grid)
            sizes[width, height] = None
        else:
            _check_sides(part, width, height, 1)
            areas[width * height] = None
    if not areas and not sizes:
        raise _unclear(text.strip())
    return tuple(area_sizes(area, grid) for area in areas) + ((tuple(sizes),) if sizes else ())


def area_sizes(area: int, grid: int) -> tuple[Size, ...]:
    """The aspect buckets of an area in pixels: widths and heights on the grid, one size for each ratio.

    At 1024 x 1024 on the 64-pixel grid these are the official ones.
    """
    square = max(1, round(math.sqrt(area) / grid))
    by_ratio = {1.0: square}
    cells = area / grid**2
    for short in range(1, square + 1):
        for long in range(short, int(short * LARGEST_RATIO) + 1):
            if LEAST_AREA * cells <= short * long <= cells and max(short, long) * grid <= latents.LARGEST_SIDE:
                by_ratio[long / short] = max(short, by_ratio.get(long / short, 0))
    found = {(round(short * ratio) * grid, short * grid) for ratio, short in by_ratio.items()}
    return tuple(sorted(found | {(height, width) for width, height in found}))


def choose(passes: tuple[tuple[Size, ...], ...], width: int, height: int) -> tuple[Size, ...]:
    """The sizes that a picture is trained at: in each pass the nearest ratio, measured in its logarithm.

    Where a pass lists several sizes of that ratio, the picture is trained at each of them.
    """
    ratio = math.log(width / height)
    chosen: dict[Size, None] = {}
    for sizes in passes:
        best = min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))
        chosen.update((size, None) for size in sizes if size[0] * best[1] == best[0] * size[1])
    return tuple(chosen)


def enlargement(size: Size, width: int, height: int) -> float:
    """How many times larger a picture of ``width`` by ``height`` has to become to cover a size."""
    return max(size[0] / width, size[1] / height)


def kept(size: Size, width: int, height: int) -> float:
    """The share of a picture's area that is left when it covers a size and the rest is cropped."""
    factor = enlargement(size, width, height)
    return size[0] * size[1] / (width * height * factor**2)


def _check_sides(part: str, width: int, height: int, grid: int) -> None:
    low, high = latents.GRID, latents.LARGEST_SIDE
    if not (low <= width <= high and low <= height <= high) or width % grid or height % grid:
        near = "x".join(str(min(max(round(side / grid) * grid, low), high)) for side in (width, height))
        raise LongCatError(
            f"The resolution {part} cannot be used: sides are multiples of the grid ({grid}) from {low} to {high}. "
            f"Use {near}, or a finer grid ({', '.join(map(str, GRIDS))}).",
            f"分辨率 {part} 不可用：边长应为网格（{grid}）的倍数，范围 {low} 到 {high}。"
            f"请改用 {near}，或更细的网格（{'、'.join(map(str, GRIDS))}）。",
        )


def _unclear(part: str) -> LongCatError:
    return LongCatError(
        f"'{part}' is no list of resolutions. Use areas such as 1024 (for 1024x1024 pixels in every ratio) or sizes "
        "such as 1024x1024,1344x768.",
        f"“{part}”不是分辨率列表。请填写面积，如 1024（即各种比例的 1024x1024 像素），或尺寸，如 1024x1024,1344x768。",
    )
