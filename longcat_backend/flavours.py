"""The LongCat-Image family: what each published checkpoint is for and how it is sampled."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXT_TO_IMAGE = "LongCatImagePipeline"
EDIT = "LongCatImageEditPipeline"
_OWNER = "meituan-longcat"


@dataclass(frozen=True)
class Flavour:
    """One published checkpoint and the sampling settings that its model card gives."""

    key: str
    repo_id: str
    pipeline: str
    steps: int
    guidance: float
    renorm: bool
    purpose_en: str
    purpose_zh: str
    # Shift of the noise levels of a picture of 256 and of 4096 tokens, as in the scheduler's config.
    base_shift: float = 0.5
    max_shift: float = 1.15
    # A commit of the repository; None for the newest at the first byte, which is written down and kept to.
    revision: str | None = None
    # 2 bytes for each of 6.3 + 8.3 billion parameters; a download tells the exact size before it begins.
    download_gb: int = 29

    @property
    def edits(self) -> bool:
        """Whether the checkpoint changes a given image instead of drawing from text alone."""
        return self.pipeline == EDIT

    @property
    def folder_name(self) -> str:
        """The folder that the checkpoint is downloaded into: the name of its repository."""
        return self.repo_id.rpartition("/")[2]


FLAVOURS = {
    flavour.key: flavour
    for flavour in (
        Flavour("final", f"{_OWNER}/LongCat-Image", TEXT_TO_IMAGE, 50, 4.5, True, "draws from text", "文本生成图像"),
        Flavour(
            "dev",
            f"{_OWNER}/LongCat-Image-Dev",
            TEXT_TO_IMAGE,
            50,
            4.5,
            True,
            "draws from text, from the middle of the training, for fine-tuning",
            "文本生成图像，训练中期的版本，用于微调",
        ),
        Flavour("edit", f"{_OWNER}/LongCat-Image-Edit", EDIT, 50, 4.5, False, "edits pictures", "按指令编辑图像"),
        Flavour(
            "edit-turbo",
            f"{_OWNER}/LongCat-Image-Edit-Turbo",
            EDIT,
            8,
            1.0,
            False,
            "edits pictures in 8 steps without guidance",
            "以 8 步、无引导编辑图像",
            base_shift=1.15,
        ),
    )
}


def folder_name(name: str) -> str:
    """The folder that a repository is downloaded into; any other name as it is."""
    return next((each.folder_name for each in FLAVOURS.values() if each.repo_id == name), name)


def identify(pipeline: str, folder_name: str, scheduler_config: Mapping[str, Any]) -> Flavour:
    """The flavour of an official folder.

    The pipeline class tells editing from drawing. Turbo is the only flavour whose scheduler has one
    shift for every size. final and dev have the same classes and shapes, so there the folder's name decides.
    """
    if pipeline == EDIT:
        fixed_shift = scheduler_config.get("base_shift") == scheduler_config.get("max_shift")
        return FLAVOURS["edit-turbo" if fixed_shift else "edit"]
    return FLAVOURS["dev" if "dev" in folder_name.lower().replace("_", "-").split("-") else "final"]
