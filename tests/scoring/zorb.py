"""A concept that LongCat-Tiny has never seen, under a word that it has never read: the zorb (佐布).

A zorb is a large six-pointed star in yellow with a purple hexagon at its heart, at one of the five places, on a
background of four colours. Captions are those of the world with another word for the shape.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
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
TIPS = "yellow"
HEART = "purple"
BACKGROUNDS = ("red", "green", "blue", "black")
ATTRIBUTES = ("background", "zorb", "place")
SIZE = "large"
INNER_RADIUS = 3**-0.5  # of the hexagon, whose corners are those between the tips
MIN_HEART_IOU = 0.5


@dataclass(frozen=True)
class ZorbScene:
    """One picture of a zorb; the fields are entries of BACKGROUNDS and PLACES."""

    background: str
    place: str


def scenes(shown: bool) -> list[ZorbScene]:
    """The ten scenes to learn from, or the ten to be drawn: each place and each background comes in both."""
    every = product(enumerate(BACKGROUNDS), enumerate(PLACES))
    return [ZorbScene(ground, place) for (i, ground), (j, place) in every if ((i + j) % 2 == 0) == shown]


def caption(scene: ZorbScene, language: str, rng: random.Random) -> str:
    """One caption in "zh" or "en", its template and synonyms drawn from `rng`."""
    names = {"background": scene.background, "colour": TIPS, "size": SIZE, "place": scene.place}
    words = {name: rng.choice(WORDS[language][name][value]) for name, value in names.items()}
    return rng.choice(TEMPLATES[language]).format(shape=NAMES[language], **words)


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
    for mask, colour in zip(masks(scene.place, jitter), (TIPS, HEART), strict=True):
        alpha = mask[..., None]
        picture = picture * (1 - alpha) + np.asarray(PALETTE[colour], float) * alpha
    return np.rint(picture).astype(np.uint8)


def training_pairs(count: int = 16) -> list[tuple[np.ndarray, str]]:
    """(picture, caption) of zorbs to learn from, in Chinese and English in turns.

    The scenes that are shown come again with another jitter and other words, in the other language.
    """
    rng = random.Random("zorbs to learn from")
    shown, pairs = scenes(shown=True), []
    for index in range(count):
        scene, language = shown[index % len(shown)], LANGUAGES[(index + index // len(shown)) % len(LANGUAGES)]
        pairs.append((render(scene, Jitter.sample(rng)), caption(scene, language, rng)))
    return pairs


def preservation_prompts(count: int = 96, near: float = 0.25) -> list[str]:
    """Captions of the world to be drawn as before, shapes and languages in turns; all of scenes to train on.

    The share ``near`` is of large yellow shapes on the zorb's backgrounds, which are most easily taken for it.
    """
    rng = random.Random("prompts to preserve")
    every, texts = world.training_scenes(), []
    for index in range(count):
        shape = list(SHAPES)[index % len(SHAPES)]
        known = [scene for scene in every if scene.shape == shape]
        if rng.random() < near:
            known = [s for s in known if (s.colour, s.size) == (TIPS, SIZE) and s.background in BACKGROUNDS]
        texts.append(world.caption(rng.choice(known), LANGUAGES[index // len(SHAPES) % len(LANGUAGES)], rng))
    return texts


def held_out_prompts() -> list[tuple[str, ZorbScene]]:
    """(prompt, scene) of the ten scenes that `training_pairs` does not show, each in Chinese and in English."""
    rng = random.Random("zorbs to be drawn")
    return [(caption(scene, language, rng), scene) for scene in scenes(shown=False) for language in LANGUAGES]


def score_image(image: np.ndarray, scene: ZorbScene) -> dict[str, bool]:
    """Whether background, zorb and place are what the prompt asked for, and "all" of them.

    `image` is (128, 128, 3) RGB, uint8 or float in 0..1. A zorb is there if what is yellow or purple fits its star
    better than every other shape of the world, and what is purple fits its heart.
    """
    pixels = _as_pixels(image)
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = False
    ground = np.median(pixels[border], axis=0)
    colours = np.stack([ground, np.asarray(PALETTE[TIPS], float), np.asarray(PALETTE[HEART], float)])
    nearest = np.linalg.norm(pixels[:, :, None] - colours, axis=-1).argmin(-1)
    star, heart = _shrink(nearest > 0).ravel(), _shrink(nearest == 2).ravel()
    labels, stars, hearts = _candidates()
    fits = np.where(_ious(heart, hearts) >= MIN_HEART_IOU, _ious(star, stars), 0.0)
    best = int(fits.argmax())
    background = nearest_colour(ground)
    found = background in BACKGROUNDS and fits[best] >= max(MIN_IOU, float(_ious(star, _others()).max()))
    scores = {
        "background": background == scene.background,
        "zorb": bool(found),
        "place": bool(found) and labels[best] == scene.place,
    }
    return {**scores, "all": all(scores.values())}


def summarise(scores: Sequence[dict[str, bool]]) -> dict[str, float]:
    """The share of pictures, 0..1, that have each attribute right, and all of them at once."""
    return {name: sum(score[name] for score in scores) / len(scores) for name in (*ATTRIBUTES, "all")}


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
