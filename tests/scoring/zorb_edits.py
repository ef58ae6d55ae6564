"""An instruction that LongCat-Tiny-Edit has never read: turn the shape of a picture into a zorb.

The zorb comes in the place of the shape, on the same background. It is asked for in the words that change a shape.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from . import scenes as world
from . import zorb
from .edits import ANY_SHAPE, PHRASES, edits_of, instructions
from .scenes import LANGUAGES, SHAPES, WORDS, Jitter, Scene

PAIRS = 16
PRESERVED = 32


@dataclass(frozen=True)
class ZorbTask:
    """An instruction in words, the picture that it is for, and where that strays from nominal geometry."""

    instruction: str
    before: Scene
    jitter: Jitter

    @property
    def scene(self) -> zorb.ZorbScene:
        """What is asked for."""
        return zorb.ZorbScene(self.before.background, self.before.place)

    def picture(self) -> np.ndarray:
        """The picture to edit, uint8 (128, 128, 3)."""
        return world.render(self.before, self.jitter)

    def wanted(self) -> np.ndarray:
        """The picture that is asked for, uint8 (128, 128, 3): same jitter."""
        return zorb.render(self.scene, self.jitter)


def training_tasks(count: int = PAIRS) -> list[ZorbTask]:
    """Tasks to learn from, on the backgrounds and places of ``zorb.scenes(shown=True)``."""
    return _tasks(zorb.scenes(shown=True), world.training_scenes(), count, "zorb edits to learn from")


def held_out_tasks(count: int = 20) -> list[ZorbTask]:
    """Tasks on backgrounds and places that `training_tasks` does not show, in Chinese and in English in turns."""
    return _tasks(zorb.scenes(shown=False), world.held_out_scenes(), count, "zorb edits to be made")


def preservation_prompts(count: int) -> list[str]:
    """Instructions that change one attribute, in both languages in turns: the nth is for the nth picture to preserve.

    After the last picture they go on with the first, as the trainer does.
    """
    rng = random.Random("instructions to preserve")
    scenes = [scene for scene, _ in _preserved()]
    texts = []
    for index in range(count):
        scene = scenes[index % len(scenes)]
        attribute = world.ATTRIBUTES[index % len(world.ATTRIBUTES)]
        language = LANGUAGES[index // len(world.ATTRIBUTES) % len(LANGUAGES)]
        edit = rng.choice([each for each in edits_of(scene) if each.attribute == attribute])
        texts.append(rng.choice(instructions(edit, language)))
    return texts


def preservation_pictures() -> list[np.ndarray]:
    """Pictures of scenes to train on, for those instructions: every shape, size, colour, background and place."""
    return [world.render(scene, jitter) for scene, jitter in _preserved()]


def _preserved() -> list[tuple[Scene, Jitter]]:
    rng = random.Random("pictures to preserve")
    return [(rng.choice(world.training_scenes()), Jitter.sample(rng)) for _ in range(PRESERVED)]


def _tasks(places: list[zorb.ZorbScene], known: list[Scene], count: int, seed: str) -> list[ZorbTask]:
    """The places and shapes take turns; all shapes are large, like a zorb."""
    rng = random.Random(seed)
    tasks = []
    for index in range(count):
        place, shape = places[index % len(places)], list(SHAPES)[index % len(SHAPES)]
        ground = (place.background, place.place, zorb.SIZE)
        fitting = [s for s in known if (s.background, s.place, s.size) == ground]
        before = rng.choice([s for s in fitting if s.shape == shape] or fitting)
        language = LANGUAGES[(index + index // len(places)) % 2]
        general = index // 2 % 4 == 3  # as often in either language
        word = rng.choice(ANY_SHAPE[language] if general else WORDS[language]["shape"][before.shape])
        text = rng.choice(PHRASES[language]["shape"]).format(shape=word, value=zorb.NAMES[language])
        tasks.append(ZorbTask(text, before, Jitter.sample(rng)))
    return tasks
