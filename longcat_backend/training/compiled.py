"""Compiled blocks for training, which recompute by themselves as much as they may not keep.

torch's checkpoint around a compiled block would compute all of it again, the last product included, of which nothing
is needed. So the compiler itself divides a block into a forward that keeps little and a backward that recomputes.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._dynamo import lookup_backend
from torch._functorch import config as functorch_config

Results = tuple[torch.Tensor, torch.Tensor]


def _double(block: nn.Module, *inputs: Any) -> Results:
    found: Results = block(*inputs)
    return found


def _single(block: nn.Module, *inputs: Any) -> Results:
    # Both are parts of one tensor, which torch cannot compile beside quantised weights.
    text, image = block(*inputs)
    return text.clone(memory_format=torch.contiguous_format), image.clone(memory_format=torch.contiguous_format)


class CompiledBlocks:
    """Calls a block as compiled code, one for each kind of block.

    Args:
        transformer: whose single blocks are told from the double ones.
        budget: the part of what a block would keep for the backward pass that it may keep, 0..1; 0 is its inputs.
        backend: of ``torch.compile``.
    """

    def __init__(self, transformer: Any, budget: float, backend: str) -> None:
        self._single = set(transformer.single_transformer_blocks)
        compiler = _with_budget(lookup_backend(backend), budget)
        self._calls = [torch.compile(_fresh(call), backend=compiler, fullgraph=True) for call in (_double, _single)]

    def __call__(self, block: nn.Module, *inputs: Any) -> Results:
        found: Results = self._calls[block in self._single](block, *inputs)
        return found


def _with_budget(compiler: Callable[..., Any], budget: float) -> Callable[..., Any]:
    """The compiler, for which a setting of the whole process is changed only while it runs."""

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        with functorch_config.patch(activation_memory_budget=budget):
            return compiler(graph, inputs)

    return compile_graph


def _fresh(call: Callable[..., Results]) -> FunctionType:
    """The same function, unknown to torch: for one code object it compiles a few times only, earlier runs included."""
    assert isinstance(call, FunctionType)
    return FunctionType(call.__code__.replace(), call.__globals__)
