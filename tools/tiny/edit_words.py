"""Instructions beyond the world's words, so that the demo model meets a word that it doesn't know as a word.

A look is a colour and a shape at once: "change the square into a red star", or into what goes by an invented name.
Shapes that are to be changed go by invented names too. None of the names is the one that the LoRA lessons teach.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from tests.scoring.edits import ANY_SHAPE, PHRASES, Edit, instructions, training_edits
from tests.scoring.scenes import ATTRIBUTES, LANGUAGES, PALETTE, SHAPES, WORDS, Scene, is_held_out, training_scenes

LOOK = "look"
KINDS = (*ATTRIBUTES, LOOK)
LOOKS = tuple(product(PALETTE, SHAPES))
LOOK_EDITS = 16_000
NAMES = 400  # of each language, for shapes that are changed
LOOK_NAMES = 2  # of each look and language
SYLLABLES = ("bcdfghjklmnprstvw", "aeiou", "bdfgklmnpst")
HAN = (0x4E00, 0x9FA5)
TAUGHT = "佐布"  # "zorb" has no such syllables


@dataclass(frozen=True)
class LookEdit:
    """The shape of the scene `before` becomes another, in another colour."""

    before: Scene
    value: tuple[str, str]  # colour and shape
    attribute: str = LOOK

    @property
    def after(self) -> Scene:
        """The scene that is asked for."""
        return replace(self.before, colour=self.value[0], shape=self.value[1])


@lru_cache(maxsize=1)
def look_edits() -> tuple[LookEdit, ...]:
    """Some of all the changes of both whose result is not held out, the same each time."""
    rng = random.Random("looks")
    every = [
        LookEdit(scene, look)
        for scene in training_scenes()
        for look in LOOKS
        if look[0] not in (scene.colour, scene.background) and look[1] != scene.shape
    ]
    return tuple(rng.sample([edit for edit in every if not is_held_out(edit.after)], LOOK_EDITS))


def every_edit() -> list[Edit | LookEdit]:
    """All that training shows, sorted by `KINDS`."""
    edits: list[Edit | LookEdit] = [*training_edits(), *look_edits()]
    return sorted(edits, key=lambda edit: KINDS.index(edit.attribute))


def wordings(edit: Edit | LookEdit, language: str) -> list[str]:
    """The wordings of an edit in "zh" or "en", and some with invented names."""
    if isinstance(edit, LookEdit):
        shapes = (*ANY_SHAPE[language], *WORDS[language]["shape"][edit.before.shape])
        return _filled(language, shapes + _some_names(edit, language), _look_words(edit.value, language))
    known, (shape,), names = instructions(edit, language), ANY_SHAPE[language], _some_names(edit, language)
    return known + [text.replace(shape, name) for text in known if shape in text for name in names]


def _some_names(edit: Edit | LookEdit, language: str) -> tuple[str, ...]:
    rng = random.Random(f"{language} {edit.before.shape} {edit.attribute} {edit.value}")
    return tuple(rng.sample(_names(language)[:NAMES], 2))


def _look_words(look: tuple[str, str], language: str) -> list[str]:
    colours, shapes = (WORDS[language][kind][value] for kind, value in zip(("colour", "shape"), look, strict=True))
    between = "的" if language == "zh" else " "
    said = [f"{colour.removesuffix('的')}{between}{shape}" for colour, shape in product(colours, shapes)]
    first = NAMES + LOOKS.index(look) * LOOK_NAMES
    return said + list(_names(language)[first : first + LOOK_NAMES])


def _filled(language: str, shapes: Sequence[str], values: Sequence[str]) -> list[str]:
    texts = (
        phrase.format(shape=shape, value=value).replace(" a o", " an o")
        for phrase in PHRASES[language]["shape"]
        for shape in shapes
        for value in values
    )
    return list(dict.fromkeys(texts))


@lru_cache(maxsize=len(LANGUAGES))
def _names(language: str) -> tuple[str, ...]:
    """Invented names: one or two syllables, or two Chinese characters."""
    rng = random.Random(f"names, {language}")
    found: dict[str, None] = {}
    while len(found) < NAMES + len(LOOKS) * LOOK_NAMES:
        if language == "zh":
            name = "".join(chr(rng.randint(*HAN)) for _ in range(2))
        else:
            syllables = [SYLLABLES] if rng.random() < 0.4 else [SYLLABLES[:2], SYLLABLES]
            name = "".join(rng.choice(letters) for letters in sum(syllables, ()))
        if not set(name) & set(TAUGHT):
            found[name] = None
    return tuple(found)
