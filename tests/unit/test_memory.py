"""Weights in bytes, what auto takes, and group offload's settings."""

from pathlib import Path

import pytest
import torch
from torch import nn

from longcat_pack.longcat_backend import memory
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.memory import GIB, HOST_RESERVE, GroupOffload
from longcat_pack.longcat_backend.precision import PRESETS

SHAPES = {
    "transformer_blocks.0.attn.to_q.weight": torch.Size([8, 8]),
    "transformer_blocks.0.attn.to_q.bias": torch.Size([8]),
    "transformer_blocks.0.norm1.linear.weight": torch.Size([48, 8]),
    "x_embedder.weight": torch.Size([8, 4]),
}


@pytest.mark.parametrize(
    ("preset", "tabulate", "device", "host"),
    [
        ("bf16", False, 2 * (64 + 8 + 384 + 32), 0),
        ("bf16", True, 2 * (64 + 8 + 32), 2 * 384),
        ("int8", True, 64 + 2 * (8 + 32), 2 * 384),
        ("int4-quanto", True, 32 + 2 * (8 + 32), 2 * 384),
    ],
)
def test_weights_are_counted_as_they_are_stored(preset: str, tabulate: bool, device: int, host: int) -> None:
    weights = memory.weigh(SHAPES, "transformer", PRESETS[preset], torch.bfloat16, tabulate)
    assert (weights.device, weights.host, weights.total) == (device, host, device + host)


WEIGHTS = {"bf16": 20 * GIB, "int8": 11 * GIB}


@pytest.mark.parametrize(
    ("host_free", "taken"),
    [(20 * GIB + HOST_RESERVE, "bf16"), (20 * GIB + HOST_RESERVE - 1, "int8"), (GIB, "int8")],
)
def test_auto_is_lossy_only_where_the_host_cannot_hold_the_exact_weights(host_free: int, taken: str) -> None:
    exact, lossy = PRESETS["bf16"], [PRESETS["int8"]]
    assert memory.auto_precision(exact, lossy, WEIGHTS, host_free).name == taken


def test_auto_without_another_choice_is_exact() -> None:
    assert memory.auto_precision(PRESETS["bf16"], [], WEIGHTS, 0).name == "bf16"


@pytest.mark.parametrize(("count", "words"), [(3 * 2**19, "1.5 MiB"), (GIB, "1.00 GiB"), (9 * GIB // 2, "4.50 GiB")])
def test_sizes_in_words(count: int, words: str) -> None:
    assert memory.size(count) == words


def test_a_stream_takes_one_block_at_a_time() -> None:
    """diffusers would set 1 by itself and only log it."""
    with pytest.raises(LongCatError, match="blocks_per_group"):
        GroupOffload("block", blocks=2, stream=True).check()
    GroupOffload("block", blocks=2, stream=False).check()
    GroupOffload("leaf", blocks=2, stream=True).check()


@pytest.mark.parametrize("stream", [True, False])
def test_group_offload_needs_a_device_to_offload_from(stream: bool, tmp_path: Path) -> None:
    with pytest.raises(LongCatError, match="does not work on this device .* Switch group offload off"):
        GroupOffload("leaf", stream=stream).apply(nn.Linear(2, 2), torch.device("cpu"), tmp_path)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, max allowed: 18.1 GB)"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("expected scalar type Float but found Half"), False),
        (OSError("out of memory"), False),
    ],
)
def test_every_device_is_understood_when_it_has_no_memory(error: Exception, expected: bool) -> None:
    assert memory.is_out_of_memory(error) is expected
