"""A LoRA trained from the graph's MODEL, CLIP, VAE and dataset, and everything that the node gives back."""

import gc
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import folder_paths
import torch
from safetensors.torch import load_file

from .. import labelled_grid, lora_files, loss_chart, precision, quantisation, saving
from ..checkpoints import Checkpoint
from ..errors import LongCatError
from ..sampler import Prompt
from ..training import encoded, loop, state
from ..training.dataset import Dataset, Item
from ..training.encoded import EncodedDataset
from ..training.settings import BASE_PRECISIONS, TrainSettings
from ..transformer import VelocityModel, load_transformer
from . import devices, formats, host, lora, prompt_grid
from .training_encoders import GraphEncoders
from .training_previews import Monitor, Validation

NODE = "LongCatTrainLora"
FOLDER = "longcat_training"
CACHE = "cache"
RUNS = "runs"
CONFIG = "config.json"
# How many captions of the dataset are drawn where the user gives no prompt.
_OWN_PROMPTS = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What the node was told.

    Attributes:
        name: of the LoRA in models/loras, "/" for subfolders, and of the run.
        prompts: validation prompts, one a line; empty takes captions of the dataset.
        validation_steps, validation_guidance, validation_seed: how they are drawn.
        start_over: delete an earlier run of this name instead of going on with it.
    """

    name: str
    settings: TrainSettings
    prompts: str = ""
    validation_steps: int = 30
    validation_guidance: float = 4.5
    validation_seed: int = 0
    start_over: bool = False

    @property
    def file(self) -> Path:
        """The LoRA's file.

        Raises:
            LongCatError: see :func:`saving.check_name`.
        """
        relative = saving.check_name(self.name.removesuffix(lora_files.SUFFIX))
        return host.write_folder("loras") / relative.with_name(relative.name + lora_files.SUFFIX)

    @property
    def run_folder(self) -> Path:
        """States, validation pictures and the config of the run.

        Raises:
            LongCatError: see :func:`saving.check_name`.
        """
        return work_folder() / RUNS / saving.check_name(self.name.removesuffix(lora_files.SUFFIX))


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


def work_folder() -> Path:
    """Where everything but the LoRA itself is written: in ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory()) / FOLDER


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
        LongCatError: MODEL, CLIP or VAE are not LongCatLoader's; the dataset is for another task; a file of that name
            is there and no run of it; or see :func:`loop.train`.
    """
    checkpoint = _require_checkpoint(model)
    _require_task(checkpoint, dataset)
    settings = request.settings
    file, folder = _prepare_places(request)
    encoders = GraphEncoders(clip, vae, NODE)
    begun = state.steps(folder)
    examples, validation = _encode(dataset, encoders, request, checkpoint)
    config = export(checkpoint, dataset, request)
    _keep_config(folder, config)
    monitor = Monitor(folder, settings.steps, validation)
    result = _run(checkpoint, examples, settings, folder, monitor)
    lora_files.write(
        file, result.adapters, _provenance(checkpoint, settings, examples, result.step), trigger_words=_trigger(dataset)
    )
    if monitor.stopped:
        _say_stopped(result.step, settings.steps, file)
        raise comfy.model_management.InterruptProcessingException
    written = lora_files.read(file).adapters
    trained, matched = lora.apply(model, written, 1.0)
    assert model is not None
    grid = _final_grid(model, trained, encoders, validation, _shown_item(dataset))
    chart = labelled_grid.as_tensor(loss_chart.draw(result.losses, result.held_out, settings.steps))
    report = _report(begun, result, settings, file, folder, examples, matched)
    return Trained(trained, load_file(file), file, chart, grid, config, report)


def base_precision(name: str) -> str:
    """The precision of the frozen base; "auto" is what the device computes in best, of those that training has.

    Raises:
        LongCatError: the device does not have it.
    """
    policy = devices.policy()
    if name == precision.AUTO:
        return "bf16" if policy.compute_dtype("transformer") is torch.bfloat16 else "fp32"
    policy.require(precision.preset(name, BASE_PRECISIONS), BASE_PRECISIONS, weight_only=False)
    return name


def export(checkpoint: Checkpoint, dataset: Dataset, request: Request) -> str:
    """The run as JSON, for ``python -m longcat_backend.training``."""
    validation = {
        "prompts": _texts(dataset, request),
        "steps": request.validation_steps,
        "guidance": request.validation_guidance,
        "seed": request.validation_seed,
    }
    values = {
        "name": request.name,
        "checkpoint": _name_of(checkpoint),
        "dataset": dataset.settings.to_json(),
        "settings": request.settings.to_json(),
        "validation": validation,
    }
    return json.dumps(values, ensure_ascii=False, indent=2)


def _name_of(checkpoint: Checkpoint) -> str:
    folder = getattr(checkpoint, "folder", None)
    return folder.name if isinstance(folder, Path) else checkpoint.flavour.repo_id


def _require_checkpoint(model: comfy.model_patcher.ModelPatcher | None) -> Checkpoint:
    """What the MODEL was loaded from: the base is read from there once more."""
    formats.scheduler_config(model)  # refuses what is no LongCat-Image
    checkpoint = None if model is None else formats.source(model)
    if checkpoint is None:
        raise LongCatError(
            f"{NODE} reads the base model from its checkpoint, but it is not known where this MODEL was loaded from. "
            "Connect the MODEL of LongCatLoader.",
            f"{NODE} 需要从检查点重新读取基础模型，但无法得知该 MODEL 的来源。请连接 LongCatLoader 的 MODEL。",
        )
    return checkpoint


def _require_task(checkpoint: Checkpoint, dataset: Dataset) -> None:
    key = checkpoint.flavour.key
    if dataset.edits and not checkpoint.flavour.edits:
        raise LongCatError(
            f"The dataset has pictures before and after an edit, but the checkpoint is LongCat-Image {key}, which "
            "draws from text. Choose LongCat-Image-Edit in LongCatLoader, or leave out the reference pictures.",
            f"数据集包含编辑前后的图像，但检查点是用于文生图的 LongCat-Image {key}。"
            "请在 LongCatLoader 中选择 LongCat-Image-Edit，或去掉参考图像。",
        )
    if checkpoint.flavour.edits and not dataset.edits:
        raise LongCatError(
            f"The checkpoint is LongCat-Image {key}, which edits pictures, but the dataset has no pictures before the "
            "edit. Give LongCatDataset a reference_folder, or choose LongCat-Image in LongCatLoader.",
            f"检查点是用于编辑的 LongCat-Image {key}，但数据集没有编辑前的图像。"
            "请为 LongCatDataset 设置 reference_folder，或在 LongCatLoader 中选择 LongCat-Image。",
        )


def _prepare_places(request: Request) -> tuple[Path, Path]:
    """The LoRA's file and the run folder, which is there afterwards."""
    file, folder = request.file, request.run_folder
    try:
        if request.start_over and folder.exists():
            shutil.rmtree(folder)
        if file.exists() and not request.start_over and not state.steps(folder):
            raise LongCatError(
                f"There is a LoRA '{request.name}' in models/loras already, and no run that made it. Choose another "
                "name, or set if_begun to start over to replace it.",
                f"models/loras 中已有 LoRA“{request.name}”，但没有对应的训练记录。"
                "请换一个名称，或把 if_begun 设为 start over 以替换它。",
            )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return file, folder


def _keep_config(folder: Path, config: str) -> None:
    try:
        (folder / CONFIG).write_text(config, encoding="utf-8")
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> LongCatError:
    place = f"{FOLDER}/{RUNS}/{folder.name}"
    return LongCatError(
        f"The run folder '{place}' in ComfyUI's output folder cannot be written: {error.strerror}. Make room on the "
        "disk, or make the folder writable.",
        f"无法写入 ComfyUI 输出文件夹中的“{place}”：{error.strerror}。请清理磁盘空间，或使该文件夹可写。",
    )


def _encode(
    dataset: Dataset, encoders: GraphEncoders, request: Request, checkpoint: Checkpoint
) -> tuple[EncodedDataset, Validation]:
    """Everything that CLIP and VAE have to do, before they leave the device."""
    bar = host.progress()

    def progress(done: int, total: int) -> None:
        host.show_text(f"encoding 编码 {done}/{total}")
        bar(done, total)

    examples = encoded.encode(dataset, encoders, work_folder() / CACHE, progress)
    item = _shown_item(dataset)
    pixels = item.reference_pixels()
    reference = None if pixels is None else encoders.latents(pixels)[0].cpu()
    empty = encoders.text("", pixels).cpu()
    texts = _texts(dataset, request)
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


def _texts(dataset: Dataset, request: Request) -> Sequence[str]:
    """The validation prompts: the user's, or captions of the dataset."""
    if request.prompts.strip():
        return prompt_grid.prompt_lines(request.prompts)
    if dataset.edits:
        return [_shown_item(dataset).caption]
    indices = [*dataset.held_out, *range(len(dataset.items))]
    return list(dict.fromkeys(dataset.items[index].caption for index in indices))[:_OWN_PROMPTS]


def _shown_item(dataset: Dataset) -> Item:
    """The item whose size, and whose picture before the edit, validation takes: one that is not trained on if any."""
    return dataset.items[dataset.held_out[0] if dataset.held_out else 0]


def _run(
    checkpoint: Checkpoint, examples: EncodedDataset, settings: TrainSettings, folder: Path, monitor: Monitor
) -> loop.Result:
    """Load the base afresh, train, and give its memory back, whatever happens."""
    device = comfy.model_management.get_torch_device()
    base: VelocityModel | None = None
    _free()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            base = _load_base(checkpoint, settings, device)
            scheduler = checkpoint.configs["scheduler"]
            return loop.train(base, examples, settings, folder, monitor.events(), device, scheduler)
    finally:
        base = None
        _free()


def _load_base(checkpoint: Checkpoint, settings: TrainSettings, device: torch.device) -> VelocityModel:
    host.show_text("loading the base model 正在加载基础模型")
    preset = precision.PRESETS[settings.base_precision]
    base = load_transformer(checkpoint, preset.dtype or devices.policy().compute_dtype("transformer"))
    if preset.backend:
        quantisation.quantise(base.transformer, "transformer", preset, device, host.progress())
    return base


def _free() -> None:
    """Nothing of ComfyUI's on the device, and nothing that is not needed any more."""
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def _provenance(checkpoint: Checkpoint, settings: TrainSettings, examples: EncodedDataset, step: int) -> dict[str, Any]:
    """What the file's header tells about how it was made."""
    return {
        **settings.to_json(),
        "model_flavour": checkpoint.flavour.key,
        "steps_done": step,
        "dataset": examples.identity,
    }


def _trigger(dataset: Dataset) -> list[str]:
    word = dataset.settings.trigger_word.strip()
    return [word] if word else []


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


def _report(
    begun: Sequence[int],
    result: loop.Result,
    settings: TrainSettings,
    file: Path,
    folder: Path,
    examples: EncodedDataset,
    matched: str,
) -> str:
    start = f"went on after step {begun[-1]} 从第 {begun[-1]} 步之后继续" if begun else "from the first step 从头开始"
    last = f", loss 损失 {result.losses[-1][1]:.4f}" if result.losses else ""
    held_out = f"held-out loss 留出损失 {result.held_out[-1][1]:.4f}" if result.held_out else ""
    best = f"best at step 最佳步 {result.best_step}" if result.best_step else ""
    lines = [
        f"{start}; {result.step}/{settings.steps} steps 步{last}",
        ", ".join(filter(None, (held_out, best))),
        examples.report,
        f"base 基础精度: {settings.base_precision}",
        f"file 文件: models/loras/{file.name}",
        f"states 状态: output/{FOLDER}/{RUNS}/{folder.name}",
        f"self-test 自检: {matched}",
    ]
    return "\n".join(filter(None, lines))
