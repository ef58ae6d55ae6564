"""Write an edit checkpoint in the official folder layout: the files of a LongCat-Tiny folder with other weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import LongCatImageEditPipeline
from safetensors import safe_open
from safetensors.torch import save_file

TURBO_SHIFT = 1.15  # of every size, as in LongCat-Image-Edit-Turbo
WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def load_edit_pipeline(folder: Path) -> LongCatImageEditPipeline:
    """The edit pipeline over any LongCat-Tiny folder, every network in fp32 on the CPU."""
    pipeline = LongCatImageEditPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _name_in_class(key: str) -> str:
    """A key of the stored text encoder, in whose file the parts have shorter names, as transformers' class has it."""
    if key.startswith("visual."):
        return f"model.{key}"
    if key.startswith("model.") and not key.startswith(("model.language_model.", "model.visual.")):
        return key.replace("model.", "model.language_model.", 1)
    return key


def _exchange(path: Path, source: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors of `source` to `path`, those in `weights` exchanged, in the file's own dtypes.

    Raises ValueError for weights that the file doesn't know.
    """
    with safe_open(source, "pt") as file:
        stored = {key: file.get_tensor(key).clone() for key in file.keys()}  # the file may be written to
        metadata = file.metadata()
    named = {_name_in_class(key): key for key in stored}
    if not weights.keys() <= named.keys():
        raise ValueError(f"expected weights of {source}, found also {sorted(weights.keys() - named.keys())[:5]}")
    for name, value in weights.items():
        key = named[name]
        stored[key] = value.detach().to("cpu", stored[key].dtype).contiguous()
    save_file(stored, path, metadata=metadata)
    path.chmod(0o644)


def export_edit(start: Path, folder: Path, average: Mapping[str, torch.Tensor], turbo: bool) -> None:
    """Write the files of `start` with other weights, named "transformer." or "text_encoder."; both may be one folder.

    A README.md is not copied, and stays where `folder` has one.
    """
    if folder.resolve() != start.resolve():
        shutil.copytree(start, folder, ignore=shutil.ignore_patterns("README.md"), dirs_exist_ok=True)
    for component, file in WEIGHTS.items():
        prefix = f"{component}."
        own = {name.removeprefix(prefix): value for name, value in average.items() if name.startswith(prefix)}
        _exchange(folder / file, start / file, own)
    _change_json(folder / "model_index.json", {"_class_name": LongCatImageEditPipeline.__name__})
    shifts = {"base_shift": TURBO_SHIFT if turbo else 0.5, "max_shift": TURBO_SHIFT}
    _change_json(folder / "scheduler" / "scheduler_config.json", shifts)


def _change_json(path: Path, values: Mapping[str, object]) -> None:
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**content, **values}, indent=2) + "\n", "utf-8")
