"""Say what a picture shows, by plain image analysis, and score it against the scene that its prompt asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from .scenes import ATTRIBUTES, IMAGE_SIZE, PALETTE, PLACES, RADII, SHAPES, Scene, shape_mask

MAX_COLOUR_DISTANCE = 60.0  # RGB units; two palette colours are never closer than 1.5 times this
MIN_CONTRAST = 50.0  # RGB units between shape and background, below which there is no shape
MIN_IOU = 0.7
BORDER_PX = 5
OFFSETS_PX = (-2, 0, 2)  # the scenes' jitter, searched
GRID = 2  # masks are compared at 1/GRID of the resolution


@dataclass(frozen=True)
class Detection:
    """What a picture shows; None where an attribute cannot be told. `iou` is that of the best-matching mask."""

    background: str | None = None
    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    place: str | None = None
    iou: float = 0.0


def nearest_colour(rgb: np.ndarray) -> str | None:
    """Palette name of an RGB triple in 0..255, or None if it is farther than MAX_COLOUR_DISTANCE from all."""
    names = list(PALETTE)
    distances = np.linalg.norm(np.array([PALETTE[name] for name in names], dtype=float) - rgb, axis=1)
    best = int(distances.argmin())
    return names[best] if distances[best] <= MAX_COLOUR_DISTANCE else None


def _shrink(mask: np.ndarray) -> np.ndarray:
    side = IMAGE_SIZE // GRID
    return mask.reshape(side, GRID, side, GRID).mean(axis=(1, 3)) >= 0.5


@lru_cache(maxsize=1)
def _candidates() -> tuple[list[tuple[str, str, str]], np.ndarray]:
    """Labels (shape, size, place) and flattened masks (N, pixels) float32 of every placement, jitter included."""
    labels, masks = [], []
    for label in product(SHAPES, RADII, PLACES):
        full = np.pad(shape_mask(*label), max(OFFSETS_PX))
        for dy, dx in product(OFFSETS_PX, OFFSETS_PX):
            top, left = max(OFFSETS_PX) - dy, max(OFFSETS_PX) - dx
            labels.append(label)
            masks.append(_shrink(full[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]).ravel())
    return labels, np.array(masks, dtype=np.float32)


def _as_pixels(image: np.ndarray) -> np.ndarray:
    """Any accepted picture as float64 RGB in 0..255."""
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"expected a picture of shape {(IMAGE_SIZE, IMAGE_SIZE, 3)}, got {image.shape}")
    if image.dtype == np.uint8:
        return image.astype(np.float64)
    if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise ValueError("expected uint8 in 0..255 or float in 0..1, got float values outside 0..1 or not finite")
    return image.astype(np.float64) * 255


def detect(image: np.ndarray) -> Detection:
    """Read the attributes off a picture, without knowing the prompt.

    `image` is (128, 128, 3) RGB, uint8 or float in 0..1; anything else raises ValueError. The background is the
    median of the border, the shape everything nearer to the most contrasting colour.
    """
    pixels = _as_pixels(image)
    inner = np.ones(pixels.shape[:2], dtype=bool)
    inner[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = False
    background = np.median(pixels[inner], axis=0)
    contrast = np.linalg.norm(pixels - background, axis=-1)
    peak = np.quantile(contrast, 0.995)
    if peak < MIN_CONTRAST:
        return Detection(background=nearest_colour(background))
    colour = np.median(pixels[contrast > 0.6 * peak], axis=0)
    foreground = contrast > np.linalg.norm(pixels - colour, axis=-1)
    labels, masks = _candidates()
    seen = _shrink(foreground).ravel().astype(np.float32)
    overlap = masks @ seen
    iou = overlap / (masks.sum(axis=1) + seen.sum() - overlap)
    best = int(iou.argmax())
    shape, size, place = labels[best] if iou[best] >= MIN_IOU else (None, None, None)
    return Detection(nearest_colour(background), nearest_colour(colour), shape, size, place, float(iou[best]))


def score_image(image: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Whether each attribute of `scene`, and "all" of them at once, is what the picture shows (see `detect`)."""
    seen, wanted = asdict(detect(image)), asdict(scene)
    scores = {name: seen[name] == wanted[name] for name in ATTRIBUTES}
    return {**scores, "all": all(scores.values())}


def summarise(scores: Sequence[dict[str, bool]]) -> dict[str, float]:
    """The share of pictures, 0..1, that have each attribute right; "all" is every attribute right at once.

    Raises ValueError when there are no scores.
    """
    if not scores:
        raise ValueError("expected at least one score, got none")
    return {name: sum(score[name] for score in scores) / len(scores) for name in (*ATTRIBUTES, "all")}
