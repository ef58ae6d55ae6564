"""A character on a shape is read back as itself, as no other, and not where there is none."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from longcat_pack.longcat_backend.prompts import split_quoted
from scoring import scenes
from scoring.characters import CHARACTERS, QUOTES, character_mask, with_character, without_quotes
from scoring.reading import read_character, score_character

LARGE = [scene for scene in scenes.all_scenes() if scene.size == scenes.CHARACTER_SIZE]
PROMPTS = scenes.held_out_character_prompts()
WORDINGS = 60  # draws, in which every clause comes with every pair of quotes
SCENE = scenes.Scene("white", "red", "circle", "large", "left")


@cache
def drawn() -> list[tuple[np.ndarray, scenes.Scene]]:
    """Every character once, on a shape that strays from its place."""
    rng = random.Random(0)
    written = [replace(scene, character=c) for scene, c in zip(rng.sample(LARGE, 46), CHARACTERS, strict=True)]
    return [(scenes.render(scene, scenes.Jitter.sample(rng)), scene) for scene in written]


def painted(scene: scenes.Scene, mask: np.ndarray) -> np.ndarray:
    """The scene without its character, and `mask` on it in the ink's colour."""
    bare = scenes.render(replace(scene, character=None))
    return scenes.compose(mask, bare, scenes.PALETTE[scenes.ink_colour(scene.background, scene.colour)])


def test_every_character_is_read_back():
    assert [read_character(image, scene) for image, scene in drawn()] == list(CHARACTERS)


def test_a_softened_noisy_character_is_still_read():
    noise = np.random.default_rng(0)
    for image, scene in drawn():
        soft = (image + np.roll(image, 1, 0).astype(int) + np.roll(image, 1, 1)) / 3
        noisy = np.clip(soft + noise.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
        assert score_character(noisy, scene), scene


def test_a_different_character_is_not_what_was_asked_for():
    """Among them those that look most alike: S and 8, 3 and 8, C and G, 6 and 8."""
    pairs = ["S8", "38", "CG", "68", *zip(CHARACTERS[::5], CHARACTERS[1::5], strict=False)]
    for shown, asked in [*pairs, *((b, a) for a, b in pairs)]:
        image = scenes.render(replace(SCENE, character=shown))
        assert score_character(image, replace(SCENE, character=shown))
        assert not score_character(image, replace(SCENE, character=asked))


def test_reading_does_not_look_at_the_character_that_was_asked_for():
    for image, scene in drawn()[::5]:
        for asked in (None, "A", "八"):
            assert read_character(image, replace(scene, character=asked)) == scene.character


def test_a_scene_without_a_character_reads_none():
    rng = random.Random(1)
    for scene in rng.sample(scenes.all_scenes(), 40):
        image = scenes.render(scene, scenes.Jitter.sample(rng))
        assert read_character(image, scene) is None, scene
        assert not score_character(image, replace(scene, character="A"))


def test_a_character_that_is_small_or_elsewhere_is_not_read():
    for _, scene in drawn()[::6]:
        (x, y), _ = scenes.geometry(scene.size, scene.place)
        for centre, height in (((x, y), 22), ((x + 20, y + 20), 43)):
            assert read_character(painted(scene, character_mask(scene.character, centre, height, 128)), scene) is None


def blots() -> Iterator[tuple[int, int, np.ndarray]]:
    """Solid ellipses, boxes and diamonds up to the size of a character, where it would be; half width, half height."""
    (x, y), _ = scenes.geometry(SCENE.size, SCENE.place)
    down, across = np.mgrid[: scenes.IMAGE_SIZE, : scenes.IMAGE_SIZE].astype(np.float32)
    for width, height in itertools.product(range(8, 27, 3), repeat=2):
        right, below = abs(across - x) / width, abs(down - y) / height
        for distance in (np.hypot(right, below), np.maximum(right, below), right + below):
            yield width, height, painted(SCENE, (distance <= 1).astype(np.float32))


def test_a_solid_blot_is_no_character():
    """No disc, square or diamond is; a few boxes that are as bold as a B or an M cannot be told from one."""
    read = [(width == height, read_character(image, SCENE)) for width, height, image in blots()]
    assert len(read) == 147
    assert {character for is_regular, character in read if is_regular} == {None}
    assert sum(character is not None for _, character in read) <= 3


def test_float_pictures_read_like_bytes_and_other_input_is_refused():
    image, scene = drawn()[0]
    assert read_character(image / 255, scene) == scene.character
    with pytest.raises(ValueError, match="shape"):
        read_character(image[:64], scene)
    with pytest.raises(ValueError, match="expected one of"):
        character_mask("a", (64, 64), 43, 128)
    with pytest.raises(ValueError, match="expected a large shape"):
        scenes.render(replace(SCENE, size="small", character="A"))


def test_the_ink_is_neither_the_colour_of_the_shape_nor_of_the_background():
    for background in scenes.PALETTE:
        for colour in set(scenes.PALETTE) - {background}:
            assert scenes.ink_colour(background, colour) not in (background, colour)


@pytest.mark.parametrize("language", scenes.LANGUAGES)
def test_a_caption_quotes_its_character_as_longcat_reads_quotes(language):
    seen = Counter()
    for seed in range(WORDINGS):
        rng = random.Random(seed)
        scene = replace(rng.choice(LARGE), character=rng.choice(CHARACTERS))
        text = scenes.caption(scene, language, rng)
        quoted = [part for part, is_quoted in split_quoted(text) if is_quoted]
        assert [part[1:-1] for part in quoted] == [scene.character], text
        seen[quoted[0][0] + quoted[0][-1]] += 1
    assert set(seen) == set(QUOTES)


@pytest.mark.parametrize("language", scenes.LANGUAGES)
def test_removing_quotes_removes_exactly_the_quotes(language):
    for seed in range(WORDINGS):
        rng = random.Random(seed)
        plain = scenes.caption(rng.choice(LARGE), language, rng)
        character = rng.choice(CHARACTERS)
        text = with_character(plain, character, language, rng)
        quoted = next(part for part, is_quoted in split_quoted(text) if is_quoted)
        assert without_quotes(text) == text.replace(quoted, character)
        assert not any(is_quoted for _, is_quoted in split_quoted(without_quotes(text)))
        assert without_quotes(plain) == plain


def test_character_prompts_are_deterministic_balanced_and_never_trained():
    assert scenes.held_out_character_prompts() == PROMPTS
    bare = [replace(scene, character=None) for _, scene in PROMPTS]
    assert set(bare) <= set(scenes.held_out_scenes()) - set(scenes.training_scenes())
    assert all(scenes.is_held_out(scene) and scene.size == scenes.CHARACTER_SIZE for _, scene in PROMPTS)
    for half in (PROMPTS[:100], PROMPTS[100:]):
        assert len({scene for _, scene in half}) == 100
        counts = Counter(scene.character for _, scene in half)
        assert set(counts) == set(CHARACTERS) and max(counts.values()) - min(counts.values()) == 1
    for index, (prompt, scene) in enumerate(PROMPTS):
        assert f"{scene.character}" in prompt and "a orange" not in prompt
        assert any("\u4e00" <= c <= "\u9fff" for c in prompt.replace(scene.character, "")) == (index < 100)
    with pytest.raises(ValueError, match="asked for 1000"):
        scenes.held_out_character_prompts(1000, 0)
