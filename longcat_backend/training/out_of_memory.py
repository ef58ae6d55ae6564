"""A device that ran out of memory while a LoRA was trained, in words that say what to turn down."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import LongCatError
from ..memory import is_out_of_memory
from . import engine
from .settings import TrainSettings

# Times of a run that are not a step's.
LOADING = "while the base model was loaded", "加载基础模型时"
CHECKING = (
    "while the written LoRA was checked (the LoRA and the states are whole)",
    "检查写出的 LoRA 时；LoRA 和状态完好",
)


def advice(when: str, when_zh: str, settings: TrainSettings, error: Exception) -> LongCatError:
    """The error to be raised in the place of the device's own; ``when`` ends its first words."""
    return LongCatError(
        f"The device ran out of memory {when}: {error}. Turn down, in this order: checkpointing (is "
        f"'{settings.checkpointing}', 'block' needs least), modulation_table (is {settings.modulation_table}, on needs "
        f"3 GiB less beside a base that is not fp32), batch (is {settings.batch}), the base precision (is "
        f"'{settings.base_precision}', 'int8-quanto' and 'int4-quanto' need less) or, with bf16, offload ('block' "
        "needs least), the resolution of the dataset.",
        f"设备显存不足（{when_zh}）：{error}。请依次调低：梯度检查点（当前“{settings.checkpointing}”，“block”占用最少）、"
        f"modulation_table（当前 {settings.modulation_table}；基础精度不是 fp32 时，开启少用 3 GiB）、"
        f"batch（当前 {settings.batch}）、基础精度（当前“{settings.base_precision}”，“int8-quanto”、“int4-quanto”更少）"
        "或 bf16 下的 offload（“block”占用最少）、数据集分辨率。",
    )


@contextmanager
def told(when: str, when_zh: str, settings: TrainSettings, device: torch.device) -> Iterator[None]:
    """Raise :func:`advice` where what is done inside runs out of memory.

    Raises:
        LongCatError: it did.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        engine.free(device)
        raise advice(when, when_zh, settings, error) from error
