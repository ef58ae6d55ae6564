"""What the demo checkpoints are trained on is what the pack gives them: tokens, conditioning, questions."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from longcat_pack.longcat_backend import checkpoints, editing, prompts, rewriting, text_encoder, vision
from scoring.edits import held_out_tasks
from scoring.scenes import held_out_character_prompts

# As in tests/demo_training.py, which can't be imported here.
QUOTED_WORDS = ['a small blue square, and it says "square"', "红色圆形，写着“红色”"]
PROMPTS = [*QUOTED_WORDS, *(prompt for prompt, _ in held_out_character_prompts()[::45])]
TASKS = held_out_tasks()[::67]
REQUESTS = {"en": "a small red star", "zh": "左边的蓝色圆形"}
TOLERANCE = 1e-5
ABSOLUTE = re.compile(r'"(?:/|[A-Za-z]:\\\\)[^"/\\]+[/\\][^"]*"')


@pytest.fixture(scope="module")
def demo(pack_dir: Path) -> Path:
    return pack_dir / "demo" / "LongCat-Tiny"


@pytest.fixture(scope="module")
def made(pack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the training side made of the same texts, in a process of its own."""
    out = tmp_path_factory.mktemp("made")
    command = [sys.executable, "-m", "tests.demo_training", str(out)]
    result = subprocess.run(command, cwd=pack_dir, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def facts(made: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((made / "facts.json").read_text("utf-8"))
    return content


@pytest.fixture(scope="module")
def embeddings(made: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(made / "embeddings.safetensors")
    return tensors


@pytest.fixture(scope="module")
def backend(demo: Path) -> tuple[Any, Any, Any]:
    """Checkpoint, tokenizer and text encoder of the pack."""
    checkpoint = checkpoints.open_checkpoint(demo)
    tokenizer = text_encoder.load_tokenizer(checkpoint)
    return checkpoint, tokenizer, text_encoder.load_text_encoder(checkpoint, tokenizer, torch.float32)


@pytest.mark.parametrize("rows", ["prompt width", "instruction width"])
def test_the_longest_text_and_a_pad_fit_the_rows_of_training(rows: str, facts: dict[str, Any]) -> None:
    longest, width = facts[rows]
    assert 10 < longest < width


def test_training_shows_no_held_out_scene_and_nothing_that_the_lessons_teach(facts: dict[str, Any]) -> None:
    assert facts["taught"] == []
    looks, held_out = facts["looks"]
    assert looks > 10_000 and held_out == 0


def test_the_tokenizer_that_is_built_is_the_committed_one(demo: Path, facts: dict[str, Any]) -> None:
    for part in ("tokenizer", "text_processor"):
        stored = json.loads((demo / part / "tokenizer.json").read_text("utf-8"))["model"]
        assert facts["merges"] == stored["merges"]
        committed = AutoTokenizer.from_pretrained(demo / part, local_files_only=True)
        assert facts["vocabulary"] == committed.get_vocab()
        assert len(facts["ids"]) > 1000
        for text, ids in facts["ids"].items():
            assert list(prompts.token_ids(committed, text)) == ids, text


def test_prompts_with_a_quoted_character_get_the_embeddings_of_the_pack(embeddings: Any, backend: Any) -> None:
    _, tokenizer, encoder = backend
    for prompt, found in zip([*PROMPTS, ""], embeddings["prompts"], strict=True):
        tokens = prompts.tokenize(tokenizer, prompt)
        assert len(tokens.quoted) == (prompt != "")
        expected = encoder.encode(tokens.ids)[0]
        assert found.shape == expected.shape and expected.std() > 0.1
        assert (found - expected).abs().max() < TOLERANCE, prompt


def test_edit_instructions_get_the_embeddings_of_the_pack(embeddings: Any, backend: Any) -> None:
    checkpoint, tokenizer, encoder = backend
    tower = vision.load_vision(checkpoint, torch.float32)
    before, after = editing.split_template(tokenizer)
    for task, found in zip(TASKS, embeddings["instructions"], strict=True):
        seen = tower.encode(editing.resized(Image.fromarray(task.picture()), 64, 64))
        ids = prompts.tokenize(tokenizer, task.instruction).ids
        expected = editing.encode(encoder, ids, editing.EditInput(before, after, seen))[0]
        assert found.shape == expected.shape and expected.std() > 0.1
        assert (found - expected).abs().max() < TOLERANCE, task.instruction


@pytest.mark.parametrize("language", REQUESTS)
def test_requests_are_asked_and_answered_as_the_pack_does(language: str, facts: Any, backend: Any) -> None:
    checkpoint, tokenizer, encoder = backend
    ids = rewriting.input_ids(checkpoint, tokenizer, REQUESTS[language], language)
    assert facts["questions"][language] == ids
    config = encoder.model.config
    head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    head.weight.data = rewriting.load_head(checkpoint, config.vocab_size, config.hidden_size, torch.float32)
    rules, sampling = rewriting.generation(checkpoint, tokenizer), rewriting.Sampling(0, 0.0, 32)
    written, _ = rewriting.generate(encoder, head, ids, rules, sampling, torch.device("cpu"), lambda *_: None)
    assert facts["answers"][language] == tokenizer.decode(written)


def test_learning_to_rewrite_moves_the_head_and_holds_the_embeddings(facts: dict[str, Any]) -> None:
    lesson = facts["lesson"]
    before, after = lesson["layers"]
    assert after == before + 1
    assert lesson["error of added layers"] < 1e-12
    assert lesson["steps"] >= 1 and lesson["head moved"] > 1e-6
    assert 0 < lesson["error after"] < 0.1
    assert "done" in lesson["lines"] and "behind" in lesson["lines"][-1]


def texts(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*.json")):
        yield path, path.read_text("utf-8")


def test_no_path_of_a_machine_is_written_or_committed(made: Path, pack_dir: Path) -> None:
    """The saved pipeline was loaded from a folder, which its networks know."""
    assert len([*texts(made / "saved")]) == len([*texts(pack_dir / "demo" / "LongCat-Tiny")]) > 8
    for path, text in (*texts(made / "saved"), *texts(pack_dir / "demo")):
        assert "_name_or_path" not in text, path
        assert "/tmp" not in text, path
        assert not ABSOLUTE.search(text), (path, ABSOLUTE.search(text))
    assert ABSOLUTE.search('{"a": "/home/me/x"}') and ABSOLUTE.search(json.dumps({"a": "C:\\me\\x"}))


def test_what_is_saved_is_what_was_loaded(made: Path, demo: Path) -> None:
    for path in demo.rglob("*.safetensors"):
        saved, stored = load_file(made / "saved" / path.relative_to(demo)), load_file(path)
        assert saved.keys() == stored.keys()
        assert all(torch.equal(saved[name], stored[name]) for name in stored), path


def test_phases_are_read_from_their_text(facts: dict[str, Any]) -> None:
    def phase(steps: int, slots: int, batch: int, decay: bool, seconds: float) -> dict[str, Any]:
        return {"steps": steps, "slots": slots, "batch": batch, "decay": decay, "seconds": seconds}

    def stage(seconds: float, share: float, reach: float, hold: float, rate: float, decay: bool) -> dict[str, Any]:
        numbers = {"seconds": seconds, "share": share, "reach": reach, "hold": hold, "learning_rate": rate}
        return {**numbers, "decay": decay}

    assert facts["phases"] == {
        "7:64:256": phase(7, 64, 256, False, math.inf),
        "30000:512:128:decay": phase(30_000, 512, 128, True, math.inf),
        "9:64:8:decay:90s": phase(9, 64, 8, True, 90.0),
        "9:64:8:1.5s": phase(9, 64, 8, False, 1.5),
    }
    assert facts["stages"] == {
        "600:0:1e-3:20:2e-3": stage(600, 0, 1e-3, 20, 2e-3, False),
        "0.5:0.8:1:200:1e-3:decay": stage(0.5, 0.8, 1, 200, 1e-3, True),
    }
    assert facts["edit phases"] == {
        "160.5:64:192": {"seconds": 160.5, "slots": 64, "batch": 192, "decay": False},
        "190:512:96:decay": {"seconds": 190.0, "slots": 512, "batch": 96, "decay": True},
    }


def test_a_misspelt_phase_is_no_phase(facts: dict[str, Any]) -> None:
    for text, (phase, edit_phase) in facts["misspelt"].items():
        assert phase == f"expected steps:slots:batch[:decay][:SECONDSs], got {text!r}"
        assert edit_phase == f"expected seconds:slots:batch[:decay], got {text!r}"
    assert len(facts["misspelt"]) == 5
