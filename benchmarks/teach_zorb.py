"""Teach LongCat-Tiny the zorb through a real server, beside bases of several precisions: run.py bench teach_zorb.

Writes benchmarks/results/teach_zorb.json: for each base precision how many of the held-out prompts are drawn right with
and without the LoRA, how many of the concepts that the model knew, and how long it took. On a CPU. The gates: unseen at
most 5 %, learnt at least 80 %, old concepts within 3 points; the exit code is 1 when one does not hold.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _tiny import ROOT, circumstances, load_pack

RESULT = ROOT / "benchmarks" / "results" / "teach_zorb.json"
OLD_EVERY = 4  # of the 200 prompts that the demo model has learnt


def lesson(comfy: Path, base_precision: str) -> dict[str, Any]:
    """The rates after one training, and the seconds from the queue to the last picture."""
    from host import teaching
    from longcat_pack.tools.host import ComfyServer

    with (
        tempfile.TemporaryDirectory() as folder,
        ComfyServer(comfy, Path(folder), ROOT, args=["--cpu"]) as server,
    ):
        began = time.monotonic()
        result = server.run(teaching.graph(OLD_EVERY, base_precision=base_precision), timeout=3600)
        took = time.monotonic() - began
        rates = teaching.rates(server, result, OLD_EVERY)
        report = result.outputs["report"]["text"][0].splitlines()
    rounded = {key: {name: round(share, 3) for name, share in found.items()} for key, found in rates.items()}
    return {"rates": rounded, "seconds": round(took, 1), "report": report[1]}


def failed_gates(lessons: dict[str, Any]) -> list[str]:
    """Sentences about what was not learnt, or forgotten."""
    failed = []
    for name, lesson in lessons.items():
        shares = {key: found["all"] for key, found in lesson["rates"].items()}
        kept = shares["old"] >= shares["old-before"] - 0.03
        if not (shares["unseen"] <= 0.05 and shares["zorbs"] >= 0.8 and kept):
            failed.append(f"{name}: {shares}")
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
    settings = {**teaching.RECIPE, "threads": os.environ.get("OMP_NUM_THREADS", "all"), "cores": os.cpu_count()}
    result = {**circumstances("cpu"), "settings": settings, "lessons": found, "failed_gates": failed}
    arguments.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2, ensure_ascii=False))
    print("\n".join(failed) or "every gate holds")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
