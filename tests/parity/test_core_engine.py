"""ComfyUI's own class gets every weight of an official checkpoint, also when it creates its layers lazily."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from longcat_pack.longcat_backend import checkpoints, layouts, transformer
from longcat_pack.longcat_backend.comfy_bridge import core_engine
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.precision import PRESETS


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> checkpoints.Checkpoint:
    return checkpoints.open_checkpoint(folder)


def loaded_weights(checkpoint: checkpoints.Checkpoint) -> dict[str, torch.Tensor]:
    return core_engine.load(checkpoint, torch.float32, PRESETS["fp32"]).model.diffusion_model.state_dict()


def test_dynamic_vram_loads_the_same_weights(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dynamic VRAM, the default on NVIDIA cards, ComfyUI's layers have no weights before loading."""
    import comfy.memory_management

    expected = loaded_weights(checkpoint)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    lazy = loaded_weights(checkpoint)
    assert lazy.keys() == expected.keys()
    assert all(torch.equal(lazy[key], value) for key, value in expected.items())


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_a_key_that_the_class_lacks_or_wants_is_an_error(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch, change: str, lazily: bool
) -> None:
    import comfy.memory_management

    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", lazily)
    convert = layouts.to_core

    def changed(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        converted = dict(convert(weights))
        value = converted.pop("time_in.in_layer.weight") if change == "missing" else torch.zeros(1)
        return converted if change == "missing" else {**converted, "foreign.weight": value}

    monkeypatch.setattr(layouts, "to_core", changed)
    with pytest.raises(LongCatError, match="time_in.in_layer.weight" if change == "missing" else "foreign.weight"):
        core_engine.load(checkpoint, torch.float32, PRESETS["fp32"])


def test_the_halves_of_the_last_modulation_are_swapped(checkpoint: Any) -> None:
    official = transformer.audited_weights(checkpoint)
    converted = layouts.to_core(official)
    scale, shift = official["norm_out.linear.weight"].chunk(2)
    assert torch.equal(converted["final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale]))
