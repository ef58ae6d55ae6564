"""Rotary tables made on the host: exact in float64 on every device, once per set of positions."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import LongCatImageTransformer2DModel
from torch import nn

_KEPT = 4  # positive and negative, at two sizes or with two sets of references

RotaryTable = tuple[torch.Tensor, torch.Tensor]


@dataclass(eq=False)
class _Entry:
    """A table on the host, and its copy on the device of the last forward."""

    ids: torch.Tensor
    host: RotaryTable
    placed: RotaryTable

    def on(self, device: torch.device) -> RotaryTable:
        """The table on a device; copied there once."""
        if self.placed[0].device != device:
            self.placed = _move(self.host, device)
        return self.placed


class HostRotary(nn.Module):
    """The transformer's own rotary module, run on the host only.

    It computes in float64, which MPS does not have and consumer cards do slowly, and reduces it to float32 on MPS,
    where the table would be another one. Here no float64 reaches a device; each gets the same float32 table.
    """

    def __init__(self, reference: nn.Module) -> None:
        super().__init__()
        self.reference = reference
        self.device: torch.device | None = None  # where tables are wanted; None: where the ids are
        self._entries: deque[_Entry] = deque(maxlen=_KEPT)

    @torch.compiler.disable
    def forward(self, ids: torch.Tensor) -> RotaryTable:
        """Cosines and sines, each (tokens, sum of the axes' dimensions) in float32, of position ids (tokens, axes).

        Ids on the host cost no synchronisation with the device; ids on a device are copied from it each time.
        """
        return self._entry(ids.cpu()).on(self.device or ids.device)

    def _entry(self, ids: torch.Tensor) -> _Entry:
        found = next((entry for entry in self._entries if torch.equal(entry.ids, ids)), None)
        if found is None:
            with torch.inference_mode(False):  # kept for training too, which cannot use inference tensors
                host = self.reference(ids)
            found = _Entry(ids, host, host)
        else:
            self._entries.remove(found)
        self._entries.append(found)
        return found

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Called when the model is moved, such as off a device to free it; tables have no place there any more."""
        for entry in self._entries:
            entry.placed = entry.host
        return super()._apply(fn, recurse)


def install(transformer: LongCatImageTransformer2DModel) -> HostRotary:
    """Put the transformer's rotary module on the host, unless it is there already."""
    if not isinstance(transformer.pos_embed, HostRotary):
        transformer.pos_embed = HostRotary(transformer.pos_embed)
    rotary: HostRotary = transformer.pos_embed
    return rotary


def _move(table: RotaryTable, device: torch.device) -> RotaryTable:
    with torch.inference_mode(False):
        cosines, sines = (part.to(device) for part in table)
    return cosines, sines
