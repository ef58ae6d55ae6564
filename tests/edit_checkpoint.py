"""Edit checkpoints for parity: LongCat-Tiny under the name of the edit pipeline, its vision tower untrained."""

import json
import shutil
from pathlib import Path


def make(demo: Path, target: Path, turbo: bool = False) -> Path:
    """Copy the text-to-image demo to ``target`` as an official folder of LongCatImageEditPipeline.

    Args:
        turbo: with the scheduler config that the turbo flavour is known by.
    """
    shutil.copytree(demo, target)
    _set(target / "model_index.json", "_class_name", "LongCatImageEditPipeline")
    if turbo:
        _set(target / "scheduler" / "scheduler_config.json", "base_shift", 1.15)
    return target


def _set(path: Path, key: str, value: object) -> None:
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**content, key: value}), "utf-8")
