"""python -m longcat_backend.training [validate] CONFIG.json: train a LoRA, or draw its validation pictures.

Run it in the pack's folder. CONFIG is what LongCatTrainLora exports, or SimpleTuner's config.json for this family.
Ctrl+C and SIGTERM save and end; the same command goes on from there.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

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
        with _interruptible() as should_stop:
            return 130 if headless.train(given, device, should_stop).stopped else 0
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


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Asks whether to stop: after Ctrl+C, which ends at once the second time, or SIGTERM, however often it comes."""
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        logging.warning("stopping after this step")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
