"""Prompts that alternate flavours, engines and precisions leave nothing behind, in RAM and on the device."""

from pathlib import Path
from typing import Any

import torch

from host import growth
from host.graphs import Graph, changed


def test_a_hundred_alternating_prompts_do_not_grow_the_server(
    make_server: Any, pack_dir: Path, tmp_path: Path, graph: Graph, device: torch.device
) -> None:
    checkpoints = growth.add_flavours(pack_dir / "demo" / "LongCat-Tiny", tmp_path / "models")
    small = changed(graph, **{"4.size.width": 64, "4.size.height": 64, "5.steps": 2})
    turns = growth.combinations(small, checkpoints, device)
    before = used_bytes(device)
    server = make_server(base_dir=tmp_path, env=growth.FREE_AT_ONCE)
    seen = list(growth.samples(server, turns))
    check([sample.host for sample in seen], len(turns))
    if device.type == "cuda":  # a CPU's free memory is everybody's
        check([sample.device - before for sample in seen], len(turns))
    assert "memory leak" not in server.log_text()


def used_bytes(device: torch.device) -> int:
    """What everybody uses of a CUDA device."""
    if device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def check(held: list[int], round_length: int) -> None:
    assert growth.growth(held, round_length) <= growth.ALLOWED, [f"{value / 2**20:.0f}" for value in held]
