"""One recipe in a process of its own: load, encode, sample, decode, twice; prints one line of JSON.

Started by benchmarks/memory.py with a JSON object as its only argument. It runs inside ComfyUI as main.py sets it up
for the recipe's flags, so its memory management is the real one.
"""

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

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._least_free = self._start = torch.cuda.mem_get_info()[0]
        self.anonymous = 0
        self.resident = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._least_free = min(self._least_free, self._torch.cuda.mem_get_info()[0])
            self._read_host()

    def _read_host(self) -> None:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        sizes = {key: int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem", "VmRSS") if key in fields}
        self.anonymous = max(self.anonymous, sizes["RssAnon"] + sizes.get("RssShmem", 0))
        self.resident = max(self.resident, sizes["VmRSS"])

    def close(self) -> dict[str, float]:
        """Gigabytes (2**30 bytes)."""
        self._stop.set()
        self._thread.join()
        cuda = self._torch.cuda
        return {
            "allocated_gib": round(cuda.max_memory_allocated() / GIB, 2),
            "reserved_gib": round(cuda.max_memory_reserved() / GIB, 2),
            "device_gib": round((self._start - self._least_free) / GIB, 2),
            "host_gib": round(self.anonymous / GIB, 2),
            "host_with_files_gib": round(self.resident / GIB, 2),
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


def main() -> None:
    """Run the recipe of the command line."""
    recipe = json.loads(sys.argv[1])
    start_comfy(recipe.get("flags", []))
    load_pack()
    torch = importlib.import_module("torch")
    torch.cuda.init()
    if recipe.get("cap_gib"):
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, recipe["cap_gib"] * GIB / total))
        importlib.import_module("comfy.model_management").total_vram = recipe["cap_gib"] * 1024
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module("benchmarks.full_size.workflows")
    peaks = Peaks(torch)
    with torch.inference_mode():
        loading, workflow = timed(lambda: module.KINDS[recipe["kind"]](recipe))
        seconds = [workflow(PROMPT, SEED) for _ in range(recipe.get("runs", 2))]
    first, last = seconds[0], seconds[-1]
    forwards = last.pop("forwards", 2 * recipe["steps"])  # the pipeline makes two a step
    result = {
        "load_s": round(loading, 2),
        **{f"{name}_s": round(value, 3) for name, value in last.items()},
        "forwards_per_step": forwards / recipe["steps"],
        "step_s": round(last["sample"] / recipe["steps"], 4),
        "first_step_s": round(first["sample"] / recipe["steps"], 4),
        **peaks.close(),
    }
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
