"""Which checkpoints there are: official folders, and single files in ComfyUI's own model folders."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import comfy.text_encoders.qwen_image
import folder_paths

from .. import checkpoints, single_files
from ..checkpoints import Checkpoint
from ..errors import LongCatError
from . import host

AUTO = "auto"
KINDS = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
SUFFIX = ".safetensors"
# Names of transformers start with this; a file of another name is not offered.
LISTED = "longcat"
# Names of the published files that "auto" looks for.
_PUBLISHED = {"text_encoder": "qwen_2.5_vl_7b", "vae": "ae"}
_INPUTS = {"text_encoder": "text_encoder_file", "vae": "vae_file"}


@dataclass(frozen=True)
class Place:
    """Where a checkpoint lies: a folder, or the files of its parts."""

    folder: Path | None = None
    files: tuple[tuple[str, Path], ...] = ()

    def open(self) -> Checkpoint:
        """Read configs and headers.

        Raises:
            LongCatError: see :func:`checkpoints.open_checkpoint` and :func:`single_files.open_single_files`.
        """
        if self.folder is not None:
            return checkpoints.open_checkpoint(self.folder)
        return single_files.open_single_files(dict(self.files), tokenizer_folder())

    def fingerprint(self) -> str:
        """A hash that changes when a file of the checkpoint does."""
        if self.folder is not None:
            return checkpoints.fingerprint(self.folder)
        return single_files.fingerprint(dict(self.files))


def names() -> list[str]:
    """Every checkpoint that can be chosen, folders first."""
    folders = checkpoints.list_checkpoints(host.checkpoint_roots())
    return [*sorted(folders), *sorted(name for name in listed("transformer") if name not in folders)]


def listed(part: str) -> dict[str, str]:
    """The files of ComfyUI's folder for a part, by their names with '/', to ComfyUI's own names for them."""
    own = folder_paths.get_filename_list(KINDS[part])
    found = {name.replace("\\", "/"): name for name in own if name.lower().endswith(SUFFIX)}
    if part != "transformer":
        return found
    return {name: own for name, own in found.items() if PurePosixPath(name).name.lower().startswith(LISTED)}


def choices(part: str) -> list[str]:
    """What can be chosen for the text encoder or the VAE of single files."""
    return [AUTO, *sorted(listed(part))]


def find(name: str, text_encoder_file: str = AUTO, vae_file: str = AUTO) -> Place:
    """Where the checkpoint of a name from a graph lies.

    Raises:
        LongCatError: there is no such folder or file, or "auto" finds no file for a part, or several.
    """
    normal = str(name).replace("\\", "/")
    if not normal.lower().endswith(SUFFIX) or normal not in listed("transformer"):
        return Place(folder=checkpoints.resolve_checkpoint(name, host.checkpoint_roots()))
    chosen = {"text_encoder": text_encoder_file, "vae": vae_file}
    paths = {part: _path(part, _choose(part, normal, str(choice))) for part, choice in chosen.items()}
    return Place(files=(("transformer", _path("transformer", normal)), *paths.items()))


def companion(transformer: str, part: str) -> str:
    """The name under which LongCatSaveCheckpoint puts the other parts of a transformer's file."""
    stem = transformer[: -len(SUFFIX)] if transformer.lower().endswith(SUFFIX) else transformer
    return stem + {"transformer": "", "text_encoder": "_text_encoder", "vae": "_vae"}[part] + SUFFIX


def tokenizer_folder() -> Path:
    """ComfyUI's own copy of the tokenizer of Qwen2.5."""
    return Path(comfy.text_encoders.qwen_image.__file__).parent / "qwen25_tokenizer"


def _choose(part: str, transformer: str, choice: str) -> str:
    """The name of a part's file: the one chosen; for "auto" the transformer's own, else the one published file."""
    there = listed(part)
    if choice != AUTO:
        normal = choice.replace("\\", "/")
        if normal in there:
            return normal
        raise _no_file(part, f"there is no '{choice}'", f"没有“{choice}”", there)
    own = companion(transformer, part)
    if own in there:
        return own
    fitting = [name for name in there if PurePosixPath(name).name.lower().startswith(_PUBLISHED[part])]
    if len(fitting) == 1:
        return fitting[0]
    wanted = f"{_PUBLISHED[part]}*{SUFFIX}"
    if fitting:
        raise _no_file(part, f"{len(fitting)} files fit {wanted}", f"有 {len(fitting)} 个文件符合 {wanted}", fitting)
    raise _no_file(part, f"no file is called {own} or {wanted}", f"没有名为 {own} 或 {wanted} 的文件", there)


def _path(part: str, name: str) -> Path:
    own = listed(part).get(name)
    path = None if own is None else folder_paths.get_full_path(KINDS[part], own)
    if path is None:
        raise _no_file(part, f"'{name}' is gone", f"“{name}”已不存在", listed(part))
    return Path(path)


def _no_file(part: str, en: str, zh: str, there: Mapping[str, str] | list[str]) -> LongCatError:
    found = ", ".join(sorted(there)) or "-"
    folder, name = KINDS[part], _INPUTS.get(part, "checkpoint")
    return LongCatError(
        f"The {part.replace('_', ' ')} is not clear: {en} in models/{folder}. Choose one in {name} of LongCatLoader, "
        f"or put it there. Found: {found}.",
        f"无法确定 {part}：models/{folder} 中{zh}。请在 LongCatLoader 的 {name} 中选择，或将文件放到该处。"
        f"现有：{found}。",
    )
