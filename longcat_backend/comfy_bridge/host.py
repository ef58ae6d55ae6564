"""What the pack asks of its host: a version, the folders where checkpoints may lie, and progress bars."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.utils
import comfyui_version
import folder_paths
from comfy_execution.utils import get_executing_context

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


def write_folder(kind: str) -> Path:
    """The folder of a kind of models that is written to: ComfyUI's own, unless the user's settings replace it."""
    places = [Path(place) for place in folder_paths.get_folder_paths(kind)]
    own = Path(folder_paths.models_dir) / kind
    return own if own in places else places[0]


def offload_folder() -> Path:
    """A new folder where weights may wait on disk: in ComfyUI's temp folder, which it empties when it starts."""
    temp = Path(folder_paths.get_temp_directory())
    temp.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="longcat_offload_", dir=temp))


def progress() -> Callable[[int, int], None]:
    """A callable (done, total) that shows progress on the running node, and ends it when the user interrupts."""
    bar = comfy.utils.ProgressBar(100)

    def show(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return show


def show_text(text: str) -> None:
    """Show a line of text on the running node; without a running node there is nothing to show it on."""
    context = get_executing_context()
    if context is not None:
        from server import PromptServer  # the server imports the nodes, so it is there only once they run

        PromptServer.instance.send_progress_text(text, context.node_id)
