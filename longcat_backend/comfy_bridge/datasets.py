"""Training datasets from ComfyUI's input folder, from folders that the owner listed, or from IMAGE batches."""

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import torch

from .. import labelled_grid
from ..errors import LongCatError
from ..training import contact_sheet, dataset, sources
from ..training.dataset import CountTokens, Dataset, DatasetSettings
from ..training.problems import listed
from . import clip as clip_bridge
from . import host

NODE = "LongCatDataset"
ROOTS_VARIABLE = "LONGCAT_DATASET_ROOTS"
MOST_LOGGED = 20

logger = logging.getLogger(__name__)


def roots() -> list[Path]:
    """Folders below which training pictures may lie: ComfyUI's input folder, the owner's, and the demo's."""
    listed = _listed_roots(os.environ.get(ROOTS_VARIABLE, ""))
    return [Path(folder_paths.get_input_directory()), *listed, host.PACK_ROOT / "demo" / "datasets"]


def check(settings: DatasetSettings, folders: Sequence[str]) -> None:
    """Refuse settings and folders that cannot work, before the graph runs.

    Raises:
        LongCatError: see :meth:`dataset.DatasetSettings.check` and :func:`sources.resolve_folder`.
    """
    settings.check()
    for name in folders:
        sources.resolve_folder(name, roots())


def fingerprint(folder: str, reference_folder: str) -> str:
    """A hash that changes when a file of the folders does.

    Raises:
        LongCatError: see :func:`sources.resolve_folder`.
    """
    return sources.fingerprint([sources.resolve_folder(name, roots()) for name in (folder, reference_folder) if name])


def from_folder(settings: DatasetSettings, clip: comfy.sd.CLIP | None) -> tuple[Dataset, torch.Tensor, str]:
    """The dataset of a folder, its contact sheet (1, height, width, 3) and its report.

    Raises:
        LongCatError: see :func:`dataset.read_folder` and :func:`clip.require_longcat`.
    """
    return _shown(dataset.read_folder(settings, roots(), _counter(clip), host.progress()))


def from_images(
    settings: DatasetSettings,
    images: torch.Tensor,
    captions: str,
    references: torch.Tensor | None,
    masks: torch.Tensor | None,
    clip: comfy.sd.CLIP | None,
) -> tuple[Dataset, torch.Tensor, str]:
    """The dataset of a batch (pictures, height, width, 3) in 0..1, kept in memory, its contact sheet and its report.

    Raises:
        LongCatError: see :func:`sources.from_batch`, :func:`dataset.build` and :func:`clip.require_longcat`.
    """
    _require_batch(images)
    found = sources.from_batch(images, captions, references, masks)
    return _shown(dataset.build(settings, found, (), _counter(clip), host.progress()))


def _shown(made: Dataset) -> tuple[Dataset, torch.Tensor, str]:
    sheet = labelled_grid.as_tensor(contact_sheet.draw(made))
    for line in listed(made.problems, MOST_LOGGED):
        logger.warning("%s: %s", NODE, line)
    return made, sheet, f"{made.report()}\n\n{contact_sheet.legend(made)}"


@functools.cache  # so that a wrong place is logged once
def _listed_roots(text: str) -> tuple[Path, ...]:
    places = [Path(place) for place in filter(None, text.split(os.pathsep))]
    for place in places:
        if not place.is_absolute() or not place.is_dir():
            logger.warning(
                "%s: '%s' in %s is no absolute path of a folder and is left out. 不是文件夹的绝对路径，已忽略。",
                NODE,
                place,
                ROOTS_VARIABLE,
            )
    return tuple(place for place in places if place.is_absolute())


def _counter(clip: comfy.sd.CLIP | None) -> CountTokens | None:
    """How many tokens a caption has, where there is a tokenizer at hand."""
    if clip is None:
        return None
    tokenizer = clip_bridge.require_longcat(clip, NODE).tokenizer
    return lambda caption: int(tokenizer.inspect(caption).total)


def _require_batch(images: Any) -> None:
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or not images.numel():
        found = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise LongCatError(
            f"{NODE} needs an IMAGE of shape (pictures, height, width, 3), but got {found}. Connect a batch of images, "
            "or set source to folder.",
            f"{NODE} 需要形状为 (张数, 高, 宽, 3) 的 IMAGE，但得到 {found}。请连接一批图像，或把来源设为 folder。",
        )
