"""Instructions that change one attribute of a scene, in two languages, and plain image analysis of the result."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np

from .scenes import (
    ATTRIBUTES,
    LANGUAGES,
    PALETTE,
    PLACES,
    RADII,
    SHAPES,
    WORDS,
    Jitter,
    Scene,
    held_out_scenes,
    is_held_out,
    render,
    training_scenes,
)
from .score import detect

VALUES = {"background": PALETTE, "colour": PALETTE, "shape": SHAPES, "size": RADII, "place": PLACES}

PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "background": (
            "change the background to {value}",
            "make the background {value}",
            "turn the background {value}",
            "change the colour of the background to {value}",
        ),
        "colour": (
            "change the {shape} to {value}",
            "make the {shape} {value}",
            "turn the {shape} {value}",
            "change the colour of the {shape} to {value}",
        ),
        "shape": (
            "change the {shape} into a {value}",
            "turn the {shape} into a {value}",
            "make the {shape} a {value}",
        ),
        "size": ("make the {shape} {value}", "change the {shape} to a {value} one"),
        "place": ("move the {shape} to the {value}", "put the {shape} at the {value}"),
    },
    "zh": {
        "background": (
            "把背景改成{value}",
            "把背景换成{value}",
            "背景变成{value}",
            "把底色改成{value}",
            "把背景的颜色变成{value}",
        ),
        "colour": (
            "把{shape}改成{value}",
            "把{shape}变成{value}",
            "{shape}换成{value}",
            "把{shape}的颜色改成{value}",
        ),
        "shape": ("把{shape}换成{value}", "把{shape}变成{value}", "{shape}改成{value}"),
        "size": ("把{shape}变{value}", "把{shape}改{value}"),
        "place": ("把{shape}移到{value}", "把{shape}放在{value}"),
    },
}
ANY_SHAPE = {"en": ("shape",), "zh": ("图形",)}
_NEW_WORDS: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "en": {
        "size": {"small": ("smaller", "small"), "large": ("larger", "bigger", "large")},
        "place": {
            "centre": ("centre", "middle"),
            "left": ("left",),
            "right": ("right",),
            "top": ("top",),
            "bottom": ("bottom",),
        },
    },
    "zh": {"size": {"small": ("小", "小一些"), "large": ("大", "大一些")}},
}


@dataclass(frozen=True)
class Edit:
    """One change: `attribute` of the scene `before` becomes `value`."""

    before: Scene
    attribute: str
    value: str

    @property
    def after(self) -> Scene:
        """The scene that is asked for."""
        return replace(self.before, **{self.attribute: self.value})


@dataclass(frozen=True)
class EditTask:
    """An instruction in words, the change that it asks for, and where the picture strays from nominal geometry."""

    instruction: str
    edit: Edit
    jitter: Jitter

    def picture(self) -> np.ndarray:
        """The picture to edit, uint8 (128, 128, 3)."""
        return render(self.edit.before, self.jitter)

    def wanted(self) -> np.ndarray:
        """The picture that is asked for, uint8 (128, 128, 3): same jitter, one attribute changed."""
        return render(self.edit.after, self.jitter)


def edits_of(scene: Scene) -> list[Edit]:
    """Every change of one attribute that leaves the shape another colour than the background."""
    colours = {scene.background, scene.colour}
    return [
        Edit(scene, attribute, value)
        for attribute in ATTRIBUTES
        for value in VALUES[attribute]
        if value != getattr(scene, attribute) and not (VALUES[attribute] is PALETTE and value in colours)
    ]


@lru_cache(maxsize=1)
def training_edits() -> tuple[Edit, ...]:
    """The changes that training may show: neither end is held out."""
    return tuple(edit for scene in training_scenes() for edit in edits_of(scene) if not is_held_out(edit.after))


@lru_cache(maxsize=1)
def held_out_edits() -> tuple[Edit, ...]:
    """The changes whose both ends training never shows."""
    return tuple(edit for scene in held_out_scenes() for edit in edits_of(scene) if is_held_out(edit.after))


def instructions(edit: Edit, language: str) -> list[str]:
    """Every wording of an edit in "zh" or "en": each phrase, each word for the shape and for the new value."""
    table = WORDS[language]
    shapes = (*ANY_SHAPE[language], *table["shape"][edit.before.shape])
    words = _NEW_WORDS[language].get(edit.attribute, table[edit.attribute])[edit.value]
    phrases = PHRASES[language][edit.attribute]
    texts = (phrase.format(shape=shape, value=word) for phrase in phrases for shape in shapes for word in words)
    return list(dict.fromkeys(texts))


def held_out_tasks(count_zh: int = 100, count_en: int = 100) -> list[EditTask]:
    """Deterministic tasks on pictures that training never shows: first Chinese, then English.

    The attributes take turns, so that each is asked for equally often in both languages. Raises ValueError when one
    language is asked for more tasks of an attribute than there are held-out edits of it.
    """
    tasks: list[EditTask] = []
    for language, count in zip(LANGUAGES, (count_zh, count_en), strict=True):
        rng = random.Random(f"held-out edits, {language}")
        piles = {a: [edit for edit in held_out_edits() if edit.attribute == a] for a in ATTRIBUTES}
        for index in range(count):
            pile = piles[ATTRIBUTES[index % len(ATTRIBUTES)]]
            if not pile:
                raise ValueError(f"asked for {count} held-out edits ({language}); there are not so many")
            edit = pile.pop(rng.randrange(len(pile)))
            tasks.append(EditTask(rng.choice(instructions(edit, language)), edit, Jitter.sample(rng)))
    return tasks


def score_edit(picture: np.ndarray, edit: Edit) -> dict[str, bool]:
    """Whether an edited picture (see `detect`) has "asked", the attribute as told, and each other one as before."""
    seen, wanted = asdict(detect(picture)), asdict(edit.after)
    return {"asked" if name == edit.attribute else name: seen[name] == wanted[name] for name in ATTRIBUTES}


def summarise_edits(scores: Sequence[dict[str, bool]]) -> dict[str, float]:
    """Rates in 0..1: "asked", each attribute kept where another was to change, and "all" right at once.

    Raises ValueError when there are no scores.
    """
    if not scores:
        raise ValueError("expected at least one score, got none")
    rates = {}
    for name in ("asked", *ATTRIBUTES):
        found = [score[name] for score in scores if name in score]
        if found:
            rates[name] = sum(found) / len(found)
    return {**rates, "all": sum(all(score.values()) for score in scores) / len(scores)}
