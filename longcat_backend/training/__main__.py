"""python -m longcat_backend.training [validate] CONFIG.json: train a LoRA, or draw its validation pictures.

Run it in the pack's folder. CONFIG is what LongCatTrainLora exports, or SimpleTuner's config.json for this family.
Ctrl+C saves and ends; the same command goes on from there.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import LongCatError
from . import config, headless


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0 when it is done, 1 when it cannot go on, 130 when it was interrupted."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device(options.device or _device())
    try:
        given = config.read(options.config, options.models, options.data)
        if options.command == "validate":
            headless.validate(given, device)
            return 0
        return 130 if headless.train(given, device, _interrupted()).stopped else 0
    except LongCatError as error:
        logging.error("%s", error)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m longcat_backend.training", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("train", "validate"), default="train")
    parser.add_argument("config", type=Path)
    parser.add_argument("--device", help="such as cuda, mps or cpu (default: the GPU, if there is one)")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="folders that hold checkpoints")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="folders that hold datasets")
    return parser


def _device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _interrupted() -> Any:
    """Asks whether Ctrl+C was pressed; pressed twice, it ends at once."""
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        logging.warning("stopping after this step")

    signal.signal(signal.SIGINT, note)
    return lambda: bool(pressed)


if __name__ == "__main__":
    sys.exit(main())
