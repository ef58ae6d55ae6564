"""Training and validation of a config, without ComfyUI."""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from .. import checkpoints, labelled_grid, loss_chart, saving
from ..checkpoints import Checkpoint
from ..errors import LongCatError
from ..sampler import Prompt, sample
from ..transformer import VelocityModel, audited_shapes
from . import adapters, base, dataset, encoded, estimate, loop, out_of_memory, resume, selfcheck, state
from .config import Config
from .dataset import Dataset
from .encoders import CheckpointEncoders
from .loop import Events, Progress, Result

LOGGED_EVERY = 10
_OWN_PROMPTS = 2
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """Prompts to draw, encoded; ``texts`` are the same as they were written."""

    texts: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    size: tuple[int, int]


def train(config: Config, device: torch.device, should_stop: Callable[[], bool]) -> Result:
    """Train, or go on, and write the LoRA, the loss chart and validation pictures.

    Raises:
        LongCatError: see :func:`loop.train`; or the LoRA that was written does not do what was learnt.
    """
    _tell_notes(config)
    checkpoint = checkpoints.open_checkpoint(config.checkpoint)
    base.check(checkpoint, config.settings.base_precision)
    # What would be refused later is refused before anything is computed.
    resume.find(config.run_folder, config.settings)
    saving.require_writable(config.file, saving.LORA)
    saving.require_writable(config.run_folder / state.INDEX, saving.STATES)
    found = _dataset(config, checkpoint)
    encoders = _encoders(checkpoint, device)
    preserve = config.settings.preservation_prompts if config.settings.preserves else ()
    examples = encoded.encode(found, encoders, config.cache, _told("encoding"), preserve)
    drawn = _validation(config, found, encoders)
    encoders.to(torch.device("cpu"))
    gc.collect()
    _tell_estimate(config, checkpoint, found, device)
    model = _base(config, checkpoint, device)

    def on_validation(step: int, trained: torch.nn.Module) -> None:
        grid = _draw_both(config, checkpoint, model, encoders, drawn, device)
        _keep(grid, config.run_folder / f"step-{step:08d}.png")

    def on_saved(place: Path) -> None:
        log.info("saved %s", place)

    def on_held_out(step: int, loss: float) -> None:
        log.info("step %d  held-out loss %.4f", step, loss)

    told = _told("drawing what is to be preserved")
    events = Events(_log_step, should_stop, on_validation, on_saved, on_held_out, told)
    scheduler = checkpoint.configs["scheduler"]
    result = loop.train(model, examples, config.settings, config.run_folder, events, device, scheduler)
    result.write(config.file, config.settings, checkpoint.flavour.key, examples.identity, found.settings.trigger_word)
    with out_of_memory.told(*out_of_memory.CHECKING, config.settings, device):
        selfcheck.check_file(model, config.file, result.adapters, device)
    chart = loss_chart.draw(result.losses, result.held_out, config.settings.steps)
    _keep(chart, config.run_folder / "loss.png")
    log.info("%s: %d of %d steps", config.file, result.step, config.settings.steps)
    return result


def validate(config: Config, device: torch.device) -> Path:
    """Draw the validation prompts without and with the LoRA that was written; the picture's file.

    Raises:
        LongCatError: there is no LoRA yet, the picture cannot be written, or see :func:`lora_files.read`.
    """
    _tell_notes(config)
    if not config.file.is_file():
        raise LongCatError(
            f"There is no LoRA '{config.file}' yet. Train it first: python -m longcat_backend.training CONFIG.",
            f"还没有 LoRA“{config.file}”。请先训练：python -m longcat_backend.training CONFIG。",
        )
    checkpoint = checkpoints.open_checkpoint(config.checkpoint)
    encoders = _encoders(checkpoint, device)
    drawn = _validation(config, _dataset(config, checkpoint), encoders)
    encoders.to(torch.device("cpu"))
    model = _base(config, checkpoint, device)
    settings = config.settings
    adapters.inject(model.transformer, settings.targets, settings.rank, settings.effective_alpha, settings.seed, device)
    model.transformer.to(device)
    selfcheck.put_on(model, config.file)
    place = config.run_folder / "validation.png"
    _save(_draw_both(config, checkpoint, model, encoders, drawn, device), place)
    return place


def _tell_notes(config: Config) -> None:
    for note in config.notes:
        log.info("%s", note)


def _dataset(config: Config, checkpoint: Checkpoint) -> Dataset:
    found = dataset.read_folder(config.dataset, config.roots)
    log.info("%s", found.report())
    if found.edits != checkpoint.flavour.edits:
        kind, kind_zh = ("edits pictures", "编辑图像") if checkpoint.flavour.edits else ("draws from text", "文生图")
        raise LongCatError(
            f"The checkpoint {kind}, and the dataset has {'' if found.edits else 'no '}pictures before an edit. Choose "
            "another checkpoint, or set or leave out reference_folder.",
            f"该检查点用于{kind_zh}，而数据集{'有' if found.edits else '没有'}编辑前的图像。"
            "请选择其他检查点，或设置或去掉 reference_folder。",
        )
    return found


def _base(config: Config, checkpoint: Checkpoint, device: torch.device) -> VelocityModel:
    with out_of_memory.told(*out_of_memory.LOADING, config.settings, device):
        return base.load_base(checkpoint, config.settings.base_precision, device, _told("quantising"))


def _encoders(checkpoint: Checkpoint, device: torch.device) -> CheckpointEncoders:
    dtype = torch.float32 if device.type in ("cpu", "mps") else torch.bfloat16
    return CheckpointEncoders(checkpoint, dtype, device)


def _validation(config: Config, found: Dataset, encoders: CheckpointEncoders) -> Validation:
    item = found.items[found.held_out[0] if found.held_out else 0]
    pixels = item.reference_pixels()
    captions = [found.items[index].caption for index in (*found.held_out, *range(len(found.items)))]
    texts = config.validation.prompts or tuple(dict.fromkeys(captions))[:_OWN_PROMPTS]
    reference = None if pixels is None else encoders.latents(pixels)[0]
    empty = encoders.text("", pixels)
    prompts = tuple(Prompt(encoders.text(text, pixels), empty, reference) for text in texts)
    return Validation(texts, prompts, config.validation.size or item.size)


def _draw_both(
    config: Config,
    checkpoint: Checkpoint,
    model: VelocityModel,
    encoders: CheckpointEncoders,
    drawn: Validation,
    device: torch.device,
) -> Image.Image:
    """One row for the model without its adapters and one with them."""
    settings, pictures = config.validation, []

    def row() -> None:
        for prompt in drawn.prompts:
            latent = sample(
                model,
                prompt,
                drawn.size,
                settings.seed,
                settings.steps,
                settings.guidance,
                device,
                checkpoint.configs["scheduler"],
            )
            pictures.append(encoders.pixels(latent.cpu()))

    with adapters.disabled(model):
        row()
    row()
    return labelled_grid.grid(pictures, ["without LoRA", "with LoRA"], list(drawn.texts))


def _keep(picture: Image.Image, place: Path) -> None:
    """A picture of a run is worth less than the run, which goes on without it."""
    try:
        _save(picture, place)
    except LongCatError as error:
        log.warning("%s", error)


def _save(picture: Image.Image, place: Path) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        picture.save(place)
    except OSError as error:
        raise LongCatError(
            f"The picture '{place}' cannot be written: {error}. Make room, or make the folder writable.",
            f"无法写入图像“{place}”：{error}。请清理空间，或使文件夹可写。",
        ) from error
    log.info("drew %s", place)


def _tell_estimate(config: Config, checkpoint: Checkpoint, found: Dataset, device: torch.device) -> None:
    """Say what the run will need; where that does not fit, what would."""
    shapes = audited_shapes(checkpoint)
    given = (checkpoint.configs["transformer"], shapes, config.settings, found.largest_size, device)
    log.info("memory: %s", estimate.estimate(*given))
    if device.type == "cuda":
        advice = estimate.fitting(*given, torch.cuda.mem_get_info(device)[0])
        if advice:
            log.warning("%s", advice)


def _log_step(progress: Progress) -> None:
    if progress.step % LOGGED_EVERY == 0 or progress.step in (1, progress.steps):
        left = (progress.steps - progress.step) * progress.seconds_per_step
        log.info(
            "step %d/%d  loss %.4f  rate %.3g  %.2f s/step  %d:%02d left",
            progress.step,
            progress.steps,
            progress.loss,
            progress.learning_rate,
            progress.seconds_per_step,
            *divmod(round(left), 60),
        )


def _told(what: str) -> Callable[[int, int], None]:
    return lambda done, total: log.debug("%s %d/%d", what, done, total)
