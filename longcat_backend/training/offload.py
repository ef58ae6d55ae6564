"""diffusers' group offload of a model that is trained: adapters stay on the device, and nothing stays there too long.

diffusers plans the order of a forward only. Recomputation in the backward pass runs through the blocks from the last
to the first, where the plan would fetch the wrong neighbour and leave it on the device.
"""

from collections.abc import Iterator
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
