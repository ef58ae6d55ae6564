"""Edit checkpoints of any name: LongCat-Tiny in the layout of the edit pipeline, its vision tower untrained."""

import json
import shutil
from pathlib import Path


def make(demo: Path, target: Path) -> Path:
    """Copy the text-to-image demo to ``target`` as an official folder of LongCatImageEditPipeline."""
    shutil.copytree(demo, target)
    index = target / "model_index.json"
    content = json.loads(index.read_text("utf-8"))
    index.write_text(json.dumps({**content, "_class_name": "LongCatImageEditPipeline"}), "utf-8")
    return target
