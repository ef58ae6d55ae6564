"""The LongCat-Image family: what each published checkpoint is for and how it is sampled."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXT_TO_IMAGE = "LongCatImagePipeline"
EDIT = "LongCatImageEditPipeline"


@dataclass(frozen=True)
class Flavour:
    """One published checkpoint and the sampling settings that its model card gives."""

    key: str
    repo_id: str
    pipeline: str
    steps: int
    guidance: float
    renorm: bool

    @property
    def edits(self) -> bool:
        """Whether the checkpoint changes a given image instead of drawing from text alone."""
        return self.pipeline == EDIT


FLAVOURS = {
    flavour.key: flavour
    for flavour in (
        Flavour("final", "meituan-longcat/LongCat-Image", TEXT_TO_IMAGE, 50, 4.5, True),
        Flavour("dev", "meituan-longcat/LongCat-Image-Dev", TEXT_TO_IMAGE, 50, 4.5, True),
        Flavour("edit", "meituan-longcat/LongCat-Image-Edit", EDIT, 50, 4.5, False),
        Flavour("edit-turbo", "meituan-longcat/LongCat-Image-Edit-Turbo", EDIT, 8, 1.0, False),
    )
}


def identify(pipeline: str, folder_name: str, scheduler_config: Mapping[str, Any]) -> Flavour:
    """The flavour of an official folder.

    The pipeline class tells editing from drawing. Turbo is the only flavour whose scheduler has one
    shift for every size. final and dev have the same classes and shapes, so there the folder's name decides.
    """
    if pipeline == EDIT:
        fixed_shift = scheduler_config.get("base_shift") == scheduler_config.get("max_shift")
        return FLAVOURS["edit-turbo" if fixed_shift else "edit"]
    return FLAVOURS["dev" if "dev" in folder_name.lower().replace("_", "-").split("-") else "final"]
