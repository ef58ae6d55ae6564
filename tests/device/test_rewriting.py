"""Under each of ComfyUI's memory flags the language model writes what it writes on the CPU, and encodes as before."""

from pathlib import Path
from typing import Any

import pytest
import torch
from device.test_flags import FLAGS

from host.graphs import Graph, changed, saved_latent
from longcat_pack.longcat_backend.comfy_bridge import host, loading, rewriting
from longcat_pack.longcat_backend.rewriting import Sampling
from longcat_pack.tools.host import ComfyServer

PROMPTS = ("red circle", "黄色背景上的蓝色方块")
TOKENS = 24


@pytest.fixture(scope="module")
def expected(comfy_dir: Path) -> list[str]:
    """The texts on the CPU, in fp32."""
    host.register_model_folder()
    clip = loading.load("LongCat-Tiny", "core", "fp32", "fp32")[1]
    return [rewriting.by_encoder(clip, prompt, "auto", Sampling(0, 0.0, TOKENS))[0] for prompt in PROMPTS]


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_the_text_is_that_of_the_cpu(flags: tuple[str, ...], server_with: Any, graph: Graph, expected: Any) -> None:
    server: ComfyServer = server_with(*flags)
    settings = {"source": "text encoder", "language": "auto", "seed": 0, "temperature": 0.0, "max_tokens": TOKENS}
    before = saved_latent(server, graph, "5")
    for prompt, text in zip(PROMPTS, expected, strict=True):
        writing = {"class_type": "LongCatPromptRewrite", "inputs": {"prompt": prompt, "clip": ["1", 1], **settings}}
        rewritten = changed({**graph, "r": writing}, **{"2.prompt": ["r", 0]})
        assert server.run(rewritten).outputs["r"]["text"] == [text]
    server.free()
    assert torch.equal(saved_latent(server, graph, "5"), before)
