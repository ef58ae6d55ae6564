"""How the frozen model computes during training: where it lies, what is recomputed, and with which attention.

Nothing here changes what is computed (DESIGN.md D5): the transformer's own hooks are used, its forward stays as it is.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from .compiled import CompiledBlocks
from .offload import apply_offload, groups, recomputing
from .settings import TrainSettings

BACKEND = "inductor"  # of compiled blocks
# The part of what compiled blocks would keep for the backward pass that they may keep, by ``settings.CHECKPOINTING``.
_BUDGETS = {"none": 1.0, "every-second": 0.5, "block": 0.0}
log = logging.getLogger(__name__)


def place(transformer: nn.Module, settings: TrainSettings, device: torch.device, folder: Path) -> None:
    """Move the model to the device, or hook it so that its groups are there while they compute.

    Args:
        folder: an empty one for files of the offload.

    Raises:
        LongCatError: see :meth:`memory.GroupOffload.apply`.
    """
    offload = settings.group_offload()
    if offload is None:
        transformer.to(device)
    else:
        if settings.checkpointing != "block":
            log.warning(
                "Blocks that are not computed again keep their weights on the device until the backward pass: with "
                "offload, set checkpointing to 'block'. 未重计算的块会让权重留在设备上直到反向传播；使用 offload 时"
                "请把梯度检查点设为“block”。"
            )
        transformer.to("cpu")
        apply_offload(transformer, offload, device, folder)


def set_checkpointing(transformer: Any, mode: str) -> None:
    """Recompute no block, every block or every second one in the backward pass instead of keeping what it computed.

    Args:
        mode: one of ``settings.CHECKPOINTING``.
    """
    if mode == "none":
        transformer.disable_gradient_checkpointing()
        return
    transformer.enable_gradient_checkpointing(_Recomputed(transformer))
    for switches in (transformer.use_checkpoint, transformer.use_single_checkpoint):
        switches[:] = [mode == "block" or index % 2 == 0 for index in range(len(switches))]


class _Recomputed:
    """Calls a block so that it is computed again in the backward pass, and lets an offload know when it is."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.offloaded = any(True for _ in groups(transformer))

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        # Nothing in a block is random. One that is moved has to be computed to its end, where it is moved away again.
        compute = self._moved(block) if self.offloaded else block
        with set_checkpoint_early_stop(not self.offloaded):
            return checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False)

    def _moved(self, block: nn.Module) -> Callable[..., Any]:
        calls = count()

        def compute(*inputs: Any) -> Any:
            with recomputing(self.transformer, block) if next(calls) else nullcontext():
                return block(*inputs)

        return compute


def recompute(transformer: Any, settings: TrainSettings) -> None:
    """Have the blocks keep for the backward pass what the settings let them keep, compiled where they ask for that."""
    if not settings.compile:
        set_checkpointing(transformer, settings.checkpointing)
        return
    compiled = CompiledBlocks(transformer, _BUDGETS[settings.checkpointing], BACKEND)
    transformer.enable_gradient_checkpointing(compiled)
    for switches in (transformer.use_checkpoint, transformer.use_single_checkpoint):
        switches[:] = [True] * len(switches)


def attention(device: torch.device) -> AbstractContextManager[None]:
    """Kernels whose backward pass works: on CUDA that of cuDNN fails at these shapes (DESIGN.md trap 12)."""
    if device.type != "cuda":
        return nullcontext()
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    context: AbstractContextManager[None] = sdpa_kernel(kernels)
    return context


def free(device: torch.device) -> None:
    """Give cached memory of the device back."""
    release: dict[str, Callable[[], None]] = {"cuda": torch.cuda.empty_cache, "mps": torch.mps.empty_cache}
    release.get(device.type, lambda: None)()
