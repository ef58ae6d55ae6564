"""Write the demo datasets of zorbs, and of pairs for an edit LoRA: `python -m tools.make_demo_dataset`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.scoring import zorb, zorb_edits

DATASETS = Path(__file__).resolve().parent.parent / "demo" / "datasets"
REFERENCES = "references"
PRESERVED = "preserved"


def save(picture: np.ndarray, folder: Path, number: int, caption: str = "") -> None:
    """Write one picture, and its caption if it has one."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(folder / f"{number:02}.png", optimize=True)
    if caption:
        (folder / f"{number:02}.txt").write_text(caption + "\n", encoding="utf-8")


def main() -> None:
    """Draw all pictures anew."""
    for number, (picture, caption) in enumerate(zorb.training_pairs()):
        save(picture, DATASETS / "zorb", number, caption)
    for number, task in enumerate(zorb_edits.training_tasks()):
        save(task.wanted(), DATASETS / "zorb_edit", number, task.instruction)
        save(task.picture(), DATASETS / "zorb_edit" / REFERENCES, number)
    for number, picture in enumerate(zorb_edits.preservation_pictures()):
        save(picture, DATASETS / "zorb_edit" / PRESERVED, number)
    print(DATASETS)


if __name__ == "__main__":
    main()
