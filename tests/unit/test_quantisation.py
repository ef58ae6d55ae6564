"""Presets of optimum-quanto and torchao on the demo checkpoint: they take, and one that does not is an error."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from longcat_pack.longcat_backend import checkpoints, precision, quantisation, text_encoder, transformer
from longcat_pack.longcat_backend.errors import LongCatError

CPU = torch.device("cpu")
NAMES = ("int8-quanto", "int4-quanto", "fp8-torchao")
ERROR = {"int8-quanto": 0.015, "int4-quanto": 0.13}  # relative, of one forward in fp32

Velocity = transformer.VelocityModel


def demo(pack_dir: Path) -> checkpoints.Checkpoint:
    return checkpoints.open_checkpoint(pack_dir / "demo" / "LongCat-Tiny")


@pytest.fixture
def model(pack_dir: Path) -> Velocity:
    return transformer.load_transformer(demo(pack_dir), torch.bfloat16)


@torch.inference_mode()
def forward(model: Velocity) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    samples, text = torch.randn(1, 16, 8, 8, generator=draw), torch.randn(1, 512, 64, generator=draw)
    return model(samples.to(model.dtype), torch.tensor([0.5]), text.to(model.dtype)).float()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_of_the_table_and_no_other_takes(model: Velocity, fp8_device: None, name: str) -> None:
    before = quantisation.stored_bytes(model)
    calls: list[tuple[int, int]] = []
    quantisation.quantise(
        model.transformer, "transformer", precision.PRESETS[name], CPU, lambda *call: calls.append(call)
    )
    linears = [key for key, layer in model.transformer.named_modules() if isinstance(layer, nn.Linear)]
    expected = [key for key in linears if precision.is_quantised("transformer", key)]
    assert quantisation.quantised_layers(model.transformer) == expected
    assert not any("norm" in key or "embed" in key for key in expected)
    assert calls == [(done + 1, len(expected)) for done in range(len(expected))]
    assert quantisation.stored_bytes(model) < 0.7 * before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("left", ["all", "one", "names"])
def test_a_preset_that_did_not_take_is_an_error(
    model: Velocity, fp8_device: None, monkeypatch: pytest.MonkeyPatch, name: str, left: str
) -> None:
    preset = precision.PRESETS[name]
    backend = quantisation.require(preset, CPU)
    quantised: Callable[..., nn.Module] = backend.quantised
    skipped = iter(range(1000))
    if left == "names":  # layers have other names than the table expects
        monkeypatch.setitem(precision.QUANTISED, "transformer", re.compile("unknown"))
    else:
        monkeypatch.setattr(
            backend,
            "quantised",
            lambda layer, preset: layer if left == "all" or next(skipped) == 7 else quantised(layer, preset),
        )
    layers = {"all": "66 of 66 layers", "one": "1 of 66 layers", "names": "0 of 0 layers"}[left]
    with pytest.raises(LongCatError, match=f"'{name}' did not take on 'transformer': {layers}"):
        quantisation.quantise(model.transformer, "transformer", preset)


@pytest.mark.parametrize("name", NAMES)
def test_another_format_is_not_taken_for_the_preset(model: Velocity, fp8_device: None, name: str) -> None:
    quantisation.quantise(model.transformer, "transformer", precision.PRESETS[name])
    for other in NAMES:
        if other != name:
            with pytest.raises(LongCatError, match="did not take"):
                quantisation.verify(model.transformer, "transformer", precision.PRESETS[other])


def test_fp8_that_scales_no_activations_fell_back(
    model: Velocity, fp8_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight-only fp8 multiplies in bf16: half the memory, none of the speed."""
    from torchao.quantization import Float8WeightOnlyConfig

    preset = precision.PRESETS["fp8-torchao"]
    monkeypatch.setattr(quantisation.require(preset, CPU), "_CONFIG", Float8WeightOnlyConfig())
    with pytest.raises(LongCatError, match="66 of 66 layers"):
        quantisation.quantise(model.transformer, "transformer", preset)


def test_fp8_that_skips_an_odd_layer_is_an_error(model: Velocity, fp8_device: None) -> None:
    """torchao leaves a weight whose sides are no multiples of 16 as it is, and only logs it."""
    model.transformer.transformer_blocks[0].attn.to_q = nn.Linear(128, 120, dtype=torch.bfloat16)
    with pytest.raises(LongCatError, match=r"1 of 66 layers.*transformer_blocks\.0\.attn\.to_q"):
        quantisation.quantise(model.transformer, "transformer", precision.PRESETS["fp8-torchao"])


@pytest.mark.parametrize("name", ERROR)
def test_the_error_of_a_forward_is_small_and_not_zero(pack_dir: Path, name: str) -> None:
    model = transformer.load_transformer(demo(pack_dir), torch.float32)
    expected = forward(model)
    quantisation.quantise(model.transformer, "transformer", precision.PRESETS[name])
    assert 0 < relative_error(forward(model), expected) < ERROR[name]


def test_fp8_weights_are_those_of_the_checkpoint(model: Velocity, fp8_device: None) -> None:
    expected = model.transformer.transformer_blocks[0].ff.net[2].weight.float()
    quantisation.quantise(model.transformer, "transformer", precision.PRESETS["fp8-torchao"])
    found = model.transformer.transformer_blocks[0].ff.net[2].weight.dequantize().float()
    assert 0 < relative_error(found, expected) < 0.04


def test_the_encoder_takes_int8(pack_dir: Path) -> None:
    checkpoint = demo(pack_dir)
    encoder = text_encoder.load_text_encoder(checkpoint, text_encoder.load_tokenizer(checkpoint), torch.float32)
    expected = encoder.encode([5, 6, 7])
    quantisation.quantise(encoder.model, "text_encoder", precision.PRESETS["int8-quanto"])
    assert len(quantisation.quantised_layers(encoder.model)) == 7 * len(encoder.model.layers)
    assert 0 < relative_error(encoder.encode([5, 6, 7]), expected) < 0.02


@pytest.mark.parametrize("name", ERROR)
def test_it_moves_and_computes_in_each_dtype(pack_dir: Path, name: str) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = transformer.load_transformer(demo(pack_dir), dtype)
        quantisation.quantise(model.transformer, "transformer", precision.PRESETS[name])
        expected = forward(model)
        assert model.dtype is dtype and bool(expected.isfinite().all())
        assert torch.equal(forward(model.to("cpu").to(dtype)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_moves_with_all_its_parts(model: Velocity, fp8_device: None, name: str) -> None:
    """To a device without storage, the only second device of every machine."""
    quantisation.quantise(model.transformer, "transformer", precision.PRESETS[name])
    layer = model.transformer.transformer_blocks[0].ff.net[2].to("meta")
    assert {leaf.device.type for _, leaf in quantisation.leaves(layer.weight, "weight")} == {"meta"}


def test_fp8_is_refused_where_no_kernel_runs(model: Velocity, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = precision.PRESETS["fp8-torchao"]
    with pytest.raises(LongCatError, match="needs a GPU that multiplies in fp8.*'cpu'.*int8-quanto"):
        quantisation.quantise(model.transformer, "transformer", preset)
    assert not quantisation.quantised_layers(model)
    for capability, refused in (((8, 6), True), ((8, 9), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        try:
            quantisation.require(preset, torch.device("cuda"))
        except LongCatError:
            assert refused
        else:
            assert not refused


def test_fp8_asks_for_bf16(pack_dir: Path, fp8_device: None) -> None:
    model = transformer.load_transformer(demo(pack_dir), torch.float16)
    with pytest.raises(LongCatError, match="quantises bf16 weights, but they are float16"):
        quantisation.quantise(model.transformer, "transformer", precision.PRESETS["fp8-torchao"])


def test_fp8_changes_no_setting_of_the_process(model: Velocity, fp8_device: None) -> None:
    """torchao's recommended compiler settings; before 0.18 also the precision of every float32 product."""
    import torch._inductor.config

    def settings() -> tuple[object, ...]:
        return torch._inductor.config.coordinate_descent_tuning, torch.get_float32_matmul_precision()

    before = settings()
    quantisation.quantise(model.transformer, "transformer", precision.PRESETS["fp8-torchao"])
    assert settings() == before


@pytest.mark.parametrize(("name", "package"), [("int8-quanto", "optimum-quanto"), ("fp8-torchao", "torchao")])
def test_a_missing_package_is_named(model: Velocity, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    preset = precision.PRESETS[name]
    module = {"quanto": "optimum.quanto", "torchao": "torchao.quantization"}[preset.backend]
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"longcat_pack.longcat_backend.{preset.backend}_layers", raising=False)
    with pytest.raises(LongCatError, match=f"pip install -U {package}"):
        quantisation.quantise(model.transformer, "transformer", preset)


def test_the_packages_are_imported_only_when_asked_for(pack_dir: Path) -> None:
    import subprocess

    program = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); import longcat_pack.longcat_backend.quantised_state as _; "
        "assert not {'optimum.quanto', 'torchao'} & set(sys.modules) - before"
    ).replace("import longcat", "before = set(sys.modules); import longcat")
    subprocess.run([sys.executable, "-c", program, str(pack_dir / "tests" / "conftest.py")], check=True)


@pytest.mark.parametrize(
    ("name", "memory", "disk"),
    [("bf16", True, True), ("int8-quanto", False, False), ("int4-quanto", False, False), ("fp8-torchao", True, False)],
)
def test_group_offload_is_refused_where_weights_cannot_be_moved(name: str, memory: bool, disk: bool) -> None:
    for allowed, to_disk in ((memory, False), (disk, True)):
        if allowed:
            quantisation.check_group_offload(precision.PRESETS[name], to_disk)
        else:
            told = f"Group offload cannot move weights of the precision '{name}'.*or switch group offload off"
            with pytest.raises(LongCatError, match=told):
                quantisation.check_group_offload(precision.PRESETS[name], to_disk)


def test_quanto_weights_still_cannot_be_exchanged(model: Velocity) -> None:
    """The reason for the refusal: what group offload does with a weight, here for a device without storage."""
    quantisation.quantise(model.transformer, "transformer", precision.PRESETS["int8-quanto"])
    weight = model.transformer.transformer_blocks[0].attn.to_q.weight
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        weight.data = weight.data.to("meta")


def lora(model: Any, zero: bool = False) -> None:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "proj_out"], init_lora_weights=zero))


@pytest.mark.parametrize("name", ERROR)
def test_a_lora_can_be_trained_beside_weights_made_in_inference_mode(model: Velocity, name: str) -> None:
    """ComfyUI runs nodes in inference mode, and autograd refuses tensors that were made there."""
    with torch.inference_mode():
        quantisation.quantise(model.transformer, "transformer", precision.PRESETS[name])
    lora(model.transformer)
    text = torch.randn(1, 512, 64, dtype=torch.bfloat16)
    model(torch.randn(1, 16, 8, 8, dtype=torch.bfloat16), torch.tensor([0.5]), text).square().mean().backward()
    trained = {key: value.grad for key, value in model.named_parameters() if value.requires_grad}
    assert trained and all("lora_" in key for key in trained)
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in trained.values())
