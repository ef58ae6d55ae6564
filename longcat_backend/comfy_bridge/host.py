"""What the pack asks of its host: a version, and the folders where checkpoints may lie."""

import re
from pathlib import Path

import comfyui_version
import folder_paths

from ..errors import LongCatError

OLDEST_HOST = (0, 30, 0)
MODEL_FOLDER = "longcat_image"
PACK_ROOT = Path(__file__).resolve().parents[2]


def require_host() -> None:
    """Refuse a ComfyUI that lacks what the nodes need.

    Raises:
        LongCatError: the host is older than the oldest version the pack was tested with.
    """
    found = comfyui_version.__version__
    numbers = [int(part) for part in re.findall(r"\d+", found)[:3]]
    if (*numbers, 0, 0, 0)[:3] < OLDEST_HOST:
        oldest = ".".join(map(str, OLDEST_HOST))
        raise LongCatError(
            f"LongCat-Image needs ComfyUI {oldest} or later, this is {found}. Update ComfyUI, then start it again.",
            f"LongCat-Image 需要 ComfyUI {oldest} 或更高版本，当前为 {found}。请更新 ComfyUI 后重新启动。",
        )


def register_model_folder() -> None:
    """Give checkpoints a folder of their own, ``models/longcat_image``, that extra_model_paths.yaml can extend."""
    folder_paths.add_model_folder_path(MODEL_FOLDER, str(Path(folder_paths.models_dir) / MODEL_FOLDER))


def checkpoint_roots() -> list[Path]:
    """Folders below which checkpoints are looked for: the user's, then the bundled demo checkpoints."""
    keys = (MODEL_FOLDER, "diffusers")
    return [Path(root) for key in keys for root in folder_paths.get_folder_paths(key)] + [PACK_ROOT / "demo"]
