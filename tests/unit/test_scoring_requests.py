"""A request states what it says it states, and a caption that loses or changes any of that is scored as wrong."""

import hashlib
import itertools
import os
import random
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from scoring import scenes
from scoring.edits import held_out_tasks
from scoring.requests import (
    Request,
    held_out_requests,
    is_held_out_request,
    keeps,
    read_caption,
    request,
    state,
    training_request,
)

REQUESTS = held_out_requests()
SCENE = scenes.Scene("orange", "blue", "star", "small", "top")
VALUES = {
    "background": scenes.PALETTE,
    "colour": scenes.PALETTE,
    "shape": scenes.SHAPES,
    "size": scenes.RADII,
    "place": scenes.PLACES,
}
# Of the 200 prompts that published scores are for: sha256 of their texts and scenes.
PUBLISHED_PROMPTS = "cec54f3a5d4334f046593a1e12752fef08576080e4ec3ed6c13d07c3fab790b3"
EVERYTHING = (
    "import hashlib;"
    "from scoring import requests, scenes; from scoring.edits import held_out_tasks;"
    "made = (scenes.held_out_prompts(), scenes.held_out_character_prompts(), requests.held_out_requests(),"
    " held_out_tasks());"
    "print(hashlib.sha256(repr(made).encode()).hexdigest())"
)
# What tells each value in a request, read by hand rather than by the tables that requests are made of.
SIGNS = {
    "en": {
        "colour": {name: name for name in scenes.PALETTE},
        "shape": {
            "circle": "circle|disc",
            "square": "square",
            "triangle": "triangle",
            "star": "star",
            "cross": "cross|plus sign",
            "heart": "heart",
        },
        "size": {"small": "small|little|tiny", "large": "large|big|huge"},
        "place": {"centre": "centre|middle", "left": "left", "right": "right", "top": "top", "bottom": "bottom"},
    },
    "zh": {
        "colour": dict(zip(scenes.PALETTE, "红橙黄绿蓝紫白黑", strict=True)),
        "shape": {
            "circle": "圆",
            "square": "正方|方块|(?<![上下])方形",  # not the one in 上方形状
            "triangle": "三角",
            "star": "星",
            "cross": "十字|加号",
            "heart": "心",
        },
        "size": {"small": "小", "large": "大"},
        "place": {"centre": "中", "left": "左", "right": "右", "top": "上方|顶部", "bottom": "下方|底部"},
    },
}
GROUNDS = {"en": r"(?: on an? | on |, )(\w+)(?: background)?\.?$", "zh": r"^(.色)背景(?:上的|，)"}


def values_in(text: str, language: str, name: str) -> list[str]:
    return [value for value, sign in SIGNS[language][name].items() if re.search(sign, text)]


def read_request(text: str, language: str) -> dict[str, list[str]]:
    """Every value of every attribute that a request names; the background stands first in Chinese, last in English."""
    ground = re.search(GROUNDS[language], text)
    background = values_in(ground[1], language, "colour") if ground else []
    rest = text.replace(ground[0], "") if ground and background else text
    found = {"background": background, **{name: values_in(rest, language, name) for name in SIGNS[language]}}
    return {name: found[name] for name in scenes.ATTRIBUTES if found[name]}


def wordings(scene: scenes.Scene, language: str) -> list[str]:
    """Every template with every synonym."""
    synonyms = [scenes.WORDS[language][name][getattr(scene, name)] for name in scenes.ATTRIBUTES]
    texts = [
        template.format(**dict(zip(scenes.ATTRIBUTES, words, strict=True)))
        for template in scenes.TEMPLATES[language]
        for words in itertools.product(*synonyms)
    ]
    if language == "en":
        texts = [text.replace("a orange", "an orange").replace("A orange", "An orange") for text in texts]
    return texts


def others(scene: scenes.Scene, name: str) -> list[scenes.Scene]:
    """The visible scenes that differ in one attribute."""
    changed = [replace(scene, **{name: value}) for value in VALUES[name] if value != getattr(scene, name)]
    return [other for other in changed if other.background != other.colour]


def test_the_prompts_that_scores_were_published_for_are_unchanged():
    pairs = [(prompt, tuple(vars(scene).values())[:5]) for prompt, scene in scenes.held_out_prompts()]
    assert hashlib.sha256(repr(pairs).encode()).hexdigest() == PUBLISHED_PROMPTS


def test_another_process_with_another_hash_seed_asks_for_the_same(pack_dir):
    made = (scenes.held_out_prompts(), scenes.held_out_character_prompts(), held_out_requests(), held_out_tasks())
    here = hashlib.sha256(repr(made).encode()).hexdigest()
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(pack_dir / "tests")}
        command = [sys.executable, "-c", EVERYTHING]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert said.stdout.strip() == here


def test_held_out_requests_are_different_and_never_trained():
    assert [asked.language for asked in REQUESTS] == ["zh"] * 50 + ["en"] * 50
    assert len({(asked.language, asked.stated) for asked in REQUESTS}) == len({asked.text for asked in REQUESTS}) == 100
    assert all(is_held_out_request(dict(asked.stated)) for asked in REQUESTS)
    assert {len(asked.stated) for asked in REQUESTS} == {1, 2, 3, 4, 5}
    rng = random.Random(0)
    for index in range(400):
        asked, scene = training_request(scenes.LANGUAGES[index % 2], rng)
        assert not is_held_out_request(dict(asked.stated))
        assert not scenes.is_held_out(scene)
        assert all(getattr(scene, name) == value for name, value in asked.stated)


@pytest.mark.parametrize("language", scenes.LANGUAGES)
def test_a_request_says_what_it_states_and_nothing_else(language):
    rng = random.Random(0)
    for _ in range(1500):
        stated = state(rng.choice(scenes.all_scenes()), rng)
        text = request(stated, language, rng)
        assert read_request(text, language) == {name: [value] for name, value in stated.items()}, text
        assert "{" not in text and "a orange" not in text and "  " not in text


def test_held_out_requests_say_what_they_state():
    for asked in REQUESTS:
        assert read_request(asked.text, asked.language) == {name: [value] for name, value in asked.stated}, asked


@pytest.mark.parametrize("language", scenes.LANGUAGES)
def test_every_wording_of_a_caption_is_read_back(language):
    for scene in random.Random(0).sample(scenes.all_scenes(), 40):
        texts = wordings(scene, language)
        assert len(texts) >= 6
        for text in texts:
            assert read_caption(text, language) == scene, text
        assert read_caption(scenes.caption(scene, language, random.Random(0)), language) == scene


@pytest.mark.parametrize("language", scenes.LANGUAGES)
def test_what_is_no_full_caption_of_the_language_is_not_read(language):
    text, other = wordings(SCENE, language)[0], ({*scenes.LANGUAGES} - {language}).pop()
    assert read_caption(f" {text}\n", language) == SCENE
    for wrong in (text + text, text[1:], text[:-1], text + "'A'", "", wordings(SCENE, other)[0]):
        assert read_caption(wrong, language) is None, wrong
    for asked in REQUESTS:
        assert read_caption(asked.text, language) is None


@pytest.mark.parametrize("language", scenes.LANGUAGES)
def test_a_caption_that_loses_an_attribute_is_wrong_whether_it_was_stated_or_not(language):
    for name in scenes.ATTRIBUTES:
        for stated in scenes.ATTRIBUTES:
            asked = Request("", language, ((stated, getattr(SCENE, stated)),))
            for template in scenes.TEMPLATES[language]:
                words = {n: scenes.WORDS[language][n][getattr(SCENE, n)][0] for n in scenes.ATTRIBUTES}
                assert keeps(template.format(**words), asked)
                assert not keeps(template.format(**{**words, name: ""}), asked)


@pytest.mark.parametrize("language", scenes.LANGUAGES)
@pytest.mark.parametrize("name", scenes.ATTRIBUTES)
def test_a_caption_that_changes_an_attribute_is_wrong_just_if_it_was_stated(language, name):
    rng = random.Random(0)
    for changed in others(SCENE, name):
        text = scenes.caption(changed, language, rng)
        for count in range(1, len(scenes.ATTRIBUTES) + 1):
            for names in itertools.combinations(scenes.ATTRIBUTES, count):
                asked = Request("", language, tuple((n, getattr(SCENE, n)) for n in names))
                assert keeps(text, asked) == (name not in names)


def test_an_answer_in_the_other_language_or_without_a_visible_shape_is_wrong():
    stated = (("shape", "star"),)
    for language, other in (("zh", "en"), ("en", "zh")):
        text = scenes.caption(SCENE, language, random.Random(0))
        assert keeps(text, Request("", language, stated))
        assert not keeps(text, Request("", other, stated))
        unseen = scenes.caption(replace(SCENE, colour="orange"), language, random.Random(0))
        assert not keeps(unseen, Request("", language, stated))
