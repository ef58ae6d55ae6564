"""Teach LongCat-Tiny the zorb: run.py bench teach_zorb.

Through a real server, on a CPU, beside bases of several precisions. Writes benchmarks/results/teach_zorb.json: for each
lesson how many of the held-out prompts are drawn right with and without the LoRA, how many of the concepts that the
model knew, and how long the training took, from the queue to the LoRA, by the clock and of the processor. The gates:
unseen at most 5 %, learnt at least 80 %, old concepts within 3 points, trained in 5 minutes; the exit code is 1 when
one does not hold.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from _tiny import ROOT, circumstances, load_pack

RESULT = ROOT / "benchmarks" / "results" / "teach_zorb.json"
OLD_EVERY = 4  # of the 200 prompts that the demo model has learnt


def lesson(comfy: Path, base_precision: str) -> dict[str, Any]:
    """The rates after one training, and its seconds."""
    from host import teaching
    from longcat_pack.tools.host import ComfyServer

    settings = {"base_precision": base_precision}
    with (
        tempfile.TemporaryDirectory() as folder,
        ComfyServer(comfy, Path(folder), ROOT, args=["--cpu"]) as server,
    ):
        process = psutil.Process(server.pid)
        began, worked = time.monotonic(), sum(process.cpu_times()[:2])
        server.run(teaching.training(**settings), timeout=3600)
        took, worked = time.monotonic() - began, sum(process.cpu_times()[:2]) - worked
        # ComfyUI keeps what the training node gave, so this only draws.
        result = server.run(teaching.graph(OLD_EVERY, **settings), timeout=3600)
        rates = teaching.rates(server, result, OLD_EVERY)
        report = result.outputs["report"]["text"][0].splitlines()
    rounded = {key: {name: round(share, 3) for name, share in found.items()} for key, found in rates.items()}
    seconds = {"training_seconds": round(took, 1), "training_cpu_seconds": round(worked, 1)}
    return {"rates": rounded, **seconds, "report": report[1:3]}


def failed_gates(lessons: dict[str, Any]) -> list[str]:
    """Sentences about what was not learnt, or forgotten, or took too long."""
    failed = []
    for name, found in lessons.items():
        shares = {key: rates["all"] for key, rates in found["rates"].items()}
        kept = shares["old"] >= shares["old-before"] - 0.03
        if not (shares["unseen"] <= 0.05 and shares["zorbs"] >= 0.8 and kept and found["training_seconds"] <= 300):
            failed.append(f"{name}: {shares}, {found['training_seconds']} s")
    return failed


def main() -> int:
    """Teach beside every precision, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8-quanto"])
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    load_pack("cpu")
    from host import teaching

    comfy = Path(os.environ["COMFYUI_PATH"])
    found = {name: lesson(comfy, name) for name in arguments.precisions}
    failed = failed_gates(found)
    kept = len(teaching.RECIPE["preservation_prompts"].splitlines())
    settings = {
        **teaching.RECIPE,
        "preservation_prompts": f"{kept} captions of what was known",
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "cores": os.cpu_count(),
    }
    result = {**circumstances("cpu"), "settings": settings, "lessons": found, "failed_gates": failed}
    arguments.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2, ensure_ascii=False))
    print("\n".join(failed) or "every gate holds")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
