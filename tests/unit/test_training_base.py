"""The dtype that the frozen base of a training computes in."""

import pytest
import torch

from longcat_pack.longcat_backend.precision import PRESETS
from longcat_pack.longcat_backend.training import base


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("fp32", "cpu", torch.float32),
        ("bf16", "cpu", torch.bfloat16),
        ("int8-quanto", "cpu", torch.float32),
        ("int4-quanto", "cpu", torch.float32),
        ("fp8-torchao", "cpu", torch.bfloat16),  # its layers are made for nothing else
        ("fp32", "cuda", torch.float32),
        ("int8-quanto", "cuda", torch.bfloat16),
        ("int8-quanto", "mps", torch.bfloat16),
    ],
)
def test_a_quantised_base_computes_in_what_the_device_draws_in(name: str, kind: str, expected: torch.dtype) -> None:
    assert base.compute_dtype(PRESETS[name], torch.device(kind)) is expected
