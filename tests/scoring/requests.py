"""Short requests for a picture, the full captions that answer them, and what a caption states."""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from functools import lru_cache

from .scenes import ATTRIBUTES, LANGUAGES, TEMPLATES, WORDS, Scene, training_scenes

HELD_OUT_ONE_IN = 8
_COUNTS = (1, 2, 2, 2, 3, 3, 4, 5)  # how many attributes a request states, each as often as it stands here
_SHAPELESS_ONE_IN = 6

Stated = dict[str, str]  # attribute -> value, in the order of ATTRIBUTES


@dataclass(frozen=True)
class Request:
    """A short text in "zh" or "en" and the attributes that it states."""

    text: str
    language: str
    stated: tuple[tuple[str, str], ...]


_SHORT: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "en": {
        "background": {},
        "colour": {},
        "shape": {"circle": ("circle", "disc"), "cross": ("cross", "plus sign"), "star": ("star",)},
        "size": {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")},
        "place": {
            "centre": ("in the middle", "in the centre"),
            "left": ("on the left", "at the left"),
            "right": ("on the right", "at the right"),
            "top": ("at the top", "on top"),
            "bottom": ("at the bottom",),
        },
    },
    "zh": {
        "background": {},
        "colour": {
            "red": ("红色", "红"), "orange": ("橙色", "橙"), "yellow": ("黄色", "黄"), "green": ("绿色", "绿"),
            "blue": ("蓝色", "蓝"), "purple": ("紫色", "紫"), "white": ("白色", "白"), "black": ("黑色", "黑"),
        },
        "shape": {
            "circle": ("圆形", "圆圈", "圆"), "square": ("正方形", "方块", "方形"), "triangle": ("三角形", "三角"),
            "star": ("五角星", "星星", "星"), "heart": ("心形", "爱心", "心"),
        },
        "size": {"small": ("小", "小小的"), "large": ("大", "巨大的")},
        "place": {},
    },
}  # fmt: skip
_ANY_SHAPE = {"en": ("shape", "thing"), "zh": ("图形", "形状")}
_FORMS = {
    "en": (
        "{size}{colour}{shape}{place}{ground}",
        "a {size}{colour}{shape}{place}{ground}",
        "A {size}{colour}{shape}{place}{ground}.",
    ),
    "zh": ("{ground}{place}{size}{colour}{shape}", "{ground}{place}一个{size}{colour}{shape}"),
}
_GROUNDS = {"en": (" on a {} background", " on {}", ", {} background"), "zh": ("{}背景上的", "{}背景，")}
_PLACES = {"en": (" {}", ", {}"), "zh": ("{}的", "{}")}


def request(stated: Stated, language: str, rng: random.Random) -> str:
    """A short text that states just these attributes, its words and form drawn from `rng`."""

    def word(name: str) -> str:
        return rng.choice(_SHORT[language][name].get(stated[name]) or WORDS[language][name][stated[name]])

    space = " " if language == "en" else ""
    parts = {name: word(name) + space if name in stated else "" for name in ("size", "colour")}
    parts["shape"] = word("shape") if "shape" in stated else rng.choice(_ANY_SHAPE[language])
    parts["place"] = rng.choice(_PLACES[language]).format(word("place")) if "place" in stated else ""
    parts["ground"] = rng.choice(_GROUNDS[language]).format(word("background")) if "background" in stated else ""
    text = rng.choice(_FORMS[language]).format(**parts)
    return text.replace("a orange", "an orange").replace("A orange", "An orange")


def state(scene: Scene, rng: random.Random) -> Stated:
    """Some attributes of a scene, as many and which drawn from `rng`; mostly the shape is one of them."""
    count = rng.choice(_COUNTS)
    names = rng.sample([name for name in ATTRIBUTES if name != "shape"], min(count, len(ATTRIBUTES) - 1))
    if count == len(ATTRIBUTES) or rng.randrange(_SHAPELESS_ONE_IN):
        names = [*names[: count - 1], "shape"]
    return {name: getattr(scene, name) for name in ATTRIBUTES if name in names}


def is_held_out_request(stated: Stated) -> bool:
    """Whether no request that states just this is ever trained, in either language."""
    digest = hashlib.sha256("/".join(f"{name}={value}" for name, value in stated.items()).encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def training_request(language: str, rng: random.Random) -> tuple[Request, Scene]:
    """A request that training may show, and a training scene that has all that it states."""
    while True:
        scene = rng.choice(_training_scenes())
        stated = state(scene, rng)
        if not is_held_out_request(stated):
            return Request(request(stated, language, rng), language, tuple(stated.items())), scene


@lru_cache(maxsize=1)
def _training_scenes() -> tuple[Scene, ...]:
    return tuple(training_scenes())


def held_out_requests(count_zh: int = 50, count_en: int = 50) -> list[Request]:
    """Deterministic requests whose combinations training never shows, all different: first Chinese, then English."""
    requests: list[Request] = []
    for language, count in (("zh", count_zh), ("en", count_en)):
        rng = random.Random(f"held-out requests, {language}")
        own: dict[tuple[tuple[str, str], ...], Request] = {}
        while len(own) < count:
            stated = state(rng.choice(_training_scenes()), rng)
            key = tuple(stated.items())
            if is_held_out_request(stated) and key not in own:
                own[key] = Request(request(stated, language, rng), language, key)
        requests.extend(own.values())
    return requests


@lru_cache(maxsize=len(LANGUAGES))
def _patterns(language: str) -> list[re.Pattern[str]]:
    table = WORDS[language]
    groups = {
        name: f"(?P<{name}>{'|'.join(re.escape(word) for words in table[name].values() for word in words)})"
        for name in ATTRIBUTES
    }
    return [
        re.compile(re.sub(r"\\\{(\w+)\\\}", lambda match: groups[match[1]], re.escape(template)))
        for template in TEMPLATES[language]
    ]


def read_caption(text: str, language: str) -> Scene | None:
    """The scene of a full caption without a character, or None if `text` isn't one in that language."""
    text = text.strip().replace("an orange", "a orange").replace("An orange", "A orange")
    for pattern in _patterns(language):
        if match := pattern.fullmatch(text):
            words = WORDS[language]
            return Scene(*(_value(words[name], match[name]) for name in ATTRIBUTES))
    return None


def _value(table: dict[str, tuple[str, ...]], word: str) -> str:
    return next(value for value, synonyms in table.items() if word in synonyms)


def keeps(text: str, asked: Request) -> bool:
    """Whether `text` is a full caption in the request's language, of a visible shape, with all that was stated."""
    scene = read_caption(text, asked.language)
    if scene is None or scene.background == scene.colour:
        return False
    return all(getattr(scene, name) == value for name, value in asked.stated)
