"""Training from the first step to the last, in any number of sittings."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import flow, lora_files
from ..errors import LongCatError
from ..identity import of_weights
from ..lora import Adapter
from ..memory import is_out_of_memory
from ..transformer import VelocityModel
from . import adapters, engine, out_of_memory, preservation, resume, selfcheck, state, tabulated, validation
from .objective import Shift, mean_tokens
from .run import Data, Run
from .settings import TrainSettings

_SMOOTHING = 0.9
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    seconds_per_step: float


@dataclass(frozen=True)
class Events:
    """What the host is told and asked; every one of them may be left out."""

    on_step: Callable[[Progress], None] = lambda progress: None
    should_stop: Callable[[], bool] = lambda: False
    on_validation: Callable[[int, nn.Module], None] = lambda step, model: None  # without gradients
    on_saved: Callable[[Path], None] = lambda folder: None
    on_held_out: Callable[[int, float], None] = lambda step, loss: None  # before its validation pictures are drawn
    on_preparing: Callable[[int, int], None] = lambda done, total: None  # trajectories to preserve; may raise to stop


@dataclass(frozen=True)
class Result:
    """What a run, or its sitting, ended with.

    Attributes:
        adapters: the average where one is kept, on the CPU in fp32.
        losses: (step, loss) of every step since the first sitting.
        preservation: (step, loss) of the preservation alone, not weighted, of the steps that have some.
        held_out: (step, loss) at each validation.
        stopped: it was interrupted, and goes on from its saved state when it is started again.
        best_step: of the lowest held-out loss; its state is among those kept.
    """

    adapters: tuple[Adapter, ...]
    losses: list[tuple[int, float]]
    held_out: list[tuple[int, float]]
    stopped: bool
    step: int
    best_step: int | None = field(default=None)
    preservation: list[tuple[int, float]] = field(default_factory=list)

    def write(self, file: Path, settings: TrainSettings, flavour: str, dataset: str, trigger_word: str) -> None:
        """Write the LoRA, and in its header what it was made of.

        Args:
            dataset: its identity.

        Raises:
            LongCatError: see :func:`lora_files.write`.
        """
        made_of = {"model_flavour": flavour, "steps_done": self.step, "dataset": dataset}
        words = [word] if (word := trigger_word.strip()) else []
        lora_files.write(file, self.adapters, {**settings.to_json(), **made_of}, trigger_words=words)


def train(
    model: VelocityModel,
    data: Data,
    settings: TrainSettings,
    run_folder: Path,
    events: Events,
    device: torch.device,
    scheduler: Mapping[str, Any] = flow.DEFAULT_SCHEDULER,
) -> Result:
    """Train adapters of a frozen model, or go on with the run whose states are in the folder.

    The same settings, data and model give the same adapters, bit for bit on a CPU, in one sitting or in several.

    Args:
        model: fresh from the checkpoint, on the CPU, in the base precision of the settings. Adapters are put into
            it; whoever calls throws it away afterwards.
        data: encoded pictures; their masks and edit references are used where they have some.
        scheduler: the checkpoint's scheduler config, for the shift of the noise levels.

    Raises:
        LongCatError: see :func:`resume.find`; a state cannot be saved or read; memory ran out; the loss
            is not finite; or the model's gradients are wrong. States that were saved stay whole.
    """
    with torch.inference_mode(False), torch.enable_grad():
        weights = of_weights(model.transformer.named_parameters())
        parts = {"data": data.identity, "model": weights, "scheduler": dict(scheduler)}
        found = resume.find(run_folder, settings, parts)
        with out_of_memory.told("before the first step", "第一步之前", settings, device):
            run = _begin(model, data, settings, run_folder, device, scheduler, weights, events)
            if found is not None:
                run.restore(found)
        if found is not None:
            log.info("The run in '%s' goes on after step %d of %d.", run_folder, run.step, settings.steps)
            if note := resume.new_length(found, settings):
                log.warning("%s", note)
        return _Sitting(run, {"settings": settings.to_json(), **parts}, run_folder, events).last()


def _begin(
    model: VelocityModel,
    data: Data,
    settings: TrainSettings,
    run_folder: Path,
    device: torch.device,
    scheduler: Mapping[str, Any],
    model_identity: str,
    events: Events,
) -> Run:
    transformer = model.transformer
    _refuse_no_pictures(data)
    beside = adapters.inject(
        transformer, settings.targets, settings.rank, settings.effective_alpha, settings.seed, device
    )
    if tabulated.wanted(settings, model.dtype):
        tabulated.tabulate(transformer, device)
    selfcheck.check_gradients(model, beside, device)
    engine.place(transformer, settings, device, run_folder / "offload")
    preserved = None
    if settings.preserves:
        given = (settings.seed, device, scheduler, events.on_preparing)
        preserved = preservation.draw(model, data, model_identity, *given)
    engine.recompute(transformer, settings)
    shift = Shift(settings.flow_shift, scheduler, mean_tokens(data.buckets))
    return Run(model, beside, data, settings, shift, device, preserved)


class _Sitting:
    """The steps that are done before the run ends or is interrupted."""

    def __init__(self, run: Run, identity: Mapping[str, Any], folder: Path, events: Events) -> None:
        self.run = run
        self.identity = identity
        self.folder = folder
        self.events = events
        self.saved = run.step
        self.pace = 0.0

    def last(self) -> Result:
        """Do steps until there is none left or the host says stop."""
        run, settings = self.run, self.run.settings
        stopped = False
        while run.step < settings.steps and not stopped:
            try:
                self._step()
                best = self._validate() if _due(settings.validate_every, run.step) else False
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise self._out_of_memory(error) from error
            stopped = self.events.should_stop()
            if best or stopped or run.step == settings.steps or _due(settings.save_every, run.step):
                self._save()
        return Result(
            run.adapters.exported(run.weights),
            run.history.losses,
            run.history.held_out,
            stopped and run.step < settings.steps,
            run.step,
            run.history.best_step,
            run.history.preservation,
        )

    def _step(self) -> None:
        began = time.perf_counter()
        loss = self.run.advance()
        took = time.perf_counter() - began
        self.pace = took if not self.pace else _SMOOTHING * self.pace + (1 - _SMOOTHING) * took
        run = self.run
        self.events.on_step(Progress(run.step, run.settings.steps, loss, run.learning_rate(), self.pace))

    def _validate(self) -> bool:
        """Measure the held-out loss and let the host draw; whether the loss is the lowest so far."""
        run = self.run
        with torch.no_grad(), run.adapters.showing(run.weights):
            if run.data.held_out:
                loss = validation.held_out_loss(run.model, run.data, run.shift, run.settings.seed, run.device)
                run.history.held_out.append((run.step, loss))
                self.events.on_held_out(run.step, loss)
            self._draw()
        return run.history.best_step == run.step

    def _draw(self) -> None:
        """Validation pictures are worth less than the run: without memory for them it goes on, and says so."""
        try:
            self.events.on_validation(self.run.step, self.run.model)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            engine.free(self.run.device)
            log.warning(
                "There was no memory for the validation pictures of step %d (%s); the training goes on. Lower their "
                "size or number. 第 %d 步的验证图像显存不足，训练继续进行；请减小其尺寸或数量。",
                self.run.step,
                error,
                self.run.step,
            )

    def _save(self) -> None:
        if self.saved == self.run.step:
            return
        place = state.save(self.folder, self.run.state(self.identity))
        self.saved = self.run.step
        state.prune(self.folder, self.run.settings.keep, self.run.history.best_step)
        self.events.on_saved(place)

    def _out_of_memory(self, error: Exception) -> LongCatError:
        """What the run goes on from is saved first; of an update that broke off nothing is whole."""
        engine.free(self.run.device)
        where, where_zh = f"in step {self.run.step + 1}", f"第 {self.run.step + 1} 步"
        if self.run.torn:
            where, where_zh = f"in the update of step {self.run.step + 1}", f"{where_zh}的参数更新"
        else:
            self._save()
        kept, kept_zh = f"the state of step {self.saved} is saved", f"第 {self.saved} 步的状态已保存"
        if not self.saved:
            kept, kept_zh = "no state was saved before it", "此前没有保存过状态"
        return out_of_memory.advice(f"{where} ({kept})", f"{where_zh}；{kept_zh}", self.run.settings, error)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _refuse_no_pictures(data: Data) -> None:
    if not any(data.buckets.values()):
        raise LongCatError(
            "The dataset has no picture to train on. Add pictures, or lower the held-out fraction.",
            "数据集中没有可用于训练的图片。请添加图片，或降低留出比例。",
        )
