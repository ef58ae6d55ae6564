"""What each kind of device is given, and what it is spared."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from longcat_pack.longcat_backend.devices import DevicePolicy
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.precision import ENCODER_PRESETS, ENGINE_PRESETS, PRESETS

KITCHEN = {"float8_e4m3fn", "int8_tensorwise"}


def device(kind: str, **facts: Any) -> DevicePolicy:
    """A current device of a kind."""
    known = {
        "bf16": kind != "cpu",
        "fp16": kind != "cpu",
        "bf16_storage": True,
        "float64": kind not in ("mps", "xpu"),
        "products": frozenset({*KITCHEN, "float8_dynamic_rowwise"}) if kind == "cuda" else frozenset(),
    }
    return DevicePolicy(torch.device("cuda" if kind == "rocm" else kind), kind, **{**known, **facts})


KINDS = ("cuda", "rocm", "xpu", "mps", "cpu")
TURING = device("cuda", bf16=False, products=frozenset({"int8_tensorwise"}))


@pytest.mark.parametrize(
    ("policy", "transformer", "encoder"),
    [
        (device("cuda"), torch.bfloat16, torch.bfloat16),
        (device("mps"), torch.bfloat16, torch.bfloat16),
        (TURING, torch.float16, torch.float32),
        (replace(TURING, fp16=False), torch.float32, torch.float32),
        (device("cpu"), torch.float32, torch.float32),
    ],
    ids=["cuda", "mps", "turing", "older", "cpu"],
)
def test_the_best_dtype_that_a_device_computes_in(
    policy: DevicePolicy, transformer: torch.dtype, encoder: torch.dtype
) -> None:
    assert policy.compute_dtype("transformer") is transformer
    assert policy.compute_dtype("text_encoder") is encoder


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2])
def test_mps_holds_neither_float64_nor_float8(dtype: torch.dtype) -> None:
    assert not device("mps").holds(dtype)
    assert device("cuda").holds(dtype)
    assert device("cpu").holds(dtype)


def test_float32_and_whole_numbers_are_held_everywhere() -> None:
    for kind in KINDS:
        assert all(device(kind).holds(dtype) for dtype in (torch.float32, torch.float16, torch.int64, torch.uint8))


def supported(policy: DevicePolicy, weight_only: bool = True) -> set[str]:
    return {name for name, preset in PRESETS.items() if policy.supports(preset, weight_only)}


def test_presets_of_each_kind() -> None:
    everything = set(PRESETS)
    assert supported(device("cuda")) == everything
    for kind in ("rocm", "xpu", "cpu"):
        assert supported(device(kind)) == everything - {"fp8-torchao"}
    assert supported(device("mps")) == everything - {"fp8", "fp8-torchao", "int4-quanto"}
    assert supported(device("mps", bf16=False, bf16_storage=False)) == {"fp16", "fp32", "int8", "int8-quanto"}


def test_presets_whose_formats_have_to_be_multiplied() -> None:
    everything = set(PRESETS)
    assert supported(device("cuda"), weight_only=False) == everything
    assert supported(TURING, weight_only=False) == everything - {"fp8", "fp8-torchao"}
    assert supported(device("cpu"), weight_only=False) == everything - {"fp8-torchao"}
    plain = {"bf16", "fp16", "fp32", "int8-quanto"}
    assert supported(device("xpu"), weight_only=False) == plain | {"int4-quanto"}
    assert supported(device("mps"), weight_only=False) == plain


@pytest.mark.parametrize("name", ["fp8", "fp8-torchao", "int4-quanto"])
def test_a_preset_that_mps_lacks_is_refused_with_the_reason_and_the_others(name: str) -> None:
    policy = device("mps")
    engine = next(engine for engine, presets in ENGINE_PRESETS.items() if name in presets)
    with pytest.raises(LongCatError) as refusal:
        policy.require(PRESETS[name], ENGINE_PRESETS[engine])
    for text in (refusal.value.en, refusal.value.zh):
        assert "mps" in text
        offered = text.replace("：", ": ").rsplit(": " if text is refusal.value.zh else "of: ", 1)[1]
        names = offered.rstrip("。.").split(", ")
        assert names == [other for other in ENGINE_PRESETS[engine] if other in supported(policy)]
    assert "8" in refusal.value.en or "4-bit" in refusal.value.en


def test_every_component_has_a_preset_on_every_device() -> None:
    for kind in KINDS:
        for presets in (*ENGINE_PRESETS.values(), ENCODER_PRESETS):
            for name in supported(device(kind)) & set(presets):
                device(kind).require(PRESETS[name], presets)
            assert {"bf16", "fp32"} <= supported(device(kind))
