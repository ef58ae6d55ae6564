"""Teach LongCat-Tiny the zorb, and LongCat-Tiny-Edit to turn shapes into zorbs: run.py bench teach_zorb.

Through a real server, on a CPU, beside bases of several precisions. Writes benchmarks/results/teach_zorb.json: for each
lesson how many of the held-out prompts are drawn right with and without the LoRA, how many of the concepts that the
model knew, and how long each phase of it took, by the clock and of the processor, and on how many threads.
The gates: unseen at most 5 %, learnt at least 80 %, old concepts within 3 points, trained in 5 minutes from the queue
to the LoRA; the exit code is 1 when one does not hold.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from _tiny import ROOT, circumstances, load_pack

RESULT = ROOT / "benchmarks" / "results" / "teach_zorb.json"
OLD_EVERY = 4  # of the 200 prompts, or instructions, that the demo model has learnt
EDIT = "edit-"
LESSONS = ("fp32", "int8-quanto", f"{EDIT}fp32", f"{EDIT}int8-quanto")
# What LongCatTrainLora says while it works, and the phase that it is in from then on.
PHASES = (
    (re.compile("encoding"), "encoding"),
    (re.compile("drawing what is to be preserved"), "preservation"),
    (re.compile(r"\d+/\d+ · loss"), "steps"),
    (re.compile(r"\d+/\d+ · with"), "validation"),
)


class Stopwatch:
    """Seconds of the clock and of a process, by phase."""

    def __init__(self, process: psutil.Process, phase: str) -> None:
        self.process = process
        self.phase = phase
        self.seconds: dict[str, dict[str, float]] = {}
        self._last = self._now()

    def __call__(self, event: Any) -> None:
        """Look at an event of the server for the phase that it tells of."""
        text = event.data["text"] if event.type == "progress_text" else ""
        self.turn(next((phase for pattern, phase in PHASES if pattern.match(text)), self.phase))

    def turn(self, phase: str) -> None:
        """Book what went by since the last call for the phase until now."""
        now = self._now()
        spent = self.seconds.setdefault(self.phase, {"clock": 0.0, "cpu": 0.0})
        for key, value in now.items():
            spent[key] += value - self._last[key]
        self.phase, self._last = phase, now

    def total(self) -> dict[str, float]:
        """Of all phases so far."""
        return {key: sum(spent[key] for spent in self.seconds.values()) for key in self._last}

    def _now(self) -> dict[str, float]:
        return {"clock": time.monotonic(), "cpu": sum(self.process.cpu_times()[:2])}


def lesson(comfy: Path, name: str) -> dict[str, Any]:
    """The rates after one training, and its seconds.

    Args:
        name: one of LESSONS.
    """
    from host import teaching, teaching_edits
    from longcat_pack.tools.host import ComfyServer

    edits = name.startswith(EDIT)
    taught: Any = teaching_edits if edits else teaching
    settings = {"base_precision": name.removeprefix(EDIT)}
    with (
        tempfile.TemporaryDirectory() as folder,
        ComfyServer(comfy, Path(folder), ROOT, args=["--cpu"]) as server,
    ):
        watch = Stopwatch(psutil.Process(server.pid), "loading")
        server.run(taught.training(**settings), on_event=watch, timeout=3600)
        watch.turn("judging")
        training = watch.total()
        if edits:
            teaching_edits.install(server, OLD_EVERY)
        # ComfyUI keeps what the training node gave, so this only draws.
        result = server.run(taught.graph(OLD_EVERY, **settings), timeout=3600)
        watch.turn("done")
        rates = taught.rates(server, result, OLD_EVERY)
        report = result.outputs["report"]["text"][0].splitlines()
    seconds = {"training": training, **watch.seconds}
    return {
        "rates": {key: {part: round(share, 3) for part, share in found.items()} for key, found in rates.items()},
        "seconds": {phase: {key: round(value, 1) for key, value in spent.items()} for phase, spent in seconds.items()},
        "report": report[1:3],
        "machine": {"threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1), "cores": os.cpu_count()},
    }


def failed_gates(lessons: dict[str, Any]) -> list[str]:
    """Sentences about what was not learnt, or forgotten, or took too long."""
    failed = []
    for name, found in lessons.items():
        shares = {key: rates["all"] for key, rates in found["rates"].items()}
        took = found["seconds"]["training"]["clock"]
        kept = shares["old"] >= shares["old-before"] - 0.03
        if not (shares["unseen"] <= 0.05 and shares["zorbs"] >= 0.8 and kept and took <= 300):
            failed.append(f"{name}: {shares}, {took} s")
    return failed


def told(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the text of its many prompts."""
    count = len(recipe["preservation_prompts"].splitlines())
    return {**recipe, "preservation_prompts": f"{count} prompts of what was known"}


def main() -> int:
    """Teach all lessons that are asked for, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lessons", nargs="+", choices=LESSONS, default=LESSONS)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    load_pack("cpu")
    from host import teaching, teaching_edits

    comfy = Path(os.environ["COMFYUI_PATH"])
    found = {name: lesson(comfy, name) for name in arguments.lessons}
    failed = failed_gates(found)
    settings = {"zorb": told(teaching.RECIPE), "edit": told(teaching_edits.RECIPE)}
    result = {**circumstances("cpu"), "settings": settings, "lessons": found, "failed_gates": failed}
    arguments.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2, ensure_ascii=False))
    print("\n".join(failed) or "every gate holds")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
