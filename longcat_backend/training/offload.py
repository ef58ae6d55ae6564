"""diffusers' group offload of a model that is trained: adapters stay on the device, and nothing stays there too long.

diffusers plans the order of a forward only. Recomputation in the backward pass runs through the blocks from the last
to the first, where the plan would fetch the wrong neighbour and leave it on the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..memory import GroupOffload

_HOOK = "group_offloading"


def apply_offload(transformer: nn.Module, offload: GroupOffload, device: torch.device, folder: Path) -> None:
    """Hook a transformer that has adapters, on the CPU; all but the weights of frozen layers end on the device.

    Raises:
        LongCatError: see :meth:`memory.GroupOffload.apply`.
    """
    offload.apply(transformer, device, folder)
    moved = _movable(transformer)
    for group in groups(transformer):
        _leave(group, moved)
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        if tensor not in moved:
            tensor.data = tensor.data.to(device)


def _movable(transformer: nn.Module) -> set[nn.Parameter]:
    """Weights that may leave the device between a block's forward and its backward pass: those of frozen linear layers.

    Of these autograd keeps the copy that was multiplied with. Of others, such as norms, it keeps the parameter itself,
    which would be on the wrong device by then; they are small.
    """
    own = {part for layer in transformer.modules() if isinstance(layer, LoraLayer) for part in _adapters(layer)}
    linears = (layer for layer in transformer.modules() if isinstance(layer, nn.Linear))
    return {layer.weight for layer in linears if layer.weight not in own}


def _adapters(layer: LoraLayer) -> Iterator[nn.Parameter]:
    for parts in (layer.lora_A, layer.lora_B):
        yield from parts.parameters()


def groups(transformer: nn.Module) -> Iterator[Any]:
    """The groups of weights that are moved together."""
    for module in transformer.modules():
        hook = _hook(module)
        if hook is not None:
            yield hook.group


@contextmanager
def recomputing(transformer: Any, block: nn.Module) -> Iterator[None]:
    """While a block is computed again for its gradients, fetch the block before it and not the one after it.

    A group of several blocks comes with the last of them and leaves with the first.
    """
    own = [hook for hook in map(_hook, block.modules()) if hook is not None]
    inside = [hook.group for hook in own]
    leaving = [hook for hook in own if hook.next_group is not None and hook.next_group not in inside]
    planned = [hook.next_group for hook in leaving]
    before = _before(transformer, block)
    for hook in leaving:
        hook.next_group = before
    hook = _hook(block)
    try:
        with nullcontext() if hook is None else _held(hook.group, block):
            yield
    finally:
        for hook, group in zip(leaving, planned, strict=True):
            hook.next_group = group


@contextmanager
def _held(group: Any, block: nn.Module) -> Iterator[None]:
    if group.onload_leader is not block and any(part.device == group.offload_device for part in group.parameters):
        group.onload_()
    leader, group.offload_leader = group.offload_leader, None
    try:
        yield
    finally:
        group.offload_leader = leader
    if group.onload_leader is block:
        group.offload_()


def _before(transformer: Any, block: nn.Module) -> Any:
    """The group of the block before one, at block level; leaves have none for a whole block."""
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    place = blocks.index(block)
    hook = _hook(blocks[place - 1]) if place else None
    return None if hook is None else hook.group


def _hook(module: nn.Module) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(_HOOK)


def _leave(group: Any, moved: set[nn.Parameter]) -> None:
    """Make a group list what it moves one by one, and leave everything else where it is."""
    found: dict[nn.Parameter, None] = dict.fromkeys(group.parameters)
    for module in group.modules:
        found.update(dict.fromkeys(module.parameters()))
    group.parameters = [parameter for parameter in found if parameter in moved]
    group.modules, group.buffers = [], []
    for tensor in list(group.cpu_param_dict):
        if tensor not in moved:
            del group.cpu_param_dict[tensor]
