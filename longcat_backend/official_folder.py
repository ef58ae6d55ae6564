"""What an official folder holds beside the weights: its index, configs, tokenizer and the processor's files."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoints import Checkpoint, FolderCheckpoint, marked

WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
_CLASSES = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "text_processor": ["transformers", "Qwen2VLProcessor"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "LongCatImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_CONFIG_NAMES = {"scheduler": "scheduler_config.json"}
_SMALL = (".json", ".txt", ".jinja", ".model")
_INDEX = ".index.json"


def write_rest(
    folder: Path, sources: Mapping[str, Checkpoint], tokenizer: Mapping[str, str], presets: Mapping[str, str]
) -> bool:
    """Write everything but the weights.

    Args:
        sources: for each part with weights the checkpoint that it comes from; small files of its folder are copied
            as they are.
        tokenizer: its files' texts by their names, used where the source of the text encoder has no folder.
        presets: for each part whose weights will be quantised the name of its preset.

    Returns:
        Whether the processor for pictures, which is not loaded, could be copied, so that the folder is complete.

    Raises:
        OSError: a file cannot be written.
    """
    for part in (*WEIGHTS, "scheduler"):
        source = sources["transformer" if part == "scheduler" else part]
        _copy_small(source, part, folder)
        config = marked(source.configs[part], presets[part]) if part in presets else source.configs[part]
        _write_json(folder / part / _CONFIG_NAMES.get(part, "config.json"), config)
    if not _copy_small(sources["text_encoder"], "tokenizer", folder):
        for name, text in tokenizer.items():
            (folder / "tokenizer" / name).write_text(text, encoding="utf-8", newline="")
    complete = _copy_small(sources["text_encoder"], "text_processor", folder)
    parts = [part for part in _CLASSES if complete or part != "text_processor"]
    pipeline = sources["transformer"].flavour.pipeline
    _write_json(folder / "model_index.json", {"_class_name": pipeline, **{part: _CLASSES[part] for part in parts}})
    return complete


def _copy_small(source: Checkpoint, part: str, folder: Path) -> bool:
    """Copy a part's files but its weights and their index; whether there were any."""
    (folder / part).mkdir(parents=True, exist_ok=True)
    there = source.folder / part if isinstance(source, FolderCheckpoint) else None
    names = sorted(there.iterdir()) if there is not None and there.is_dir() else []
    copied = [path for path in names if path.is_file() and path.suffix in _SMALL and not path.name.endswith(_INDEX)]
    for path in copied:
        shutil.copyfile(path, folder / part / path.name)
    if not copied and part == "text_processor":
        (folder / part).rmdir()
    return bool(copied)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
