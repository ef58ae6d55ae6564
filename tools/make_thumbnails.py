"""Draw the thumbnails of the bundled workflows: `python -m tools.make_thumbnails [NAME ...]` in the repository root.

Runs the API twin of every workflow in a ComfyUI of its own (COMFYUI_PATH, or the tree that `run.py` keeps)
and writes workflows/<name>.jpg from the picture; in the order of their names, since lora_use draws with what
lora_train makes. Needs the environment that `run.py` makes.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image

from .environment import cache_dir, cached_host, users_comfy
from .host import ComfyServer, device_arguments
from .workflow import load_workflow

ROOT = Path(__file__).resolve().parent.parent
SIDE = 512
QUALITY = 90


def thumbnail(picture: bytes) -> Image.Image:
    """The picture in RGB with its shorter side at 512 pixels, without metadata."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    scale = SIDE / min(image.size)
    sized = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
    sized.info.clear()
    return sized


def main() -> None:
    """Draw one thumbnail per workflow, or those of the workflows that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    every = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(every))
    names = parser.parse_args().names or every
    comfy = users_comfy() or cached_host(cache_dir())
    with (
        tempfile.TemporaryDirectory() as base,
        ComfyServer(comfy, Path(base), ROOT, args=device_arguments()) as server,
    ):
        for name in names:
            result = server.run(load_workflow(ROOT / "tests" / "api" / f"{name}.json"))
            target = ROOT / "workflows" / f"{name}.jpg"
            picture = next(each for each in result.images if each["type"] == "output")
            thumbnail(server.view(picture)).save(target, quality=QUALITY)
            print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
