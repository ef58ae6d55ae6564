"""Time and memory of whole pictures at full size, recipe by recipe and card by card: python run.py bench memory.

Needs a GPU, 30 GB of disk and as much host memory. Random weights of the published sizes; 1024x1024, guidance 4.5.
A smaller card is simulated by taking memory away until its size is left, so that everything that runs on it, the
driver's own use included, has to fit; torch's allocator gets the same limit. Writes benchmarks/results/memory.json.
"""

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "memory.json"
RECIPES = ROOT / "benchmarks" / "full_size" / "recipes.json"
GIB = 2**30
SETTINGS = {"size": 1024, "steps": 8, "guidance": 4.5}
LIMIT_S = 150


class Card:
    """Leaves a given amount of memory on the device to other processes."""

    def __init__(self) -> None:
        self._taken: torch.Tensor | None = None

    def leave(self, gib: float | None) -> None:
        """Take all but ``gib`` of 2**30 bytes; None gives everything back."""
        self._taken = None
        torch.cuda.empty_cache()
        if gib:
            surplus = torch.cuda.mem_get_info()[0] - int(gib * GIB)
            self._taken = torch.empty(max(0, surplus), dtype=torch.uint8, device="cuda")


def measure(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Run a recipe in a process of its own; its numbers, or how it failed."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.full_size.worker", json.dumps(recipe)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {LIMIT_S} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        lines = [line[:300] for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return {"failed": " | ".join([f"exit status {done.returncode}", *lines[-25:]])[-4000:]}
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return {**result, "process_s": round(time.perf_counter() - start, 1)}


def run_all(recipes: Sequence[Mapping[str, Any]], folder: Path, out: Path, deadline: float) -> None:
    """Measure every recipe under every card that it names, writing the table after each."""
    card = Card()
    rows: list[dict[str, Any]] = []
    for recipe in recipes:
        for cap in recipe["caps"]:
            if time.perf_counter() > deadline:
                rows.append({"name": recipe["name"], "cap_gib": cap, "failed": "no time left"})
                continue
            card.leave(cap)
            row = measure({**SETTINGS, **recipe, "cap_gib": cap, "folder": str(folder)})
            rows.append({"name": recipe["name"], "cap_gib": cap, **row})
            print(json.dumps(rows[-1]), flush=True)
            out.write_text(json.dumps(report(rows), indent=2) + "\n", encoding="utf-8")


def report(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is written: the conditions and the rows."""
    names = ("torch", "diffusers", "transformers", "optimum-quanto", "torchao", "comfy-kitchen", "comfy-aimdo")
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "settings": SETTINGS,
        "rows": list(rows),
    }


def main() -> None:
    """Build the checkpoint, measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="JSON list of recipes")
    parser.add_argument("--only", nargs="*", default=[], help="names of the recipes to run (default: all)")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no recipe after so many")
    options = parser.parse_args()
    deadline = time.perf_counter() + options.seconds
    recipes = [
        recipe
        for recipe in json.loads(options.recipes.read_text(encoding="utf-8"))
        if not options.only or recipe["name"] in options.only
    ]
    from benchmarks.full_size import checkpoint

    with tempfile.TemporaryDirectory() as root:
        start = time.perf_counter()
        folder = Path(root) / "LongCat-Image"
        checkpoint.build(folder)
        torch.cuda.empty_cache()
        print(f"random checkpoint written in {time.perf_counter() - start:.0f} s", flush=True)
        run_all(recipes, folder, options.out, deadline)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
