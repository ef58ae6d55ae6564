"""The zorb's scorer knows a zorb, and nothing that LongCat-Tiny already draws passes for one."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from scoring import scenes, zorb

EVERY = [*zorb.scenes(shown=True), *zorb.scenes(shown=False)]


def test_every_zorb_scores_fully_right() -> None:
    rng = random.Random(0)
    for scene in EVERY:
        assert zorb.score_image(zorb.render(scene, scenes.Jitter.sample(rng)), scene)["all"], scene


def test_a_wrong_attribute_is_the_only_one_marked_wrong() -> None:
    for scene in EVERY:
        image = zorb.render(scene)
        for place in set(scenes.PLACES) - {scene.place}:
            score = zorb.score_image(image, replace(scene, place=place))
            assert [name for name, right in score.items() if not right] == ["place", "all"]
        for background in set(zorb.BACKGROUNDS) - {scene.background}:
            score = zorb.score_image(image, replace(scene, background=background))
            assert [name for name, right in score.items() if not right] == ["background", "all"]


def test_no_shape_of_the_world_is_a_zorb() -> None:
    for scene in random.Random(0).sample(scenes.all_scenes(), 100):
        assert not zorb.score_image(scenes.render(scene), zorb.ZorbScene(scene.background, scene.place))["zorb"], scene
    plain = np.full((128, 128, 3), scenes.PALETTE["green"], dtype=np.uint8)
    assert not zorb.score_image(plain, zorb.ZorbScene("green", "centre"))["zorb"]


def test_a_star_without_its_heart_is_no_zorb() -> None:
    scene = zorb.ZorbScene("green", "left")
    star, _ = zorb.masks(scene.place)
    hollow = scenes.compose(star, scenes.PALETTE["green"], scenes.PALETTE[zorb.TIPS])
    assert not zorb.score_image(hollow, scene)["zorb"]


def test_training_pictures_are_few_and_not_those_that_are_asked_for() -> None:
    pairs = zorb.training_pairs()
    assert len(pairs) == 16
    shown, asked = set(zorb.scenes(shown=True)), {scene for _, scene in zorb.held_out_prompts()}
    assert len(shown) == len(asked) == 10 and not shown & asked
    for some in (shown, asked):
        assert {scene.place for scene in some} == set(scenes.PLACES)
        assert {scene.background for scene in some} == set(zorb.BACKGROUNDS)
    counts = [sum(zorb.NAMES[language] in caption for _, caption in pairs) for language in scenes.LANGUAGES]
    assert counts == [8, 8]


def test_prompts_to_be_kept_are_of_the_known_world_alone() -> None:
    prompts = zorb.preservation_prompts()
    assert len(prompts) == 96 and prompts == zorb.preservation_prompts()
    assert not any(name in prompt for prompt in prompts for name in zorb.NAMES.values())
    assert not set(prompts) & {prompt for prompt, _ in scenes.held_out_prompts()}
    chinese = sum(not prompt.isascii() for prompt in prompts)
    assert 0.4 * len(prompts) <= chinese <= 0.6 * len(prompts)
    for shape, words in scenes.WORDS["en"]["shape"].items():
        assert any(word in prompt for prompt in prompts for word in words), shape


def test_the_demo_dataset_is_what_is_drawn_here(pack_dir: Path) -> None:
    folder = pack_dir / "demo" / "datasets" / "zorb"
    pairs = zorb.training_pairs()
    assert len(list(folder.iterdir())) == 2 * len(pairs)
    for number, (picture, caption) in enumerate(pairs):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / f"{number:02}.png")), picture)
        assert (folder / f"{number:02}.txt").read_text(encoding="utf-8").strip() == caption
