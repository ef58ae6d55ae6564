"""One training run while it lasts: the adapters, the optimiser, the average and the place in the data."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from ..errors import LongCatError
from ..transformer import VelocityModel
from . import engine, objective, optimisers, preservation
from .adapters import Adapters
from .draws import Cursor, draw
from .objective import Sample, Shift
from .settings import TrainSettings
from .state import State

Batches = Sequence[Sequence[int]]


class Data(preservation.Data, Protocol):
    """Encoded pictures, see ``encoded.EncodedDataset``."""

    buckets: Mapping[tuple[int, int], tuple[int, ...]]
    held_out: tuple[int, ...]
    identity: str
    dropout: float

    def __getitem__(self, index: int) -> Any: ...


@dataclass
class History:
    """What a run has measured: (step, value), in the order of the steps."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    preservation: list[tuple[int, float]] = field(default_factory=list)  # not weighted
    held_out: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best_step(self) -> int | None:
        """The step with the lowest held-out loss, the first of them; None where none was measured."""
        return min(self.held_out, key=lambda measured: measured[1])[0] if self.held_out else None


class Run:
    """Updates the adapters of a model step by step, and turns into a state and back."""

    def __init__(
        self,
        model: VelocityModel,
        adapters: Adapters,
        data: Data,
        settings: TrainSettings,
        shift: Shift,
        device: torch.device,
        preserved: preservation.Preserved | None = None,
    ) -> None:
        self.model = model
        self.adapters = adapters
        self.data = data
        self.settings = settings
        self.shift = shift
        self.device = device
        self.preserved = preserved
        self.step = 0
        self.torn = False  # an update broke off: what is here now belongs to no step, and is not to be saved
        self.history = History()
        self.cursor = Cursor(data.buckets, settings.batch, settings.seed)
        self.optimiser = optimisers.make(settings, adapters.masters)
        self.average = optimisers.Average(adapters.masters, settings.ema) if settings.ema else None
        self._accelerator = _accelerator(device)
        self._ahead: tuple[tuple[int, Batches], list[list[Sample]]] | None = None  # step, batches and their samples

    @property
    def weights(self) -> Sequence[torch.Tensor]:
        """What the run would give as its result now: the average, or the masters."""
        return self.average.weights if self.average else self.adapters.masters

    def advance(self) -> float:
        """Do one step, and give its loss.

        Raises:
            LongCatError: the loss or the gradient is not finite; the adapters are as they were before the step.

        Whatever else is raised leaves them so too, unless the run is ``torn`` afterwards.
        """
        place = (self.cursor.epoch, self.cursor.position)
        try:
            batches = [self.cursor.take() for _ in range(self.settings.accumulation)]
            loss, kept = self.gradients(batches)
            self._check(loss, [index for batch in batches for index in batch])
        except BaseException:
            self.adapters.forget_gradients()
            self.cursor = Cursor(self.data.buckets, self.settings.batch, self.settings.seed, *place)
            raise
        self._update()
        self.history.losses.append((self.step, loss))
        if kept is not None:
            self.history.preservation.append((self.step, kept))
        return loss

    def learning_rate(self) -> float:
        """Of the last update; Prodigy multiplies it by its own estimate."""
        group = self.optimiser.param_groups[0]
        return float(group["lr"]) * float(group.get("d", 1.0))

    def gradients(self, batches: Batches) -> tuple[float, float | None]:
        """Leave the gradient of the mean loss over all samples of some batches in the masters.

        With preservation, its points follow each batch, in a forward of their own, so that a step needs no more memory.

        Returns:
            The mean loss of the pictures, and that of the points without its weight; None where there are none.
        """
        total = sum(len(batch) for batch in batches)
        losses, kept, place, held = [], [], 0, 0
        for samples in self._samples(batches):
            losses.append(self._backward(samples, total))
            points = self._points(range(place, place + len(samples)))
            if points:
                kept.append(self._backward(points, total, self.settings.preservation_weight * preservation.EVERY))
            place, held = place + len(samples), held + len(points)
        self._look_ahead()
        return sum(loss.item() for loss in losses), sum(loss.item() for loss in kept) * total / held if held else None

    def _points(self, places: Iterable[int]) -> list[Sample]:
        """Those that accompany some samples of the step that comes."""
        if self.preserved is None:
            return []
        chosen = (self.preserved.choose(self.step + 1, place) for place in places)
        return [point for point in chosen if point is not None]

    def _samples(self, batches: Batches) -> list[list[Sample]]:
        """Of the step that comes; from the look ahead where that was for these batches."""
        wanted, ahead = (self.step + 1, batches), self._ahead
        self._ahead = None
        return ahead[1] if ahead and ahead[0] == wanted else self._made(*wanted)

    def _made(self, step: int, batches: Batches) -> list[list[Sample]]:
        places = count()
        return [[self._sample(step, index, next(places)) for index in batch] for batch in batches]

    def _look_ahead(self) -> None:
        """Read and mix the samples of the next step; a device other than the CPU is still busy with this one."""
        if self.step + 1 >= self.settings.steps:
            return
        cursor = copy(self.cursor)
        wanted = self.step + 2, [cursor.take() for _ in range(self.settings.accumulation)]
        with suppress(LongCatError):  # which comes again when the samples are needed
            self._ahead = wanted, self._made(*wanted)

    def _sample(self, step: int, index: int, place: int) -> Sample:
        example = self.data[index]
        chance = draw(example.latent.shape, self.settings.seed, step, place)
        return objective.sample(example, chance, self.shift, self.data.dropout)

    def _backward(self, samples: Sequence[Sample], total: int, weight: float = 1.0) -> torch.Tensor:
        """Add the gradient of these samples' part in a mean over ``total``, times the weight; that part itself."""
        with engine.attention(self.device):
            loss = objective.losses(self.model, samples, self.model.dtype, self.device).sum() / total
            self._accelerator.backward(loss * weight)
        self.adapters.collect()
        return loss.detach()

    def _check(self, loss: float, indices: Sequence[int]) -> None:
        norm = optimisers.clip(self.adapters.masters, self.settings.clip)
        if math.isfinite(loss) and math.isfinite(norm):
            return
        raise LongCatError(
            f"Step {self.step + 1} gave a loss of {loss} and a gradient of {norm} (pictures {list(indices)}). The "
            "adapters were left as they were. Lower the learning rate, or look for a broken picture; with fp16 "
            "weights, choose bf16.",
            f"第 {self.step + 1} 步的损失为 {loss}、梯度为 {norm}（图片 {list(indices)}）。适配器保持不变。"
            "请降低学习率，或检查是否有损坏的图片；若权重为 fp16，请选择 bf16。",
        )

    def _update(self) -> None:
        self.torn = True
        step = self.step + 1
        optimisers.set_learning_rate(self.optimiser, optimisers.learning_rate(self.settings, step))
        with optimisers.without_compiling(self.settings):
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.adapters.publish()
        if self.average:
            self.average.update(self.adapters.masters, step)
        self.step = step
        self.torn = False

    def state(self, identity: Mapping[str, Any]) -> State:
        """The run as it is now; ``identity`` says what it was begun with."""
        tensors, numbers = optimisers.exported(self.optimiser)
        parts = {"adapters": self._named(self.adapters.masters), "optimiser": tensors}
        if self.average:
            parts["ema"] = self._named(self.average.weights)
        values = {
            **identity,
            "alpha": self.adapters.alpha,
            "optimiser": numbers,
            "cursor": {"epoch": self.cursor.epoch, "position": self.cursor.position},
            "losses": self.history.losses,
            "preservation": self.history.preservation,
            "held_out": self.history.held_out,
        }
        return State(self.step, {name: part for name, part in parts.items() if part}, values)

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Become what :meth:`state` gave; the run was made with the same settings."""
        with optimisers.without_compiling(self.settings):
            optimisers.restore(self.optimiser, state.tensors.get("optimiser", {}), state.values["optimiser"])
        for name, master in self._named(self.adapters.masters).items():
            master.copy_(state.tensors["adapters"][name])
        if self.average:
            for name, weight in self._named(self.average.weights).items():
                weight.copy_(state.tensors["ema"][name])
        self.adapters.publish()
        self.step = state.step
        self.cursor = Cursor(self.data.buckets, self.settings.batch, self.settings.seed, **state.values["cursor"])
        self.history = History(
            [(step, loss) for step, loss in state.values["losses"]],
            [(step, loss) for step, loss in state.values.get("preservation", [])],
            [(step, loss) for step, loss in state.values["held_out"]],
        )

    def _named(self, weights: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        keys = [f"{name}.{part}" for name in self.adapters.names for part in ("lora_A.weight", "lora_B.weight")]
        return {key: weight.detach() for key, weight in zip(keys, weights, strict=True)}


def _accelerator(device: torch.device) -> Accelerator:
    """Of which a process has one set of settings; mixed precision is not among what is used of it."""
    try:
        return Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    except ValueError as error:
        raise LongCatError(
            f"Another program in this process uses accelerate with other settings ({error}). Restart ComfyUI and "
            "train before that program runs.",
            f"此进程中的另一程序以不同设置使用 accelerate（{error}）。请重启 ComfyUI，并在该程序运行之前训练。",
        ) from error
