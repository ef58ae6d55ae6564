"""The modulation layers of a model that is trained, answered by a table that lies on the host.

They are frozen and depend on the noise level alone (DESIGN.md trap 10). In bf16 there are about 1,250 noise levels
(trap 9), whose results weigh 1.4 GB on the host, in place of 3.44 GB of weights on the device.

The results of a level travel in the place of the time embedding, so every block gets them as an argument: one that is
computed again in the backward pass gets those of its own forward, and compiled code is the same for all blocks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .. import flow
from ..errors import LongCatError
from ..modulation import is_modulation
from .settings import TrainSettings

DTYPE = torch.bfloat16  # the one whose noise levels are few
_LOWEST = 0.001  # noise level; what lies below is computed when it comes


def wanted(settings: TrainSettings, dtype: torch.dtype) -> bool:
    """Whether the settings ask for a table beside a model that computes in ``dtype``; in fp32 every level is new."""
    return settings.modulation_table and dtype is DTYPE


def tabulate(transformer: Any, device: torch.device) -> None:
    """Put a table in the place of the modulation layers, whose weights stay on the CPU from now on.

    The rows are computed on ``device``, layer by layer, each in the shape that a batch of one picture has, so that
    they have the bits of the layers themselves.

    Args:
        transformer: frozen, with a bf16 computation; adapters may be beside its other layers.

    Raises:
        LongCatError: a modulation layer has an adapter or is no plain linear layer, so it may change.
    """
    layers = dict(_layers(transformer))
    hidden = transformer.inner_dim
    table = _Table(transformer.time_embed, list(layers.values()))
    table.fill(device)
    first = 0
    for name, layer in layers.items():
        norm = transformer.get_submodule(name.rpartition(".")[0])
        count = layer.out_features // hidden
        norm.silu, norm.linear = nn.Identity(), _Columns(first, count, hidden)
        first += count
    transformer.time_embed = table


def _layers(transformer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in transformer.named_modules():
        if is_modulation(name):
            if type(layer) is not nn.Linear or layer.weight.dtype is not DTYPE:
                raise LongCatError(
                    f"The modulation layer '{name}' is a {type(layer).__name__}, and only plain bf16 layers can be "
                    "replaced by a table. Switch modulation_table off.",
                    f"调制层“{name}”是 {type(layer).__name__}，只有普通的 bf16 层能用查找表代替。"
                    "请关闭 modulation_table。",
                )
            yield name, layer


class _Table(nn.Module):
    """Timesteps to the results of all modulation layers, in the place of the time embedding."""

    def __init__(self, time_embed: nn.Module, layers: list[nn.Linear]) -> None:
        super().__init__()
        # In a tuple they are out of reach for whatever moves the model.
        self._sources = (time_embed.to("cpu"), [layer.to("cpu") for layer in layers])
        self._places: dict[float, int] = {}
        self._rows = torch.empty(0)

    @torch.no_grad()
    def fill(self, device: torch.device) -> None:
        """Compute the rows of every noise level from ``_LOWEST`` to 1; each layer is on the device in its turn."""
        timesteps = _timesteps().to(device)
        inputs = self._embedded(timesteps, batch=1)
        columns = sum(layer.out_features for layer in self._sources[1])
        self._rows = torch.empty(len(timesteps), columns, dtype=DTYPE, pin_memory=device.type == "cuda")
        first = 0
        for layer in self._sources[1]:
            weight, bias = layer.weight.to(device), layer.bias.to(device)
            results = torch.cat([functional.linear(each, weight, bias) for each in inputs])
            self._rows[:, first : first + layer.out_features] = results.cpu()
            first += layer.out_features
        self._places = {timestep: place for place, timestep in enumerate(timesteps.tolist())}

    def forward(self, timestep: torch.Tensor, hidden_dtype: torch.dtype) -> torch.Tensor:
        """Rows (batch, columns of all modulation layers) of timesteps (batch,) as the model gets them, times 1000."""
        places = [self._places.get(each) for each in timestep.tolist()]
        known = [place for place in places if place is not None]
        if len(known) < len(places):
            return self._computed(timestep)
        rows = self._rows[known[0]][None] if len(known) == 1 else self._rows[known]
        return rows.to(timestep.device, non_blocking=True)

    def _embedded(self, timesteps: torch.Tensor, batch: int) -> list[torch.Tensor]:
        """What the layers are given, (batch, hidden size) each."""
        time_embed = self._sources[0].to(timesteps.device)
        found = [functional.silu(time_embed(each, DTYPE)) for each in timesteps.split(batch)]
        time_embed.to("cpu")
        return found

    @torch.no_grad()
    def _computed(self, timestep: torch.Tensor) -> torch.Tensor:
        """A row for each timestep by the layers themselves, which pass over the device."""
        conditioning = self._embedded(timestep, len(timestep))[0]
        device = timestep.device
        results = [
            functional.linear(conditioning, layer.weight.to(device), layer.bias.to(device))
            for layer in self._sources[1]
        ]
        return torch.cat(results, dim=1)


class _Columns(nn.Module):
    """One modulation layer's part of a row, its place a buffer: a number would be compiled in for each block."""

    def __init__(self, first: int, count: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.register_buffer("parts", torch.arange(first, first + count), persistent=False)
        self.parts: torch.Tensor

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Columns (batch, parts x hidden size) of rows (batch, all columns)."""
        return rows.unflatten(1, (-1, self.hidden)).index_select(1, self.parts).flatten(1)


def _timesteps() -> torch.Tensor:
    """Every timestep, times 1000, that the model can get at noise levels from ``_LOWEST`` to 1; see trap 9."""
    bits = [int(torch.tensor(value, dtype=DTYPE).view(torch.int16)) for value in (_LOWEST * 1000, 1000.0)]
    thousandths = torch.arange(bits[0], bits[1] + 1, dtype=torch.int16).view(DTYPE)
    return (flow.model_timestep(thousandths.float() / 1000, DTYPE) * 1000).unique()
