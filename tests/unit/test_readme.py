"""The two READMEs say the same, their links lead somewhere, and their map shows the house as it is."""

import json
import re
from pathlib import Path

import pytest

NAMES = ("README.md", "README.zh.md")
MAP_LINE = re.compile(r"^( *)([\w/]+(?:\.py|/))  +\S")


@pytest.fixture(params=NAMES)
def text(request: pytest.FixtureRequest, pack_dir: Path) -> str:
    """Each README in turn."""
    return (pack_dir / request.param).read_text(encoding="utf-8")


def backend_on_the_map(text: str) -> set[str]:
    """The modules of longcat_backend that the map names, as paths."""
    folders: list[str] = []
    found = set()
    for line in text.splitlines():
        match = MAP_LINE.match(line)
        if match is None:
            continue
        depth, name = len(match[1]) // 2, match[2]
        del folders[depth:]
        if name.endswith("/"):
            folders.append(name)
        elif folders:
            found.add("".join(folders) + name)
    return {path for path in found if path.startswith("longcat_backend/")}


def skeleton(text: str) -> dict[str, list[object]]:
    """What does not depend on the language: headings' levels, tables' shapes, commands, links to elsewhere."""
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    return {
        "headings": re.findall(r"^#+(?= )", text, re.MULTILINE),
        "rows": [line.count("|") for line in text.splitlines() if line.startswith("|")],
        "commands": [block for block in blocks if "longcat_backend/" not in block],
        "links": sorted(set(re.findall(r"\]\((https?://[^)]+|[\w./]+\.json)\)", text))),
        "numbers": sorted(re.findall(r"\b(?:\d+e-\d+|\d+\.\d+)\b", text)),
    }


def test_the_map_shows_every_module_of_the_library(text: str, pack_dir: Path) -> None:
    there = {path.relative_to(pack_dir).as_posix() for path in (pack_dir / "longcat_backend").rglob("*.py")}
    assert backend_on_the_map(text) == {path for path in there if not path.endswith("__init__.py")}


def test_links_lead_somewhere(text: str, pack_dir: Path) -> None:
    targets = re.findall(r"\]\(([^)]+)\)", text)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("https://"):
            assert (pack_dir / target).exists(), target


CARD = re.compile(r"^\| (\d+) GB \|.*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)


def test_the_cards_figures_are_measured_ones(text: str, pack_dir: Path) -> None:
    """Each row of the table of cards is a row of one committed run, rounded."""
    result = json.loads((pack_dir / "benchmarks" / "results" / "memory.json").read_text(encoding="utf-8"))
    measured = {
        (row["cap_gib"], f"{row['step_s']:.3f}", f"{row['device_gib']:.1f}", f"{row['host_gib']:.1f}")
        for row in result["rows"]
        if "failed" not in row
    }
    cards = CARD.findall(text)
    assert len(cards) >= 8
    assert all((int(card), *figures) in measured for card, *figures in cards), measured


def test_both_languages_have_the_same_content(pack_dir: Path) -> None:
    english, chinese = (skeleton((pack_dir / name).read_text(encoding="utf-8")) for name in NAMES)
    assert english == chinese
