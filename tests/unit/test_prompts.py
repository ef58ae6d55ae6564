"""Quote splitting loses nothing and is upstream's wherever upstream loses nothing (DESIGN.md trap 8)."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation

from longcat_pack.longcat_backend import prompts

ALPHABET = "ab' \"‘’“”「」红圆\n🐱\u0301tI" + "\0$#"
PIECES = ("don't", "it's", "I'm", "'", '"', "“", "”", "‘", "’", " ", "红", "“你好”", "'OK'", "x", "\n", "rock'n'roll")


def random_prompts(count: int) -> list[str]:
    rng = random.Random(2024)
    letters = ["".join(rng.choices(ALPHABET, k=rng.randrange(0, 24))) for _ in range(count)]
    words = ["".join(rng.choices(PIECES, k=rng.randrange(0, 10))) for _ in range(count)]
    return letters + words + unicode_prompts(count // 4)


def unicode_prompts(count: int) -> list[str]:
    """Any code points, halves of surrogate pairs included, with a quote or a contraction here and there."""
    rng = random.Random(2025)

    def piece() -> str:
        return rng.choice(PIECES) if rng.random() < 0.3 else chr(rng.randrange(0x110000))

    return ["".join(piece() for _ in range(rng.randrange(0, 24))) for _ in range(count)]


def test_parts_join_back_to_any_prompt() -> None:
    for prompt in random_prompts(2000):
        assert "".join(part for part, _ in prompts.split_quoted(prompt)) == prompt


def test_equal_to_upstream_where_upstream_is_lossless() -> None:
    compared = 0
    for prompt in random_prompts(2000):
        upstream = split_quotation(prompt)
        contractions = set(re.findall(r"[a-zA-Z]+'[a-zA-Z]+", prompt))  # two kinds: the result is a matter of luck
        if len(contractions) <= 1 and "".join(part for part, _ in upstream) == prompt:
            assert prompts.split_quoted(prompt) == upstream, repr(prompt)
            compared += 1
    assert compared > 3000


def test_two_contractions_survive() -> None:
    prompt = "it's a shop that doesn't sell 'tea'"
    assert prompts.split_quoted(prompt) == [("it's a shop that doesn't sell ", False), ("'tea'", True)]


@pytest.mark.parametrize(
    ("prompt", "quoted"),
    [
        ("写着“你好”的牌子", ["“你好”"]),
        ("'a' and \"b\" and ‘c’", ["'a'", '"b"', "‘c’"]),
        ("I don't know", []),
        ("“open only", []),
        ("", []),
    ],
)
def test_quoted_parts(prompt: str, quoted: list[str]) -> None:
    assert [part for part, is_quoted in prompts.split_quoted(prompt) if is_quoted] == quoted


def test_the_same_in_20_processes_with_other_hash_seeds(pack_dir: Path, tmp_path: Path) -> None:
    program = (
        "import hashlib, importlib.util as u, json, sys;"
        "spec = u.spec_from_file_location('prompts', sys.argv[1]); module = u.module_from_spec(spec);"
        "sys.modules['prompts'] = module; spec.loader.exec_module(module);"
        "split = [module.split_quoted(prompt) for prompt in json.load(open(sys.argv[2]))];"
        "print(hashlib.sha256(json.dumps(split).encode()).hexdigest())"
    )
    given = [*random_prompts(500), "it's don't I'm 'a' can't \"b\" won't"]
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(given), encoding="ascii")
    path = pack_dir / "longcat_backend" / "prompts.py"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, str(path), str(file)],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in range(20)
    }
    here = json.dumps([prompts.split_quoted(prompt) for prompt in given])
    assert outputs == {hashlib.sha256(here.encode()).hexdigest()}


def test_report_names_count_quotes_and_no_cut() -> None:
    report = prompts.PromptTokens(ids=(1, 2, 3), total=3, quoted=("'a'", "“红”"), cut="").report()
    assert "3 / 512" in report
    assert "'a'  “红”" in report
    assert "CUT" not in report


def test_notes_stand_before_what_was_cut() -> None:
    tokens = prompts.PromptTokens(ids=(1,) * 512, total=600, quoted=(), cut="the end")
    lines = tokens.report(["a note"]).splitlines()
    assert lines[2:] == ["a note", tokens.cut_report()]
    assert "88 tokens over the limit" in lines[3] and lines[3].endswith("the end")
