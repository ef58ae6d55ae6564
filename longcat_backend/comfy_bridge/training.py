"""A LoRA trained from the graph's MODEL, CLIP, VAE and dataset, and everything that the node gives back."""

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from safetensors.torch import load_file

from .. import labelled_grid, lora_files, loss_chart
from ..checkpoints import Checkpoint
from ..sampler import Prompt
from ..training import base, encoded, estimate, loop, out_of_memory, resume, selfcheck
from ..training.dataset import Dataset, Item
from ..training.encoded import EncodedDataset
from ..training.settings import TrainSettings
from ..training.state import State
from ..transformer import VelocityModel, audited_shapes
from . import host, lora, prompt_grid, training_request
from .training_encoders import GraphEncoders
from .training_previews import Monitor, Validation
from .training_request import NODE, Request, shown_item, validation_texts

CACHE = "cache"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What the node gives back.

    Attributes:
        lora: the file's tensors, for core's nodes.
        chart, grid: (1, height, width, 3) in 0..1.
        config: what the headless program reads.
    """

    model: comfy.model_patcher.ModelPatcher
    lora: Mapping[str, torch.Tensor]
    file: Path
    chart: torch.Tensor
    grid: torch.Tensor
    config: str
    report: str


def train(
    model: comfy.model_patcher.ModelPatcher | None,
    clip: comfy.sd.CLIP | None,
    vae: comfy.sd.VAE | None,
    dataset: Dataset,
    request: Request,
) -> Trained:
    """Train, or go on with the run of that name; an interruption saves first and then ends the node.

    ComfyUI's models leave the device before the frozen base is read from the MODEL's checkpoint.

    Raises:
        LongCatError: MODEL, CLIP or VAE are not LongCatLoader's; the dataset is for another task; or see
            :func:`training_request.prepare_places` and :func:`loop.train`.
    """
    checkpoint = training_request.require_checkpoint(model)
    base.check(checkpoint, request.settings.base_precision)
    training_request.require_task(checkpoint, dataset)
    file, folder = training_request.prepare_places(request)
    encoders = GraphEncoders(clip, vae, NODE)
    begun = _begun(resume.find(folder, request.settings), request.settings)
    examples, validation = _encode(dataset, encoders, request, checkpoint)
    config = training_request.export(checkpoint, dataset, request)
    training_request.keep_config(folder, config)
    run = _Run(checkpoint, dataset, examples, request.settings, file, folder)
    monitor = Monitor(folder, request.settings.steps, validation)
    result = run.train(monitor)
    if monitor.stopped:
        _say_stopped(result.step, request.settings.steps, file)
        raise comfy.model_management.InterruptProcessingException
    assert model is not None
    trained, matched = lora.apply(model, lora_files.read(file).adapters, 1.0)
    grid = _final_grid(model, trained, encoders, validation, shown_item(dataset))
    chart = labelled_grid.as_tensor(loss_chart.draw(result.losses, result.held_out, request.settings.steps))
    report = "\n".join([*begun, *run.report(result), f"self-test 自检: {matched}"])
    return Trained(trained, load_file(file), file, chart, grid, config, report)


def _encode(
    dataset: Dataset, encoders: GraphEncoders, request: Request, checkpoint: Checkpoint
) -> tuple[EncodedDataset, Validation]:
    """Everything that CLIP and VAE have to do, before they leave the device."""
    bar = host.progress()

    def progress(done: int, total: int) -> None:
        host.show_text(f"encoding 编码 {done}/{total}")
        bar(done, total)

    preserve = request.settings.preservation_prompts if request.settings.preserves else ()
    examples = encoded.encode(dataset, encoders, training_request.work_folder() / CACHE, progress, preserve)
    item = shown_item(dataset)
    pixels = item.reference_pixels()
    reference = None if pixels is None else encoders.latents(pixels)[0].cpu()
    empty = encoders.text("", pixels).cpu()
    texts = validation_texts(dataset, request)
    validation = Validation(
        texts,
        [Prompt(encoders.text(text, pixels).cpu(), empty, reference) for text in texts],
        item.size,
        request.validation_steps,
        request.validation_guidance,
        request.validation_seed,
        encoders.pixels,
        checkpoint.configs["scheduler"],
    )
    return examples, validation


@dataclass
class _Run:
    """One sitting of a run; ``advice`` is what would make it fit, in words, where it may not."""

    checkpoint: Checkpoint
    dataset: Dataset
    examples: EncodedDataset
    settings: TrainSettings
    file: Path
    folder: Path
    advice: str = ""

    def train(self, monitor: Monitor) -> loop.Result:
        """Load the base afresh, train, write the LoRA, and give the memory back, whatever happens."""
        device = comfy.model_management.get_torch_device()
        model: VelocityModel | None = None
        _free()
        try:
            self._foresee(device)
            with torch.inference_mode(False), torch.enable_grad():
                model = self._base(device)
                scheduler = self.checkpoint.configs["scheduler"]
                place = (self.folder, monitor.events(), device, scheduler)
                result = loop.train(model, self.examples, self.settings, *place)
                trigger = self.dataset.settings.trigger_word
                flavour = self.checkpoint.flavour.key
                result.write(self.file, self.settings, flavour, self.examples.identity, trigger)
                with out_of_memory.told(*out_of_memory.CHECKING, self.settings, device):
                    selfcheck.check_file(model, self.file, result.adapters, device)
            return result
        finally:
            model = None
            _free()

    def _base(self, device: torch.device) -> VelocityModel:
        precision = self.settings.base_precision
        host.show_text("\n".join(filter(None, (self.advice, "loading the base model 正在加载基础模型"))))
        with out_of_memory.told(*out_of_memory.LOADING, self.settings, device):
            return base.load_base(self.checkpoint, precision, device, host.progress())

    def report(self, result: loop.Result) -> list[str]:
        """What was done and where it is, in both languages."""
        last = f", loss 损失 {result.losses[-1][1]:.4f}" if result.losses else ""
        held_out = f"held-out loss 留出损失 {result.held_out[-1][1]:.4f}" if result.held_out else ""
        kept = f"preservation loss 保留损失 {result.preservation[-1][1]:.4f}" if result.preservation else ""
        best = f"best at step 最佳步 {result.best_step}" if result.best_step else ""
        lines = [
            f"{result.step}/{self.settings.steps} steps 步{last}",
            ", ".join(filter(None, (held_out, best, kept))),
            self.examples.report,
            f"base 基础精度: {self.settings.base_precision}",
            f"memory, estimated 显存估计: {self._estimate()}",
            self.advice,
            f"file 文件: models/loras/{self.file.relative_to(host.write_folder('loras')).as_posix()}",
            f"states 状态: output/{training_request.shown(self.folder)}",
        ]
        return [line for line in lines if line]

    def _foresee(self, device: torch.device) -> None:
        """Say what the run will need; where that does not fit, what would."""
        logger.info("%s: memory 显存: %s", NODE, self._estimate())
        if device.type != "cpu":
            self.advice = estimate.fitting(*self._given(), comfy.model_management.get_free_memory(device))
            if self.advice:
                logger.warning("%s: %s", NODE, self.advice)

    def _estimate(self) -> str:
        return str(estimate.estimate(*self._given()))

    def _given(self) -> tuple[Mapping[str, Any], dict[str, torch.Size], TrainSettings, tuple[int, int], torch.device]:
        shapes, device = audited_shapes(self.checkpoint), comfy.model_management.get_torch_device()
        return self.checkpoint.configs["transformer"], shapes, self.settings, self.dataset.largest_size, device


def _free() -> None:
    """Nothing of ComfyUI's on the device, and nothing that is not needed any more."""
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def _say_stopped(step: int, steps: int, file: Path) -> None:
    host.show_text(
        f"stopped after step {step}/{steps}, saved as {file.name}; queue again to go on "
        f"已在第 {step}/{steps} 步停止并保存为 {file.name}；再次运行即可继续"
    )
    logger.info("%s stopped after step %d of %d; the LoRA so far is %s.", NODE, step, steps, file.name)


def _final_grid(
    model: comfy.model_patcher.ModelPatcher,
    trained: comfy.model_patcher.ModelPatcher,
    encoders: GraphEncoders,
    validation: Validation,
    item: Item,
) -> torch.Tensor:
    """The validation prompts without and with the LoRA, drawn by the very MODEL that goes out."""
    pixels = item.reference_pixels()
    image = None if pixels is None else (pixels.movedim(1, -1) + 1) / 2
    drawing = prompt_grid.Settings(validation.size, validation.steps, validation.guidance, True, "")
    variants = [prompt_grid.Variant("without LoRA", model), prompt_grid.Variant("with LoRA", trained)]
    seeds = [validation.seed]
    grid, _, _ = prompt_grid.draw(variants, encoders.clip, encoders.vae, validation.texts, seeds, drawing, image)
    return grid


def _begun(found: State | None, settings: TrainSettings) -> list[str]:
    if found is None:
        return ["from the first step 从头开始"]
    lines = [f"went on after step {found.step} 从第 {found.step} 步之后继续", resume.new_length(found, settings)]
    return [line for line in lines if line]
