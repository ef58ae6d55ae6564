"""Quote splitting loses nothing and is upstream's wherever upstream loses nothing (DESIGN.md trap 8)."""

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
    return letters + words


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


def test_the_same_in_processes_with_other_hash_seeds(pack_dir: Path) -> None:
    program = (
        "import importlib.util as u, sys;"
        "spec = u.spec_from_file_location('prompts', sys.argv[1]); module = u.module_from_spec(spec);"
        "sys.modules['prompts'] = module; spec.loader.exec_module(module);"
        "print(module.split_quoted(\"it's don't I'm 'a' can't \\\"b\\\" won't\"))"
    )
    path = pack_dir / "longcat_backend" / "prompts.py"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, str(path)],
            env={"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(5)
    }
    assert len(outputs) == 1


def test_report_names_count_quotes_and_no_cut() -> None:
    report = prompts.PromptTokens(ids=(1, 2, 3), total=3, quoted=("'a'", "“红”"), cut="").report()
    assert "3 / 512" in report
    assert "'a'  “红”" in report
    assert "CUT" not in report
