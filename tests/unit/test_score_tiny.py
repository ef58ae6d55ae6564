"""benchmarks/score_tiny.py counts what was drawn and written, here by a hand that is right where it is told to be."""

import importlib.util
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from scoring import scenes
from scoring.requests import Request, held_out_requests, read_caption

COUNT = 3
PARTS = (None, None, None)


@pytest.fixture
def program(pack_dir: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, whose pictures are painted: of a known prompt its scene, of a full caption what it says."""
    monkeypatch.syspath_prepend(pack_dir / "benchmarks")
    spec = importlib.util.spec_from_file_location("score_tiny", pack_dir / "benchmarks" / "score_tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    known = dict([*scenes.held_out_prompts(COUNT, COUNT), *scenes.held_out_character_prompts(COUNT, COUNT)])

    def draw(parts: Any, prompt: str, seed: int) -> torch.Tensor:
        scene = known.get(prompt) or read_caption(prompt, "en") or read_caption(prompt, "zh")
        return torch.from_numpy(scenes.render(scene)) if scene else torch.zeros(128, 128, 3)

    monkeypatch.setattr(module, "draw", draw)
    return module


def test_right_pictures_score_1_in_every_row(program: ModuleType) -> None:
    languages = ("zh", "en", "both")
    rates = program.score_scenes(PARTS, COUNT)
    assert rates == dict.fromkeys(languages, dict.fromkeys([*scenes.ATTRIBUTES, "all"], 1.0))
    assert program.score_characters(PARTS, COUNT) == dict.fromkeys(languages, {"quoted": 1.0, "unquoted": 0.0})


def test_rewrites_count_by_what_was_stated_and_pictures_by_request_and_caption(program: ModuleType) -> None:
    red_star, blue_star = (scenes.Scene("white", colour, "star", "small", "left") for colour in ("red", "blue"))
    stated = (("colour", "red"), ("shape", "star"))
    asked = {language: Request("a red star", language, stated) for language in scenes.LANGUAGES}
    rewrites = {
        "zh": [(asked["zh"], scenes.caption(red_star, "zh", random.Random(0))), (asked["zh"], "红色五角星")],
        "en": [(asked["en"], scenes.caption(blue_star, "en", random.Random(seed))) for seed in range(2)],
    }
    rates = program.score_rewrites(rewrites)
    assert rates.pop("wrong") == [["a red star", text] for _, text in (rewrites["zh"][1], *rewrites["en"])]
    assert rates == {"zh": {"kept": 0.5}, "en": {"kept": 0.0}, "both": {"kept": 0.25}}
    assert program.score_rewritten(PARTS, rewrites) == {
        "zh": {"stated": 0.5, "caption": 0.5},
        "en": {"stated": 0.0, "caption": 1.0},
        "both": {"stated": 0.25, "caption": 0.75},
    }


def test_every_request_is_rewritten_by_itself(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "rewritten", lambda clip, text: f"{clip} {text}")
    expected = {"zh": held_out_requests(2, 0), "en": held_out_requests(0, 2)}
    rewrites = program.rewrite("by the clip:", 2)
    assert rewrites == {
        language: [(asked, f"by the clip: {asked.text}") for asked in own] for language, own in expected.items()
    }
