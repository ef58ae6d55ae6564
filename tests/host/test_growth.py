"""Prompts that alternate flavours, engines and precisions leave nothing behind."""

from pathlib import Path
from typing import Any

import torch

from host import graphs, growth


def test_a_hundred_alternating_prompts_do_not_grow_the_server(
    make_server: Any, pack_dir: Path, tmp_path: Path, api_workflow: Any
) -> None:
    checkpoints = growth.add_flavours(pack_dir / "demo" / "LongCat-Tiny", tmp_path / "models")
    small = {"4.size.width": 64, "4.size.height": 64, "5.steps": 2}
    graph = graphs.changed(api_workflow("text_to_image"), **small)
    turns = growth.combinations(graph, checkpoints, torch.device("cpu"))
    server = make_server(base_dir=tmp_path, env=growth.FREE_AT_ONCE)
    seen = [sample.host for sample in growth.samples(server, turns)]
    assert growth.growth(seen, len(turns)) <= growth.ALLOWED, [f"{value / 2**20:.0f}" for value in seen]
    assert "memory leak" not in server.log_text()  # ComfyUI's word for a model that outlives its patcher
