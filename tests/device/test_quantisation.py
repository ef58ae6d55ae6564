"""Presets of optimum-quanto and torchao by themselves on the device: kernels, moves, memory, compilation, adapters."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from device import machine
from torch import nn

from longcat_pack.longcat_backend import checkpoints, precision, quantisation, quantised_state, transformer
from longcat_pack.longcat_backend.comfy_bridge import devices

ERROR = {"int8-quanto": 0.03, "int4-quanto": 0.12, "fp8-torchao": 0.06}  # relative, of a bf16 forward

Velocity = transformer.VelocityModel


def names() -> list[str]:
    """The presets that this device can run."""
    policy = devices.policy(machine.device())
    return [name for name in ERROR if policy.supports(precision.PRESETS[name])]


@pytest.fixture(scope="module")
def checkpoint(pack_dir: Path) -> checkpoints.Checkpoint:
    return checkpoints.open_checkpoint(pack_dir / "demo" / "LongCat-Tiny")


def quantised(checkpoint: checkpoints.Checkpoint, name: str, device: torch.device) -> Velocity:
    model = transformer.load_transformer(checkpoint, torch.bfloat16)
    quantisation.quantise(model.transformer, "transformer", precision.PRESETS[name], device)
    return model


@torch.inference_mode()
def forward(model: Velocity, device: torch.device) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    samples, text = torch.randn(1, 16, 16, 16, generator=draw), torch.randn(1, 512, 64, generator=draw)
    moved = [value.to(device, model.dtype) for value in (samples, text)]
    return model(moved[0], torch.tensor([0.5], device=device), moved[1]).float().cpu()


def leaves(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: leaf for name, value in model.named_parameters() for key, leaf in quantisation.leaves(value, name)}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", names())
def test_it_computes_on_the_device_and_comes_back_unchanged(
    checkpoint: checkpoints.Checkpoint, device: torch.device, name: str
) -> None:
    expected = forward(transformer.load_transformer(checkpoint, torch.float32), torch.device("cpu"))
    model = quantised(checkpoint, name, device)
    before = {key: leaf.clone() for key, leaf in leaves(model).items()}
    assert {leaf.device.type for leaf in before.values()} == {"cpu"}
    found = forward(model.to(device), device)
    quantisation.verify(model.transformer, "transformer", precision.PRESETS[name])
    assert {leaf.device.type for leaf in leaves(model).values()} == {device.type}
    assert 0 < relative_error(found, expected) < ERROR[name]
    after = leaves(model.to("cpu"))
    assert all(torch.equal(after[key].view(torch.uint8), leaf.view(torch.uint8)) for key, leaf in before.items())
    assert torch.equal(forward(model.to(device), device), found)


@pytest.mark.parametrize("name", names())
def test_a_saved_model_is_the_same_when_loaded(
    checkpoint: checkpoints.Checkpoint, device: torch.device, name: str
) -> None:
    model = quantised(checkpoint, name, device)
    empty = transformer.empty_transformer(checkpoint.configs["transformer"])
    saved = quantised_state.quantised_state(model.transformer, precision.PRESETS[name])
    quantised_state.load_quantised(empty, "transformer", *saved, device)
    assert torch.equal(forward(Velocity(empty).to(device), device), forward(model.to(device), device))


@pytest.mark.parametrize("name", names())
def test_the_device_holds_one_layer_at_a_time(
    checkpoint: checkpoints.Checkpoint, device: torch.device, name: str
) -> None:
    if device.type != "cuda":
        return
    model = transformer.load_transformer(checkpoint, torch.bfloat16)
    largest = max(layer.weight.nbytes for layer in model.modules() if isinstance(layer, nn.Linear))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    quantisation.quantise(model.transformer, "transformer", precision.PRESETS[name], device)
    assert torch.cuda.max_memory_allocated() - start < 12 * largest < quantisation.stored_bytes(model)
    assert torch.cuda.memory_allocated() == start


@pytest.mark.parametrize("name", names())
def test_it_compiles(checkpoint: checkpoints.Checkpoint, device: torch.device, name: str) -> None:
    model = quantised(checkpoint, name, device).to(device)
    expected = forward(model, device)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert relative_error(forward(model, device), expected) < 0.02


@pytest.mark.parametrize("name", names())
def test_a_lora_beside_the_weights_changes_the_output(
    checkpoint: checkpoints.Checkpoint, device: torch.device, name: str
) -> None:
    from peft import LoraConfig

    model = quantised(checkpoint, name, device).to(device)
    plain = forward(model, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft cannot merge into torchao's weights, nor do we
        model.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "ff.net.2"], init_lora_weights=False))
    assert relative_error(forward(model.to(device), device), plain) > 0.01
    model.transformer.disable_adapters()
    assert torch.equal(forward(model, device), plain)
