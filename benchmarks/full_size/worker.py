"""One recipe in a process of its own: loads, then encodes, samples and decodes for each card that it is told.

Started by benchmarks/memory.py with the recipe as JSON for its only argument. It says READY when all is loaded; then
each line on its input is the size of a card, and each answer a line of JSON. It runs inside ComfyUI as main.py sets
it up for the recipe's flags, so its memory management is the real one.
"""

import gc
import importlib
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red circle on a blue background"
GIB = 2**30
SEED = 42


class Peaks:
    """The most memory in use at any time, asked every 5 ms: on the device by all means, and by this process."""

    def __init__(self, torch: Any, in_use: int) -> None:
        self._cuda = torch.cuda
        self._cuda.reset_peak_memory_stats()
        self._free_of_us = self._cuda.mem_get_info()[0] + in_use
        self._least_free = self._free_of_us
        self._anonymous = self._resident = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._least_free = min(self._least_free, self._cuda.mem_get_info()[0])
            self._read_host()

    def _read_host(self) -> None:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        sizes = {key: int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem", "VmRSS") if key in fields}
        self._anonymous = max(self._anonymous, sizes["RssAnon"] + sizes.get("RssShmem", 0))
        self._resident = max(self._resident, sizes["VmRSS"])

    def close(self) -> dict[str, float]:
        """Gigabytes (2**30 bytes): of torch's allocator, of the whole process on the device, and in host memory."""
        self._stop.set()
        self._thread.join()
        return {
            "allocated_gib": round(self._cuda.max_memory_allocated() / GIB, 2),
            "reserved_gib": round(self._cuda.max_memory_reserved() / GIB, 2),
            "device_gib": round((self._free_of_us - self._least_free) / GIB, 2),
            "host_gib": round(self._anonymous / GIB, 2),
            "host_with_files_gib": round(self._resident / GIB, 2),
        }


def start_comfy(flags: list[str]) -> None:
    """ComfyUI as `main.py FLAGS` prepares it, without the server."""
    comfy = os.environ["COMFYUI_PATH"]
    sys.path.insert(0, comfy)
    sys.argv = [str(Path(comfy) / "main.py"), *flags]
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("main")


def load_pack() -> None:
    """This repository as the package longcat_pack."""
    spec = importlib.util.spec_from_file_location(
        "longcat_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["longcat_pack"] = module
    spec.loader.exec_module(module)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a run with the device's work finished, and its result."""
    torch = importlib.import_module("torch")
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


def set_card(torch: Any, gib: float | None) -> None:
    """Give torch's allocator, and ComfyUI's idea of the card, the size that is left on the device."""
    total = torch.cuda.mem_get_info()[1]
    size = total if gib is None else gib * GIB
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))
    importlib.import_module("comfy.model_management").total_vram = size / 2**20


def run(workflow: Any, recipe: dict[str, Any], in_use: int) -> dict[str, Any]:
    """The numbers of a recipe on the card that is set: those of the last run, and peaks over all of them."""
    torch = importlib.import_module("torch")
    peaks = Peaks(torch, in_use)
    try:
        runs = [workflow(PROMPT, SEED) for _ in range(recipe.get("runs", 2))]
    except Exception as error:  # its words are the result
        peaks.close()
        return {"failed": f"{type(error).__name__}: {error}"[:600]}
    steps = recipe["steps"]
    forwards = runs[-1].pop("forwards", 2 * steps)  # the pipeline makes two a step
    return {
        **{f"{name}_s": round(value, 3) for name, value in runs[-1].items()},
        "step_s": round(runs[-1]["sample"] / steps, 4),
        "first_step_s": round(runs[0]["sample"] / steps, 4),
        "forwards_per_step": forwards / steps,
        **peaks.close(),
    }


def main() -> None:
    """Load the recipe of the command line and run it on each card of the input."""
    recipe = json.loads(sys.argv[1])
    start_comfy(recipe.get("flags", []))
    load_pack()
    torch = importlib.import_module("torch")
    management = importlib.import_module("comfy.model_management")
    before = torch.cuda.mem_get_info()[0]
    torch.zeros(1, device="cuda")
    context = before - torch.cuda.mem_get_info()[0]  # what the driver takes for this process
    set_card(torch, recipe["caps"][0])
    sys.path.insert(0, str(ROOT))
    workflows = importlib.import_module("benchmarks.full_size.workflows")
    with torch.inference_mode():
        loading, workflow = timed(lambda: workflows.KINDS[recipe["kind"]](recipe))
        print(f"READY {loading:.2f}", flush=True)
        for line in sys.stdin:
            set_card(torch, json.loads(line))
            print("RESULT " + json.dumps(run(workflow, recipe, context)), flush=True)
            management.unload_all_models()
            gc.collect()
            management.soft_empty_cache()
            print("FREED", flush=True)


if __name__ == "__main__":
    main()
