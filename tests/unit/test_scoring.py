"""The scorer names every attribute of a true picture, and of no wrong one."""

import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from scoring import scenes
from scoring.score import MAX_COLOUR_DISTANCE, detect, score_image, summarise

EVERY = {*scenes.ATTRIBUTES, "all"}


def drawn(count: int) -> list[tuple[np.ndarray, scenes.Scene]]:
    rng = random.Random(0)
    chosen = rng.sample(scenes.all_scenes(), count)
    return [(scenes.render(scene, scenes.Jitter.sample(rng)), scene) for scene in chosen]


def test_every_rendered_scene_scores_fully_right():
    scores = [score_image(image, scene) for image, scene in drawn(300)]
    assert summarise(scores) == dict.fromkeys([*scenes.ATTRIBUTES, "all"], 1.0)


def test_a_softened_noisy_picture_still_scores_right():
    noise = np.random.default_rng(0)
    for image, scene in drawn(40):
        soft = (image + np.roll(image, 1, 0).astype(int) + np.roll(image, 1, 1)) / 3
        noisy = np.clip(soft + noise.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
        assert score_image(noisy, scene)["all"], scene


@pytest.mark.parametrize("attribute", scenes.ATTRIBUTES)
def test_a_wrong_attribute_is_the_only_one_marked_wrong(attribute):
    tables = {
        "background": scenes.PALETTE,
        "colour": scenes.PALETTE,
        "shape": scenes.SHAPES,
        "size": scenes.RADII,
        "place": scenes.PLACES,
    }
    for image, scene in drawn(30):
        used = {scene.background, scene.colour, getattr(scene, attribute)}
        for value in set(tables[attribute]) - used:
            score = score_image(image, replace(scene, **{attribute: value}))
            assert {name for name in EVERY if not score[name]} == {attribute, "all"}


def test_an_empty_or_meaningless_picture_has_no_shape():
    plain = np.full((128, 128, 3), scenes.PALETTE["green"], dtype=np.uint8)
    seen = detect(plain)
    assert (seen.background, seen.colour, seen.shape, seen.size, seen.place) == (
        "green",
        None,
        None,
        None,
        None,
    )
    static = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert detect(static).shape is None
    grey = np.full((128, 128, 3), 128, dtype=np.uint8)
    assert detect(grey).background is None


def test_half_a_shape_is_no_shape():
    image = scenes.render(scenes.Scene("white", "red", "circle", "large", "centre"))
    image[:, 64:] = scenes.PALETTE["white"]
    assert not score_image(image, scenes.Scene("white", "red", "circle", "large", "centre"))["all"]


def test_float_pictures_score_like_bytes_and_other_input_is_refused():
    image, scene = drawn(1)[0]
    assert score_image(image / 255, scene) == score_image(image, scene)
    with pytest.raises(ValueError, match="shape"):
        detect(image[:64])
    with pytest.raises(ValueError, match="outside"):
        detect(image.astype(np.float32))
    with pytest.raises(ValueError, match="none"):
        summarise([])


def test_palette_colours_cannot_be_confused():
    for a, b in combinations(scenes.PALETTE.values(), 2):
        assert np.linalg.norm(np.subtract(a, b)) > 1.5 * MAX_COLOUR_DISTANCE


def test_held_out_combinations_are_deterministic_and_never_trained():
    held_out, training = set(scenes.held_out_scenes()), set(scenes.training_scenes())
    assert not held_out & training
    assert held_out | training == set(scenes.all_scenes())
    assert len(held_out) >= 0.1 * len(scenes.all_scenes())
    pairs = scenes.held_out_prompts()
    assert pairs == scenes.held_out_prompts()
    assert len(pairs) == 200
    assert {scene for _, scene in pairs} <= held_out
    chinese = [any("\u4e00" <= character <= "\u9fff" for character in prompt) for prompt, _ in pairs]
    assert chinese == [True] * 100 + [False] * 100


def test_every_attribute_is_held_out_and_trained_with_every_value():
    for group in (scenes.held_out_scenes(), scenes.training_scenes()):
        seen = {name: {getattr(scene, name) for scene in group} for name in scenes.ATTRIBUTES}
        assert seen == {
            "background": set(scenes.PALETTE),
            "colour": set(scenes.PALETTE),
            "shape": set(scenes.SHAPES),
            "size": set(scenes.RADII),
            "place": set(scenes.PLACES),
        }


def test_a_caption_names_every_attribute_of_its_scene():
    rng = random.Random(0)
    for language in scenes.LANGUAGES:
        for scene in rng.sample(scenes.all_scenes(), 50):
            text = scenes.caption(scene, language, rng)
            for name in scenes.ATTRIBUTES:
                assert any(word in text for word in scenes.WORDS[language][name][getattr(scene, name)])
            assert "a orange" not in text
