"""Which device the tier runs on."""

import os

import torch

# Flags of main.py that stand in for every test's own, to run the tests themselves dry on any machine (--cpu).
DRY_FLAGS = os.environ.get("LONGCAT_DEVICE_ARGS")


def missing() -> str | None:
    """What this tier needs and the machine lacks, None when all is there."""
    return None if torch.cuda.is_available() or DRY_FLAGS else "torch finds no CUDA device"


def device() -> torch.device:
    """Where the servers compute, and what they are compared with."""
    return torch.device("cpu" if DRY_FLAGS else "cuda")
