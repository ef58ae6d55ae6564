"""What the tests of bad input share: the good prompt, and what a good refusal looks like."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import NodeFailed, PromptRejected, Result

Graph = dict[str, dict[str, Any]]
GOOD: Graph = json.loads(
    (Path(__file__).resolve().parent.parent / "api" / "text_to_image.json").read_text(encoding="utf-8")
)
REMEDY = re.compile(r"\b(download|choose|set|use|put|connect|update|encode|make it)\b", re.IGNORECASE)
CHINESE = re.compile("[\u4e00-\u9fff]")
_seeds = itertools.count(1)


def prompt(checkpoint: str = "LongCat-Tiny", **inputs: Any) -> Graph:
    """The good prompt, small, with one step and a seed of its own; ``inputs`` as ``{"5.steps": 0}``."""
    graph = deepcopy(GOOD)
    graph["1"]["inputs"]["checkpoint"] = checkpoint
    graph["4"]["inputs"].update({"size.width": 64, "size.height": 64})
    graph["5"]["inputs"].update(steps=1, guidance=1.0, seed=next(_seeds))
    for place, value in inputs.items():
        node, name = place.split(".", 1)
        graph[node]["inputs"][name] = value
    return graph


def rejected(server: ComfyServer, graph: Graph, node: str, words: Sequence[str]) -> str:
    """The node's sentence when validation refuses a prompt; checks that the server still draws."""
    with pytest.raises(PromptRejected) as caught:
        server.queue(graph)
    errors = caught.value.node_errors[node]["errors"]
    sentence = "\n".join(error["details"] for error in errors)
    assert {error["type"] for error in errors} == {"custom_validation_failed"}, errors
    check_sentence(sentence, words)
    check_alive(server)
    return sentence


def failed(server: ComfyServer, graph: Graph, node: str, words: Sequence[str]) -> str:
    """The node's sentence when a prompt fails while it runs; checks that the server still draws."""
    with pytest.raises(NodeFailed) as caught:
        server.run(graph)
    assert caught.value.node_id == node
    assert caught.value.exception_type.endswith("LongCatError"), caught.value.traceback
    check_sentence(caught.value.exception_message, words)
    check_alive(server)
    return caught.value.exception_message


def check_sentence(sentence: str, words: Sequence[str]) -> None:
    """It holds the words, says what to do, and says it in both languages."""
    for word in words:
        assert word in sentence, f"{word!r} is not in: {sentence}"
    assert REMEDY.search(sentence), sentence
    assert len(CHINESE.findall(sentence)) >= 8, sentence


def check_alive(server: ComfyServer) -> None:
    """A prompt with a new seed draws a picture."""
    result = server.run(prompt())
    assert "5" in result.executed_nodes
    assert pixels(server, result).shape == (64, 64, 3)


def pixels(server: ComfyServer, result: Result) -> np.ndarray:
    """The first picture of a run, (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(server.view(result.images[0]))).convert("RGB"))
