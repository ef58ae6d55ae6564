"""What LongCatTrainLora was told: names and folders of a run, its checks before it begins, and its JSON."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.model_patcher
import folder_paths
import torch

from .. import lora_files, precision, saving
from ..checkpoints import Checkpoint, FolderCheckpoint
from ..errors import LongCatError
from ..training import state
from ..training.dataset import Dataset, Item
from ..training.settings import BASE_PRECISIONS, TrainSettings
from . import devices, formats, host, prompt_grid

NODE = "LongCatTrainLora"
FOLDER = "longcat_training"
RUNS = "runs"
CONFIG = "config.json"
# How many captions of the dataset are drawn where the user gives no prompt.
_OWN_PROMPTS = 2


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


def work_folder() -> Path:
    """Where everything but the LoRA itself is written: in ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory()) / FOLDER


def shown(run_folder: Path) -> str:
    """A run's folder as seen from ComfyUI's output folder."""
    return f"{FOLDER}/{run_folder.relative_to(work_folder()).as_posix()}"


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
        "prompts": validation_texts(dataset, request),
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
    return checkpoint.folder.name if isinstance(checkpoint, FolderCheckpoint) else checkpoint.flavour.repo_id


def require_checkpoint(model: comfy.model_patcher.ModelPatcher | None) -> Checkpoint:
    """What the MODEL was loaded from: the base is read from there once more.

    Raises:
        LongCatError: the MODEL is no LongCat-Image, or core's own loader brought it.
    """
    formats.scheduler_config(model)  # refuses what is no LongCat-Image
    checkpoint = None if model is None else formats.source(model)
    if checkpoint is None:
        raise LongCatError(
            f"{NODE} reads the base model from its checkpoint, but it is not known where this MODEL was loaded from. "
            "Connect the MODEL of LongCatLoader.",
            f"{NODE} 需要从检查点重新读取基础模型，但无法得知该 MODEL 的来源。请连接 LongCatLoader 的 MODEL。",
        )
    return checkpoint


def require_task(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Refuse pictures with references for a checkpoint that draws from text, and the other way around.

    Raises:
        LongCatError: dataset and checkpoint do not fit.
    """
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


def prepare_places(request: Request) -> tuple[Path, Path]:
    """The LoRA's file and the run folder, which is there afterwards.

    Raises:
        LongCatError: a LoRA of that name is there and no run that made it, or nothing can be written.
    """
    file, folder = request.file, request.run_folder
    saving.require_writable(file, saving.LORA)
    try:
        if file.exists() and not request.start_over and not state.steps(folder):
            raise LongCatError(
                f"There is a LoRA '{request.name}' in models/loras already, and no run that made it. Choose another "
                "name, or set if_begun to start over to replace it.",
                f"models/loras 中已有 LoRA“{request.name}”，但没有对应的训练记录。"
                "请换一个名称，或把 if_begun 设为 start over 以替换它。",
            )
        saving.probe(folder / CONFIG)
        if request.start_over and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return file, folder


def keep_config(folder: Path, config: str) -> None:
    """Write a run's JSON into its folder.

    Raises:
        LongCatError: it cannot be written.
    """
    try:
        (folder / CONFIG).write_text(config, encoding="utf-8")
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> LongCatError:
    place = shown(folder)
    return LongCatError(
        f"The run folder '{place}' in ComfyUI's output folder cannot be written: {error.strerror}. Make room on the "
        "disk, or make the folder writable.",
        f"无法写入 ComfyUI 输出文件夹中的“{place}”：{error.strerror}。请清理磁盘空间，或使该文件夹可写。",
    )


def validation_texts(dataset: Dataset, request: Request) -> Sequence[str]:
    """The validation prompts: the user's, or captions of the dataset."""
    if request.prompts.strip():
        return prompt_grid.prompt_lines(request.prompts)
    if dataset.edits:
        return [shown_item(dataset).caption]
    indices = [*dataset.held_out, *range(len(dataset.items))]
    return list(dict.fromkeys(dataset.items[index].caption for index in indices))[:_OWN_PROMPTS]


def shown_item(dataset: Dataset) -> Item:
    """The item whose size, and whose picture before the edit, validation takes: one that is not trained on if any."""
    return dataset.items[dataset.held_out[0] if dataset.held_out else 0]
