"""Training on the device: gradients with every option that may not change them, in bf16 and beside quantised bases."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from torch import nn

from longcat_pack.longcat_backend import precision, quantisation
from longcat_pack.longcat_backend.training import base, loop
from longcat_pack.longcat_backend.training.loop import Events, Result
from longcat_pack.longcat_backend.training.settings import TrainSettings

SETTINGS = TrainSettings(
    steps=6, batch=2, rank=4, targets="all", learning_rate=5e-3, base_precision="fp32", seed=3, validate_every=3
)
DATA = tiny.pictures(held_out=(4,))


@pytest.fixture(autouse=True)
def own_compiled_code() -> Iterator[None]:
    """Compiled code of one test out of the way of the next."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def train(
    folder: Path, device: torch.device, dtype: torch.dtype = torch.float32, settings: TrainSettings = SETTINGS
) -> Result:
    model = tiny.velocity_model(dtype)
    preset = precision.PRESETS[settings.base_precision]
    if preset.backend:
        quantisation.quantise(model.transformer, "transformer", preset, device)
        base.let_gradients_through(model.transformer)
    return loop.train(model, DATA, settings, folder, Events(), device)


def ups(result: Result) -> torch.Tensor:
    """What was learnt, in one row."""
    return torch.cat([each.up.flatten() for each in result.adapters])


OPTIONS: dict[str, dict[str, Any]] = {
    "checkpointing none": {"checkpointing": "none"},
    "checkpointing every-second": {"checkpointing": "every-second"},
    "compile": {"compile": True},
    "compile, checkpointing none": {"compile": True, "checkpointing": "none"},
    "offload by block": {"offload": "block"},
    "offload by leaf": {"offload": "leaf"},
    "offload without a stream": {"offload": "block", "offload_stream": False, "offload_blocks": 2},
    "offload, checkpointing none": {"offload": "block", "checkpointing": "none"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_do_not_change_what_is_learnt(name: str, device: torch.device, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", device)
    other = train(tmp_path / "other", device, settings=dataclasses.replace(SETTINGS, **OPTIONS[name]))
    assert [loss for _, loss in other.losses] == pytest.approx([loss for _, loss in plain.losses], rel=1e-3)
    assert dict(other.held_out) == pytest.approx(dict(plain.held_out), rel=1e-3)
    assert float((ups(other) - ups(plain)).norm() / ups(plain).norm()) < 0.02


def test_the_device_learns_what_the_cpu_learns(device: torch.device, tmp_path: Path) -> None:
    here, there = train(tmp_path / "device", device), train(tmp_path / "cpu", torch.device("cpu"))
    # Adam divides tiny gradients by their own size, so their rounding grows with the steps.
    assert [loss for _, loss in here.losses] == pytest.approx([loss for _, loss in there.losses], rel=1e-2)


@pytest.mark.parametrize("name", ["bf16", "int8-quanto", "int4-quanto", "fp8-torchao"])
def test_every_base_precision_is_trained_beside(name: str, device: torch.device, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, base_precision=name)
    plain = train(tmp_path / "fp32", device)
    other = train(tmp_path / name, device, torch.bfloat16, settings)
    tolerance = 0.2 if name == "int4-quanto" else 0.05
    assert [loss for _, loss in other.losses] == pytest.approx([loss for _, loss in plain.losses], rel=tolerance)
    assert float(ups(other).abs().max()) > 0


@pytest.mark.parametrize("name", ["int8-quanto", "fp8-torchao"])
def test_compiled_blocks_learn_beside_a_quantised_base(name: str, device: torch.device, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, base_precision=name)
    plain = train(tmp_path / "plain", device, torch.bfloat16, settings)
    compiled = dataclasses.replace(settings, compile=True)
    other = train(tmp_path / "compiled", device, torch.bfloat16, compiled)
    assert [loss for _, loss in other.losses] == pytest.approx([loss for _, loss in plain.losses], rel=0.05)


@pytest.mark.parametrize("name", ["bf16", "int8-quanto"])
def test_the_modulation_table_does_not_change_what_is_learnt(name: str, device: torch.device, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, base_precision=name, batch=1)
    found = [
        train(tmp_path / str(table), device, torch.bfloat16, dataclasses.replace(settings, modulation_table=table))
        for table in (False, True)
    ]
    assert found[1].losses[0] == found[0].losses[0]  # later ones pass through sums in any order
    assert [loss for _, loss in found[1].losses] == pytest.approx([loss for _, loss in found[0].losses], rel=1e-3)


def test_an_offloaded_model_has_its_linear_layers_off_the_device(device: torch.device, tmp_path: Path) -> None:
    model = tiny.velocity_model()
    settings = dataclasses.replace(SETTINGS, offload="block", steps=2, targets="attention")
    loop.train(model, DATA, settings, tmp_path, Events(), device)
    there = {name for name, value in model.transformer.named_parameters() if value.device.type == device.type}
    away = {name for name, _ in model.transformer.named_parameters()} - there
    assert {name for name in there if ".lora_" in name} and not [name for name in away if ".lora_" in name]
    weights = {f"{name}.weight" for name, layer in model.transformer.named_modules() if isinstance(layer, nn.Linear)}
    assert away == {name for name in weights if ".lora_" not in name}
