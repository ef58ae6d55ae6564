"""A hundred prompts that alternate everything LongCatLoader can be set to, and what the server holds after each."""

import json
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

import checkpoints_broken
import psutil
import torch

from host import graphs
from longcat_pack.longcat_backend import flavours, precision
from longcat_pack.longcat_backend.comfy_bridge import devices
from longcat_pack.tools.host import ComfyServer

PROMPTS = 100
# Libraries compile, caches and memory pools fill while every combination is seen for the first time and again.
WARM_UP_ROUNDS = 2
# Known, together half of a per cent: ComfyUI's history of prompts, and two small objects that safetensors 0.8 leaves
# behind for every tensor that it reads.
ALLOWED = 1.02
# glibc then hands large blocks back as soon as they are free. By default it keeps them for later, and how much of that
# lies between blocks in use depends on the order in which threads come to run: 1 to 3 % of the server, up and down.
FREE_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}


class Sample(NamedTuple):
    """Bytes after one prompt: what the server process alone has in RAM, and everything on its device."""

    host: int
    device: int


def add_flavours(demo: Path, models: Path) -> list[str]:
    """Copy the demo checkpoint as each flavour into ComfyUI's models folder and give their names."""
    names = []
    for flavour in flavours.FLAVOURS.values():
        folder = checkpoints_broken.copy(demo, models / "longcat_image" / flavour.repo_id.split("/")[1])
        edit_json(folder / "model_index.json", _class_name=flavour.pipeline)
        if flavour.key == "edit-turbo":
            edit_json(folder / "scheduler" / "scheduler_config.json", base_shift=1.15, max_shift=1.15)
        names.append(folder.name)
    return names


def edit_json(path: Path, **values: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def combinations(graph: graphs.Graph, checkpoints: list[str], device: torch.device) -> list[graphs.Graph]:
    """The graph once for every engine and precision that the device can run, going round flavours and encoders."""
    policy = devices.policy(device)

    def runnable(names: tuple[str, ...]) -> list[str]:
        return [name for name in names if policy.supports(precision.PRESETS[name])]

    engines = [(engine, name) for engine, names in precision.ENGINE_PRESETS.items() for name in runnable(names)]
    rounds = zip(engines, cycle(checkpoints), cycle(runnable(precision.ENCODER_PRESETS)), strict=False)
    settings = [
        {"checkpoint": checkpoint, "engine": engine, "engine.precision": name, "text_encoder_precision": encoder}
        for (engine, name), checkpoint, encoder in rounds
    ]
    return [graphs.changed(graph, **{f"1.{key}": value for key, value in inputs.items()}) for inputs in settings]


def samples(server: ComfyServer, graphs_in_turn: list[graphs.Graph]) -> Iterator[Sample]:
    """Run the prompts one after the other, each with a seed of its own, and look at the server after each.

    The server has to be started with ``FREE_AT_ONCE``.
    """
    process = psutil.Process(server.pid)
    for seed, graph in enumerate(islice(cycle(graphs_in_turn), PROMPTS)):
        server.run(graphs.changed(graph, **{"5.seed": seed}))
        device = json.loads(server.get("/system_stats"))["devices"][0]
        yield Sample(own_bytes(process), device["vram_total"] - device["vram_free"])


def own_bytes(process: psutil.Process) -> int:
    """Resident memory of a process without the files that it has mapped: those the system drops and reads as it likes.

    Where the system does not count them apart, they are part of it.
    """
    memory = process.memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def growth(bytes_after: list[int], round_length: int) -> float:
    """What the last round holds, as a share of what the first round after the warm-up held."""
    warm = bytes_after[WARM_UP_ROUNDS * round_length :]
    return median(warm[-round_length:]) / median(warm[:round_length])
