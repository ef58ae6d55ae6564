"""The modulation table: adaLN projections that depend on the noise level alone, computed once per schedule.

27 % of the transformer's weights (``norm*.linear``) turn the time embedding into shifts, scales and gates. Nothing
else enters them, so for the few noise levels of a schedule their results fit a table of about 1 MB a level, and
3.44 GB of weights need not be on the device while it is sampled. Every row is computed by the layer itself, in the
shape and dtype in which the model asks for it, so the table changes no bit (DESIGN.md trap 10).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

# By their official names, and by those of ComfyUI's class.
_MODULATION = re.compile(
    r"(single_)?transformer_blocks\.\d+\.norm(1|1_context)?\.linear|norm_out\.linear"
    r"|double_blocks\.\d+\.(img|txt)_mod\.lin|single_blocks\.\d+\.modulation\.lin|final_layer\.adaLN_modulation\.1"
)
MOST_LEVELS = 256

Embed = Callable[[torch.Tensor], torch.Tensor]
Project = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


@dataclass(frozen=True)
class Level:
    """One noise level as the model sees it; another dtype, device or batch size may round differently."""

    timestep: float
    batch: int
    dtype: torch.dtype
    device: torch.device


def is_modulation(layer: str) -> bool:
    """Whether the linear layer of that name is a function of the noise level alone."""
    return _MODULATION.fullmatch(layer) is not None


class ModulationTable:
    """Results of the modulation layers of one model for the noise levels seen so far.

    :meth:`sync` has to be called when a weight of a modulation layer may have changed.
    """

    def __init__(self) -> None:
        self._version: object = None
        self._rows: dict[str, dict[Level, torch.Tensor]] = {}
        self._current: Level | None = None
        self._plan: Callable[[], dict[Level, torch.Tensor]] = dict
        self._inputs: dict[Level, torch.Tensor] | None = None

    def sync(self, version: object) -> None:
        """Forget every row unless it was computed with this version of the weights; None is no known version."""
        if version is None or version != self._version:
            self._rows.clear()
        self._version = version

    @contextmanager
    def at(
        self, timesteps: torch.Tensor, schedule: torch.Tensor | None, samples: torch.Tensor, embed: Embed
    ) -> Iterator[None]:
        """Answer the modulation layers from the table while the model runs at one noise level.

        Where the timesteps differ inside the batch, the layers compute as if there were no table.

        Args:
            timesteps: (batch,), as the time embedding gets them.
            schedule: (steps,), timesteps whose rows are computed on the way, so that the weights are read once
                per schedule and not once per step; in the same dtype.
            samples: (batch, …), in the dtype and on the device in which the model computes.
            embed: timesteps (batch,) to time embeddings after their activation, (batch, hidden size).
        """
        first, *others = timesteps.tolist()
        if any(other != first for other in others):
            yield
            return
        self._current = Level(first, len(timesteps), samples.dtype, samples.device)
        self._plan = partial(_inputs, self._current, timesteps if schedule is None else schedule, embed)
        try:
            yield
        finally:
            self._current = None
            self._inputs = None
            self._plan = dict  # the embedding belongs to the model, which must not be kept by its own table

    def row(self, layer: str, conditioning: torch.Tensor, project: Project) -> torch.Tensor | None:
        """The layer's result at the current noise level, or None where the layer has to compute by itself.

        Args:
            conditioning: what the layer was called with, (batch, …, hidden size).
            project: computes the layer for several such inputs with one reading of its weights.
        """
        if self._current is None or conditioning.shape[0] != self._current.batch:
            return None
        rows = self._rows.setdefault(layer, {})
        if self._current not in rows:
            # Not before the first layer asks: only now are the time embedding's weights sure to be on the device.
            self._inputs = self._plan() if self._inputs is None else self._inputs
            if len(rows) + len(self._inputs) > MOST_LEVELS:
                rows.clear()
            others = [level for level in self._inputs if level not in rows and level != self._current]
            inputs = [conditioning, *(self._inputs[level].view_as(conditioning) for level in others)]
            for level, result in zip([self._current, *others], project(inputs), strict=True):
                rows[level] = result[:1].clone()  # the batch has one noise level, so its results are equal
        row = rows[self._current]
        return row.expand(conditioning.shape[0], *row.shape[1:])


def _inputs(current: Level, schedule: torch.Tensor, embed: Embed) -> dict[Level, torch.Tensor]:
    """What the layers are given at each level of a schedule."""
    levels = zip(schedule.tolist(), schedule, strict=True)
    return {replace(current, timestep=value): embed(timestep.expand(current.batch)) for value, timestep in levels}
