"""A concept that LongCat-Tiny has never seen, under a word that it has never read: the zorb (佐布).

A zorb is a large six-pointed star with a white hexagon at its heart. Like every shape of the world it has a colour of
its own, a place and a background, in captions of the same words. None of these colours is white.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from . import scenes as world
from .scenes import (
    IMAGE_SIZE,
    LANGUAGES,
    PALETTE,
    PLACES,
    RADII,
    SHAPES,
    TEMPLATES,
    WORDS,
    Jitter,
    _polygon,
    coverage,
    shape_mask,
    star_points,
)
from .score import BORDER_PX, MIN_IOU, OFFSETS_PX, _as_pixels, _shrink, nearest_colour

NAMES = {"en": "zorb", "zh": "佐布"}
HEART = "white"
COLOURS = tuple(name for name in PALETTE if name != HEART)  # of tips and of backgrounds
ATTRIBUTES = ("background", "colour", "zorb", "place")
SIZE = "large"
INNER_RADIUS = 3**-0.5  # of the hexagon, whose corners are those between the tips
MIN_HEART_IOU = 0.5
ZORBS, OTHERS = 10, 6  # pictures to learn from


@dataclass(frozen=True)
class ZorbScene:
    """One picture of a zorb; background and colour (of its tips) are of COLOURS."""

    background: str
    colour: str
    place: str


@lru_cache(maxsize=1)
def scenes() -> tuple[ZorbScene, ...]:
    """All 210 scenes, in an order that is fixed and has no pattern."""
    every = [ZorbScene(*values) for values in product(COLOURS, COLOURS, PLACES) if values[0] != values[1]]
    return tuple(sorted(every, key=lambda scene: hashlib.sha256("/".join(astuple(scene)).encode()).digest()))


def caption(scene: ZorbScene, language: str, rng: random.Random) -> str:
    """One caption in "zh" or "en", its template and synonyms drawn from `rng`."""
    names = {"background": scene.background, "colour": scene.colour, "size": SIZE, "place": scene.place}
    words = {name: rng.choice(WORDS[language][name][value]) for name, value in names.items()}
    text = rng.choice(TEMPLATES[language]).format(shape=NAMES[language], **words)
    return text.replace("a orange", "an orange").replace("A orange", "An orange") if language == "en" else text


def masks(place: str, jitter: Jitter | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Coverage (128, 128) in 0..1 of the whole star, and of its heart."""
    jitter = jitter or Jitter()
    dx, dy = PLACES[place]
    centre = (IMAGE_SIZE * (0.5 + dx) + jitter.dx, IMAGE_SIZE * (0.5 + dy) + jitter.dy)
    radius = RADII[SIZE] * jitter.scale * IMAGE_SIZE
    star = star_points(6, INNER_RADIUS)
    heart = star[1::2]
    return (
        coverage(lambda x, y: _polygon(star, x, y), centre, radius),
        coverage(lambda x, y: _polygon(heart, x, y), centre, radius),
    )


def render(scene: ZorbScene, jitter: Jitter | None = None) -> np.ndarray:
    """The scene's picture, uint8 (128, 128, 3) RGB."""
    picture = np.broadcast_to(np.asarray(PALETTE[scene.background], float), (IMAGE_SIZE, IMAGE_SIZE, 3))
    for mask, colour in zip(masks(scene.place, jitter), (scene.colour, HEART), strict=True):
        alpha = mask[..., None]
        picture = picture * (1 - alpha) + np.asarray(PALETTE[colour], float) * alpha
    return np.rint(picture).astype(np.uint8)


def training_pairs(zorbs: int = ZORBS, others: int = OTHERS) -> list[tuple[np.ndarray, str]]:
    """(picture, caption) to learn from, in Chinese and English in turns.

    The others, one of each shape that the model knows, keep it from drawing zorbs everywhere.
    """
    rng = random.Random("zorbs to learn from")
    pairs = [
        (render(scene, Jitter.sample(rng)), caption(scene, LANGUAGES[index % 2], rng))
        for index, scene in enumerate(scenes()[:zorbs])
    ]
    for index in range(others):
        shape = list(SHAPES)[index % len(SHAPES)]
        scene = rng.choice([each for each in world.training_scenes() if each.shape == shape])
        pairs.append((world.render(scene, Jitter.sample(rng)), world.caption(scene, LANGUAGES[index % 2], rng)))
    return pairs


def held_out_prompts(count: int = 20) -> list[tuple[str, ZorbScene]]:
    """(prompt, scene) of the last `count` scenes, which `training_pairs` does not show; languages take turns."""
    rng = random.Random("zorbs to be drawn")
    return [(caption(scene, LANGUAGES[index % 2], rng), scene) for index, scene in enumerate(scenes()[-count:])]


def score_image(image: np.ndarray, scene: ZorbScene) -> dict[str, bool]:
    """Whether background, colour, zorb and place are what the prompt asked for, and "all" of them.

    `image` is (128, 128, 3) RGB, uint8 or float in 0..1. A zorb is there if what is coloured or white fits its star
    better than every other shape of the world, and what is white fits its heart.
    """
    pixels = _as_pixels(image)
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = False
    ground = np.median(pixels[border], axis=0)
    found = max((_fit(pixels, ground, colour) for colour in COLOURS), key=lambda fit: fit.iou)
    there = found.iou >= MIN_IOU
    scores = {
        "background": nearest_colour(ground) == scene.background,
        "colour": there and found.colour == scene.colour,
        "zorb": there,
        "place": there and found.place == scene.place,
    }
    return {**scores, "all": all(scores.values())}


def summarise(scores: Sequence[dict[str, bool]]) -> dict[str, float]:
    """The share of pictures, 0..1, that have each attribute right, and all of them at once."""
    return {name: sum(score[name] for score in scores) / len(scores) for name in (*ATTRIBUTES, "all")}


@dataclass(frozen=True)
class _Fit:
    """How well a picture shows a zorb of one colour: the best place, and 0 where something else fits better."""

    colour: str
    place: str
    iou: float


def _fit(pixels: np.ndarray, ground: np.ndarray, colour: str) -> _Fit:
    colours = np.stack([ground, np.asarray(PALETTE[colour], float), np.asarray(PALETTE[HEART], float)])
    nearest = np.linalg.norm(pixels[:, :, None] - colours, axis=-1).argmin(-1)
    labels, stars, hearts = _candidates()
    star, heart = _shrink(nearest > 0).ravel(), _shrink(nearest == 2).ravel()
    fits = np.where(_ious(heart, hearts) >= MIN_HEART_IOU, _ious(star, stars), 0.0)
    best = int(fits.argmax())
    tips = pixels[nearest == 1]
    is_colour = len(tips) > 0 and nearest_colour(np.median(tips, axis=0)) == colour
    better = float(_ious(star, _others()).max()) > fits[best]
    return _Fit(colour, labels[best], float(fits[best]) if is_colour and not better else 0.0)


@lru_cache(maxsize=1)
def _candidates() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Places, and flattened masks (N, pixels) of star and heart there, with the scenes' jitter."""
    labels, stars, hearts = [], [], []
    for place in PLACES:
        star, heart = masks(place)
        for shift in product(OFFSETS_PX, OFFSETS_PX):
            labels.append(place)
            stars.append(_shrink(np.roll(star, shift, (0, 1))).ravel())
            hearts.append(_shrink(np.roll(heart, shift, (0, 1))).ravel())
    return labels, np.array(stars), np.array(hearts)


@lru_cache(maxsize=1)
def _others() -> np.ndarray:
    """Flattened masks (N, pixels) of the shapes that the model knows, with the scenes' jitter."""
    known = (shape_mask(*label) for label in product(SHAPES, RADII, PLACES))
    shifts = list(product(OFFSETS_PX, OFFSETS_PX))
    return np.array([_shrink(np.roll(mask, shift, (0, 1))).ravel() for mask in known for shift in shifts])


def _ious(seen: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(N,): intersection over union of a mask (pixels,) with each of (N, pixels)."""
    overlap = wanted.astype(np.float32) @ seen.astype(np.float32)
    return overlap / np.maximum(wanted.sum(axis=1) + seen.sum() - overlap, 1)
