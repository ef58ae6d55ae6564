"""The world of LongCat-Tiny: one coloured shape on a coloured background, with captions in two languages.

A large shape may carry one character, which a caption asks for in quotes.

Everything here is deterministic numpy: the trainer, the scorer and the tests share it.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .characters import CHARACTERS, character_mask, with_character

IMAGE_SIZE = 128
LANGUAGES = ("zh", "en")
ATTRIBUTES = ("background", "colour", "shape", "size", "place")

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (210, 30, 40),
    "orange": (245, 125, 25),
    "yellow": (250, 220, 60),
    "green": (40, 160, 70),
    "blue": (40, 80, 220),
    "purple": (140, 50, 170),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
RADII = {"small": 0.18, "large": 0.28}  # circumscribed radius, in image widths
PLACES = {  # offset of the shape's centre from the picture's centre, in image widths, y down
    "centre": (0.0, 0.0),
    "left": (-0.22, 0.0),
    "right": (0.22, 0.0),
    "top": (0.0, -0.22),
    "bottom": (0.0, 0.22),
}
MAX_JITTER_PX = 3.0
JITTER_SCALE = 0.06
HELD_OUT_ONE_IN = 8
SUPERSAMPLING = 4
CHARACTER_SIZE = "large"  # shapes of this size can carry a character
CHARACTER_HEIGHT = 1.2  # in radii of the shape: 43 px of 128


@dataclass(frozen=True)
class Scene:
    """One picture's attributes, each a key of the table of the same name, and the character on the shape, if any."""

    background: str
    colour: str
    shape: str
    size: str
    place: str
    character: str | None = None


@dataclass(frozen=True)
class Jitter:
    """How far a picture strays from its scene's nominal geometry: offsets in px at 128 px, a factor on the radius."""

    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0

    @classmethod
    def sample(cls, rng: random.Random) -> Jitter:
        """Draw a jitter that still leaves size and place unmistakable."""
        return cls(
            rng.uniform(-MAX_JITTER_PX, MAX_JITTER_PX),
            rng.uniform(-MAX_JITTER_PX, MAX_JITTER_PX),
            rng.uniform(1 - JITTER_SCALE, 1 + JITTER_SCALE),
        )


def _polygon(points: list[tuple[float, float]], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Even-odd test of each (x, y) against a closed polygon."""
    inside = np.zeros(x.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        if y0 == y1:
            continue
        crosses = (y0 > y) != (y1 > y)
        inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def star_points(tips: int, inner_radius: float) -> list[tuple[float, float]]:
    """Corners of a star with one tip up, outer radius 1, y down."""
    angles = np.arange(2 * tips) * np.pi / tips - np.pi / 2
    radii = np.where(np.arange(2 * tips) % 2 == 0, 1.0, inner_radius)
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for a, r in zip(angles, radii, strict=True)]


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x**2 + y**2 <= 0.95**2


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) <= 0.85


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _polygon([(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)], x, y)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _polygon(star_points(5, 0.42), x, y)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    ax, ay = abs(x), abs(y)
    return ((ax <= 0.3) & (ay <= 0.95)) | ((ay <= 0.3) & (ax <= 0.95))


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    u, v = x * 1.18, 0.15 - y * 1.15  # the sextic heart curve, turned upright and centred
    return (u**2 + v**2 - 1) ** 3 - u**2 * v**3 <= 0


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}


def coverage(
    inside: Callable[[np.ndarray, np.ndarray], np.ndarray],
    centre: tuple[float, float],
    radius: float,
    image_size: int = IMAGE_SIZE,
) -> np.ndarray:
    """Anti-aliased coverage (image_size, image_size) float32 in [0, 1] of a shape.

    `inside` tests unit coordinates, y down; `centre` is (x, y) and `radius` a length, both in px.
    """
    fine = (np.arange(image_size * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    x, y = np.meshgrid((fine - centre[0]) / radius, (fine - centre[1]) / radius)
    cells = inside(x, y).reshape(image_size, SUPERSAMPLING, image_size, SUPERSAMPLING)
    return cells.mean(axis=(1, 3), dtype=np.float32)


def geometry(
    size: str, place: str, jitter: Jitter | None = None, image_size: int = IMAGE_SIZE
) -> tuple[tuple[float, float], float]:
    """Centre (x, y) and circumscribed radius of a shape, in px."""
    jitter = jitter or Jitter()
    dx, dy = PLACES[place]
    unit = image_size / IMAGE_SIZE
    centre = (image_size * (0.5 + dx) + jitter.dx * unit, image_size * (0.5 + dy) + jitter.dy * unit)
    return centre, RADII[size] * jitter.scale * image_size


def shape_mask(
    shape: str, size: str, place: str, jitter: Jitter | None = None, image_size: int = IMAGE_SIZE
) -> np.ndarray:
    """Coverage mask (image_size, image_size) float32 in [0, 1] of one shape of the world."""
    centre, radius = geometry(size, place, jitter, image_size)
    return coverage(SHAPES[shape], centre, radius, image_size)


def ink_mask(character: str, place: str, jitter: Jitter | None = None, image_size: int = IMAGE_SIZE) -> np.ndarray:
    """Coverage mask (image_size, image_size) float32 in [0, 1] of the character on a shape at `place`."""
    centre, radius = geometry(CHARACTER_SIZE, place, jitter, image_size)
    return character_mask(character, centre, CHARACTER_HEIGHT * radius, image_size)


def ink_colour(background: str, colour: str) -> str:
    """The palette name of a character's ink: white or black, whichever stands out more; red between the two."""
    free = [name for name in ("white", "black") if name not in (background, colour)]

    def contrast(name: str) -> float:
        ink = np.array(PALETTE[name], dtype=float)
        return min(float(np.linalg.norm(ink - PALETTE[other])) for other in (background, colour))

    return max(free, key=contrast, default="red")


def compose(
    mask: np.ndarray, background: np.ndarray | tuple[int, int, int], colour: tuple[int, int, int]
) -> np.ndarray:
    """Paint `colour` through a coverage mask (H, W) over `background`, a colour or a picture: uint8 (H, W, 3)."""
    alpha = mask[..., None]
    return np.rint(np.asarray(background) * (1 - alpha) + np.asarray(colour) * alpha).astype(np.uint8)


def render(scene: Scene, jitter: Jitter | None = None, image_size: int = IMAGE_SIZE) -> np.ndarray:
    """The scene's picture, uint8 (image_size, image_size, 3) RGB.

    Raises ValueError for a character on a shape that is too small for one.
    """
    mask = shape_mask(scene.shape, scene.size, scene.place, jitter, image_size)
    picture = compose(mask, PALETTE[scene.background], PALETTE[scene.colour])
    if scene.character is None:
        return picture
    if scene.size != CHARACTER_SIZE:
        raise ValueError(f"expected a {CHARACTER_SIZE} shape for a character, got {scene}")
    ink = PALETTE[ink_colour(scene.background, scene.colour)]
    return compose(ink_mask(scene.character, scene.place, jitter, image_size), picture, ink)


@lru_cache(maxsize=1)
def all_scenes() -> tuple[Scene, ...]:
    """Every combination of attributes whose shape differs in colour from the background, in a fixed order."""
    combinations = itertools.product(PALETTE, PALETTE, SHAPES, RADII, PLACES)
    return tuple(Scene(*values) for values in combinations if values[0] != values[1])


def is_held_out(scene: Scene) -> bool:
    """Whether this combination is kept out of training, in both languages and with every character."""
    digest = hashlib.sha256("/".join(getattr(scene, name) for name in ATTRIBUTES).encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def training_scenes() -> list[Scene]:
    """The combinations that training may show."""
    return [scene for scene in all_scenes() if not is_held_out(scene)]


def held_out_scenes() -> list[Scene]:
    """The combinations that training never shows."""
    return [scene for scene in all_scenes() if is_held_out(scene)]


TEMPLATES: dict[str, tuple[str, ...]] = {
    "en": (
        "a {size} {colour} {shape} {place} on a {background} background",
        "{background} background with a {size} {colour} {shape} {place}",
        "A {size} {colour} {shape} {place}, the background is {background}.",
        "Draw a {colour} {shape}, {size}, {place}, on a {background} background.",
        "{place}, a {size} {colour} {shape}; {background} background",
        "a picture of a {colour} {shape} that is {size}, {place}, on plain {background}",
    ),
    "zh": (
        "{background}背景上，{place}有一个{size}的{colour}{shape}",
        "{place}有一个{size}{colour}{shape}，背景是{background}",
        "画一个{colour}的{size}{shape}，放在{place}，{background}背景。",
        "{background}的背景，{size}{colour}{shape}在{place}",
        "一幅图：{size}的{colour}{shape}位于{place}，底色是{background}",
        "一个{colour}{shape}，{size}的，在{place}，{background}背景",
    ),
}

_EN_COLOURS = {name: (name,) for name in PALETTE}
_ZH_COLOURS = {
    "red": ("红色",),
    "orange": ("橙色",),
    "yellow": ("黄色",),
    "green": ("绿色",),
    "blue": ("蓝色",),
    "purple": ("紫色",),
    "white": ("白色",),
    "black": ("黑色",),
}

WORDS: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "en": {
        "background": _EN_COLOURS,
        "colour": _EN_COLOURS,
        "shape": {
            "circle": ("circle", "disc"),
            "square": ("square",),
            "triangle": ("triangle",),
            "star": ("star", "five-pointed star"),
            "cross": ("cross", "plus sign"),
            "heart": ("heart",),
        },
        "size": {"small": ("small", "little"), "large": ("large", "big")},
        "place": {
            "centre": ("in the centre", "in the middle"),
            "left": ("on the left", "at the left"),
            "right": ("on the right", "at the right"),
            "top": ("at the top",),
            "bottom": ("at the bottom",),
        },
    },
    "zh": {
        "background": _ZH_COLOURS,
        "colour": _ZH_COLOURS,
        "shape": {
            "circle": ("圆形", "圆圈"), "square": ("正方形", "方块"), "triangle": ("三角形",),
            "star": ("五角星", "星星"), "cross": ("十字", "加号"), "heart": ("心形", "爱心"),
        },
        "size": {"small": ("小", "小小"), "large": ("大", "巨大")},
        "place": {
            "centre": ("中间", "中央"), "left": ("左边", "左侧"), "right": ("右边", "右侧"),
            "top": ("上方", "顶部"), "bottom": ("下方", "底部"),
        },
    },
}  # fmt: skip


def caption(scene: Scene, language: str, rng: random.Random) -> str:
    """One caption of `scene` in "zh" or "en", its template, synonyms and quotation marks drawn from `rng`."""
    table = WORDS[language]
    words = {name: rng.choice(table[name][getattr(scene, name)]) for name in ATTRIBUTES}
    text = _with_articles(rng.choice(TEMPLATES[language]).format(**words), language)
    return text if scene.character is None else with_character(text, scene.character, language, rng)


def plain_caption(scene: Scene, language: str) -> str:
    """The caption of `scene` in "zh" or "en" in the first of all wordings, without its character."""
    words = {name: WORDS[language][name][getattr(scene, name)][0] for name in ATTRIBUTES}
    return _with_articles(TEMPLATES[language][0].format(**words), language)


def _with_articles(text: str, language: str) -> str:
    return text.replace("a orange", "an orange").replace("A orange", "An orange") if language == "en" else text


def vocabulary() -> list[str]:
    """Every word of every template and attribute, for a tokenizer to learn."""
    words: list[str] = []
    for language in LANGUAGES:
        for template in TEMPLATES[language]:
            for name in ATTRIBUTES:
                template = template.replace("{" + name + "}", "\n")
            words.extend(template.split("\n"))
        for attribute in WORDS[language].values():
            words.extend(word for synonyms in attribute.values() for word in synonyms)
    return [word for word in words if word.strip()]


def held_out_prompts(count_zh: int = 100, count_en: int = 100) -> list[tuple[str, Scene]]:
    """Deterministic (prompt, scene) pairs whose combinations training never shows: first Chinese, then English.

    Raises ValueError when one language is asked for more pairs than there are held-out combinations.
    """
    scenes = held_out_scenes()
    pairs: list[tuple[str, Scene]] = []
    for language, count in (("zh", count_zh), ("en", count_en)):
        if count > len(scenes):
            raise ValueError(f"asked for {count} held-out prompts ({language}); there are {len(scenes)} combinations")
        rng = random.Random(f"held-out prompts, {language}")
        pairs.extend((caption(scene, language, rng), scene) for scene in rng.sample(scenes, count))
    return pairs


def held_out_character_prompts(count_zh: int = 100, count_en: int = 100) -> list[tuple[str, Scene]]:
    """Like `held_out_prompts`, for large shapes with a quoted character on them; all characters come equally often."""
    scenes = [scene for scene in held_out_scenes() if scene.size == CHARACTER_SIZE]
    pairs: list[tuple[str, Scene]] = []
    for language, count in (("zh", count_zh), ("en", count_en)):
        if count > len(scenes):
            raise ValueError(f"asked for {count} character prompts ({language}); there are {len(scenes)} combinations")
        rng = random.Random(f"held-out character prompts, {language}")
        order = rng.sample(CHARACTERS, len(CHARACTERS))
        for index, scene in enumerate(rng.sample(scenes, count)):
            written = replace(scene, character=order[index % len(order)])
            pairs.append((caption(written, language, rng), written))
    return pairs
