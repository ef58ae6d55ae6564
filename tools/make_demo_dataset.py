"""Write the demo dataset of zorbs: `python -m tools.make_demo_dataset` in the repository root."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tests.scoring import zorb

FOLDER = Path(__file__).resolve().parent.parent / "demo" / "datasets" / "zorb"


def main() -> None:
    """Draw all pictures anew."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, (picture, caption) in enumerate(zorb.training_pairs()):
        Image.fromarray(picture).save(FOLDER / f"{number:02}.png", optimize=True)
        (FOLDER / f"{number:02}.txt").write_text(caption + "\n", encoding="utf-8")
    print(FOLDER)


if __name__ == "__main__":
    main()
