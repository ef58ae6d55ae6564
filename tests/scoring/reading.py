"""Say which character a picture shows, by plain image analysis."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .characters import CHARACTERS
from .scenes import IMAGE_SIZE, PALETTE, Jitter, Scene, geometry, ink_colour, ink_mask
from .score import _as_pixels

WINDOW = 56  # px, of the square that a character is compared in
REACH = 5  # px that a character may be off its place
SCALES = (0.94, 1.0, 1.06)  # the scenes' jitter
# Rendered characters, softened and noisy, reach 0.82 and 0.88 at least. Solid blots reach 0.78 of both at most.
MIN_INK_IOU = 0.7
MIN_INK_INSIDE = 0.8  # of the ink, inside the character
INK_SHARE = 0.6  # of the way from another colour to the ink's, beyond which a pixel is not ink
_CENTRE = "centre"


def _ink(pixels: np.ndarray, scene: Scene) -> np.ndarray:
    """The pixels of the ink's colour, which the scene's colours tell."""
    names = (ink_colour(scene.background, scene.colour), scene.background, scene.colour)
    ink, *others = (np.linalg.norm(pixels - PALETTE[name], axis=-1) for name in names)
    contrast = min(float(np.linalg.norm(np.subtract(PALETTE[names[0]], PALETTE[name]))) for name in names[1:])
    return (ink < np.minimum(*others)) & (ink < INK_SHARE * contrast)


@lru_cache(maxsize=1)
def _templates() -> np.ndarray:
    """Every character at every scale, (characters * scales, pixels) float32 of zeros and ones, in a centred window."""
    edge = (IMAGE_SIZE - WINDOW) // 2
    masks = [ink_mask(c, _CENTRE, Jitter(scale=scale)) for c in CHARACTERS for scale in SCALES]
    return np.stack([m[edge:-edge, edge:-edge].ravel() >= 0.5 for m in masks]).astype(np.float32)


def read_character(image: np.ndarray, scene: Scene) -> str | None:
    """The character on the shape, or None if the ink looks like none of the 46.

    Reads colours, size and place from `scene`, but not its character. `image` is (128, 128, 3) RGB, uint8 or float in
    0..1; anything else raises ValueError. The best match by intersection over union counts, ink around it included,
    if most of the ink lies inside it.
    """
    ink = _ink(_as_pixels(image), scene)
    half = WINDOW // 2 + REACH
    (x, y), _ = geometry(scene.size, scene.place)
    row, column = round(y), round(x)
    field = np.pad(ink, half)[row : row + 2 * half, column : column + 2 * half].astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(field, (WINDOW, WINDOW)).reshape(-1, WINDOW**2)
    templates = _templates()
    overlap = windows @ templates.T
    iou = overlap / (field.sum() + templates.sum(axis=1) - overlap)
    shift, best = np.unravel_index(iou.argmax(), iou.shape)
    matches = iou[shift, best] >= MIN_INK_IOU and overlap[shift, best] >= MIN_INK_INSIDE * field.sum()
    return CHARACTERS[best // len(SCALES)] if matches else None


def score_character(image: np.ndarray, scene: Scene) -> bool:
    """Whether the picture shows the scene's character on its shape (see `read_character`)."""
    return read_character(image, scene) == scene.character
