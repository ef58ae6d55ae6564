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
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "memory.json"
RECIPES = ROOT / "benchmarks" / "full_size" / "recipes.json"
GIB = 2**30
SETTINGS = {"size": 1024, "steps": 8, "guidance": 4.5}
LIMIT_S = 120


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


class Worker:
    """The process of one recipe; every answer is waited for with a limit, and a death told with its last words."""

    def __init__(self, recipe: Mapping[str, Any]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the worker)
        command = [sys.executable, "-m", "benchmarks.full_size.worker", json.dumps(recipe)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self._timer = threading.Timer(LIMIT_S, self._process.kill)
        self._timer.start()

    def ask(self, line: str | None, answer: str) -> str:
        """Send a line and give the rest of the first line that begins with ``answer``."""
        if line is not None and self._process.stdin is not None:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        for said in self._process.stdout or ():
            if said.startswith(answer):
                return said.removeprefix(answer).strip()
        raise RuntimeError(self._last_words())

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = [line.strip()[:300] for line in self._log if line.strip()]
        return " | ".join([f"exit status {status}", *lines[-20:]])[-3000:]

    def close(self) -> None:
        """End the process."""
        self._timer.cancel()
        self._process.kill()
        self._process.communicate()
        self._log.close()


def measure(recipe: Mapping[str, Any], card: Card) -> Iterator[dict[str, Any]]:
    """Run a recipe on every card that it names, the smallest first, which is also the one that it is loaded on."""
    card.leave(recipe["caps"][0])
    worker = Worker(recipe)
    loading = None
    for cap in recipe["caps"]:
        began = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")
        row = {"name": recipe["name"], "cap_gib": cap, "began": began}
        try:
            loading = loading or worker.ask(None, "READY")
            card.leave(cap)
            yield {**row, "load_s": float(loading), **json.loads(worker.ask(json.dumps(cap), "RESULT"))}
            worker.ask(None, "FREED")
        except (RuntimeError, OSError) as error:
            yield {**row, "failed": str(error)}
            break
    worker.close()


def kept_rows(out: Path, recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ``out`` about other recipes.

    Raises:
        SystemExit: they were measured under other conditions.
    """
    found = json.loads(out.read_text(encoding="utf-8"))
    now = report([])
    if any(found[key] != now[key] for key in ("device", "versions", "settings")):
        raise SystemExit(f"{out} is of another device, other versions or settings: measure all recipes anew")
    names = {recipe["name"] for recipe in recipes}
    return [row for row in found["rows"] if row["name"] not in names]


def run_all(
    recipes: Sequence[Mapping[str, Any]], folder: Path, out: Path, deadline: float, rows: list[dict[str, Any]]
) -> None:
    """Measure every recipe, adding to ``rows`` and writing the table after each one."""
    card = Card()
    for recipe in recipes:
        if time.perf_counter() > deadline:
            print(f"no time left for {recipe['name']}", flush=True)
            continue
        for row in measure({**SETTINGS, **recipe, "folder": str(folder)}, card):
            rows.append(row)
            print(f"{time.perf_counter():.0f} {json.dumps(row)}", flush=True)
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
    parser.add_argument(
        "--folder", type=Path, help="a checkpoint that full_size/checkpoint.py wrote (default: a new one)"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--keep", action="store_true", help="keep the file's rows about other recipes")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no recipe after so many")
    options = parser.parse_args()
    deadline = time.perf_counter() + options.seconds
    recipes = [
        recipe
        for recipe in json.loads(options.recipes.read_text(encoding="utf-8"))
        if not options.only or recipe["name"] in options.only
    ]
    from benchmarks.full_size import checkpoint

    rows = kept_rows(options.out, recipes) if options.keep else []
    with tempfile.TemporaryDirectory() as root:
        folder = options.folder or Path(root) / "LongCat-Image"
        if not folder.exists():
            checkpoint.build(folder)
            torch.cuda.empty_cache()
        run_all(recipes, folder, options.out, deadline, rows)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
