"""What the node shows while it trains: loss, speed and time left, a chart, and pictures with and without the LoRA."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from PIL import Image

from .. import labelled_grid, loss_chart
from ..memory import is_out_of_memory
from ..sampler import Prompt, sample
from ..training import adapters, state
from ..training.loop import Events, Progress
from ..transformer import VelocityModel
from . import host

SECONDS_BETWEEN_PREVIEWS = 2.0
SHEETS = "validation"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """Pictures that are drawn again and again while the LoRA grows.

    Attributes:
        texts: the prompts as the user wrote them.
        prompts: the same, encoded.
        size: width and height in pixels.
        decode: a scaled latent (1, 16, h, w) to (height, width, 3) in 0..1.
        scheduler: the checkpoint's scheduler config.
    """

    texts: Sequence[str]
    prompts: Sequence[Prompt]
    size: tuple[int, int]
    steps: int
    guidance: float
    seed: int
    decode: Callable[[torch.Tensor], torch.Tensor]
    scheduler: Any


class Stopped(Exception):
    """The user interrupted while a validation picture was drawn."""


@dataclass
class Monitor:
    """Shows a run on the running node, and asks ComfyUI whether to stop.

    Attributes:
        folder: of the run; pictures are kept in its subfolder ``validation``.
        stopped: whether the user interrupted.
    """

    folder: Path
    steps: int
    validation: Validation
    losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    stopped: bool = False

    def __post_init__(self) -> None:
        self._bar = comfy.utils.ProgressBar(self.steps)
        self._shown = 0.0
        self._sheet: Image.Image | None = None
        self._without: list[torch.Tensor] = []
        self._remember()

    def events(self) -> Events:
        """What the loop calls."""
        return Events(
            on_step=self.on_step,
            should_stop=self.should_stop,
            on_preparing=self.on_preparing,
            on_validation=self.on_validation,
            on_held_out=self.on_held_out,
        )

    def should_stop(self) -> bool:
        """Whether the run has to be saved and ended."""
        self.stopped = self.stopped or comfy.model_management.processing_interrupted()
        return self.stopped

    def on_preparing(self, done: int, total: int) -> None:
        """The base draws what is to be preserved; nothing is there to be saved yet, so an interruption just ends it."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        host.show_text(f"drawing what is to be preserved 正在绘制需要保留的内容 {done}/{total}")

    def on_step(self, progress: Progress) -> None:
        """One step is done."""
        self.losses.append((progress.step, progress.loss))
        left = (progress.steps - progress.step) * progress.seconds_per_step
        host.show_text(
            f"{progress.step}/{progress.steps} · loss 损失 {progress.loss:.4f} · lr {progress.learning_rate:.3g} · "
            f"{progress.seconds_per_step:.3g} s/step 秒/步 · {_clock(left)} left 剩余"
        )
        self._show(progress.step, now=progress.step in (1, progress.steps))

    def on_held_out(self, step: int, loss: float) -> None:
        """The loss of the pictures that are not trained on."""
        self.held_out.append((step, loss))
        host.show_text(f"{step}/{self.steps} · held-out loss 留出损失 {loss:.4f}")
        self._show(step, now=True)

    def on_validation(self, step: int, model: torch.nn.Module) -> None:
        """Draw every prompt; a picture that cannot be drawn does not end the training."""
        assert isinstance(model, VelocityModel)
        if not self.validation.prompts:
            return
        try:
            if not self._without:
                with adapters.disabled(model):
                    self._without = list(self._drawn(model, f"{step}/{self.steps} · without LoRA 不使用 LoRA"))
            drawn = list(self._drawn(model, f"{step}/{self.steps} · with LoRA 使用 LoRA"))
        except Stopped:
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning(
                "The validation pictures of step %d are left out: the device ran out of memory (%s). Training goes on. "
                "显存不足，跳过本次验证图，训练继续。",
                step,
                error,
            )
            return
        finally:
            _release_vae()
        pictures = [each for pair in zip(self._without, drawn, strict=True) for each in pair]
        self._sheet = labelled_grid.grid(pictures, self.validation.texts, ["without LoRA", f"step {step}"])
        self._keep(step, self._sheet)
        self._show(step, now=True)

    def _drawn(self, model: VelocityModel, text: str) -> Iterator[torch.Tensor]:
        given = self.validation
        device = comfy.model_management.get_torch_device()
        for number, prompt in enumerate(given.prompts, start=1):
            host.show_text(f"{text}: {number}/{len(given.prompts)}")
            latent = sample(
                model, prompt, given.size, given.seed, given.steps, given.guidance, device, given.scheduler, _check_stop
            )
            with torch.inference_mode():  # in which ComfyUI made the VAE
                picture = given.decode(latent)
            yield picture

    def _remember(self) -> None:
        """Take over the losses of earlier sittings from the last state."""
        found = state.steps(self.folder)
        if not found:
            return
        with contextlib.suppress(OSError, ValueError, KeyError):  # a damaged one is the loop's to refuse
            index = state.path(self.folder, found[-1]) / state.INDEX
            values = json.loads(index.read_text(encoding="utf-8"))["values"]
            self.losses = [(step, loss) for step, loss in values["losses"]]
            self.held_out = [(step, loss) for step, loss in values["held_out"]]

    def _show(self, step: int, now: bool) -> None:
        """Progress at every step; the picture only now and then, since it is made and sent."""
        preview = None
        if now or time.monotonic() - self._shown >= SECONDS_BETWEEN_PREVIEWS:
            picture = self._picture()
            preview = ("JPEG", picture, max(picture.size))
            self._shown = time.monotonic()
        try:
            self._bar.update_absolute(step, self.steps, preview)
        except comfy.model_management.InterruptProcessingException:  # ends a node at once, and this one has to save
            self.stopped = True

    def _picture(self) -> Image.Image:
        chart = loss_chart.draw(self.losses, self.held_out, self.steps)
        if self._sheet is None:
            return chart
        width = chart.width
        sheet = self._sheet.resize((width, max(1, round(self._sheet.height * width / self._sheet.width))))
        both = Image.new("RGB", (width, chart.height + sheet.height))
        both.paste(chart, (0, 0))
        both.paste(sheet, (0, chart.height))
        return both

    def _keep(self, step: int, sheet: Image.Image) -> None:
        folder = self.folder / SHEETS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sheet.save(folder / f"step-{step:08d}.png")
        except OSError as error:
            logger.warning("The validation picture could not be kept 无法保存验证图: %s", error)


def _check_stop() -> None:
    if comfy.model_management.processing_interrupted():
        raise Stopped


def _release_vae() -> None:
    """Give the device back to training; the VAE is all that ComfyUI has loaded now."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
