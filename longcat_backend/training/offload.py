"""diffusers' group offload of a model that is trained: adapters stay on the device, and nothing stays there too long.

diffusers plans the order of a forward only. Recomputation in the backward pass runs through the blocks from the last
to the first, where the plan would fetch the wrong neighbour and leave it on the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..memory import GroupOffload

_HOOK = "group_offloading"


def apply_offload(transformer: nn.Module, offload: GroupOffload, device: torch.device, folder: Path) -> None:
    """Hook a transformer that has adapters; its weights are on the CPU, the adapters end on the device.

    Raises:
        LongCatError: see :meth:`memory.GroupOffload.apply`.
    """
    offload.apply(transformer, device, folder)
    adapters = {
        parameter
        for layer in transformer.modules()
        if isinstance(layer, LoraLayer)
        for parts in (layer.lora_A, layer.lora_B)
        for parameter in parts.parameters()
    }
    for group in groups(transformer):
        _keep_out(group, adapters)
    for parameter in adapters:
        parameter.data = parameter.data.to(device)


def groups(transformer: nn.Module) -> Iterator[Any]:
    """The groups of weights that are moved together."""
    for module in transformer.modules():
        hook = _hook(module)
        if hook is not None:
            yield hook.group


@contextmanager
def recomputing(transformer: Any, block: nn.Module) -> Iterator[None]:
    """While a block is computed again for its gradients, fetch the block before it and not the one after it."""
    own = [hook for hook in map(_hook, block.modules()) if hook is not None]
    inside = [hook.group for hook in own]
    leaving = [hook for hook in own if hook.next_group is not None and hook.next_group not in inside]
    planned = [hook.next_group for hook in leaving]
    before = _before(transformer, block)
    for hook in leaving:
        hook.next_group = before
    try:
        yield
    finally:
        for hook, group in zip(leaving, planned, strict=True):
            hook.next_group = group


def _before(transformer: Any, block: nn.Module) -> Any:
    """The group of the block before one, at block level; leaves have none for a whole block."""
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    place = blocks.index(block)
    hook = _hook(blocks[place - 1]) if place else None
    return None if hook is None else hook.group


def _hook(module: nn.Module) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(_HOOK)


def _keep_out(group: Any, adapters: set[nn.Parameter]) -> None:
    """Make a group list what it moves one by one, without the adapters."""
    found: dict[torch.Tensor, None] = dict.fromkeys(group.parameters)
    for module in group.modules:
        found.update(dict.fromkeys(module.parameters()))
    buffers: dict[torch.Tensor, None] = dict.fromkeys(group.buffers)
    for module in group.modules:
        buffers.update(dict.fromkeys(module.buffers()))
    group.modules = []
    group.parameters = [parameter for parameter in found if parameter not in adapters]
    group.buffers = list(buffers)
    for parameter in adapters:
        group.cpu_param_dict.pop(parameter, None)
