"""Models of other libraries' weights move as one piece, also where the host asks for a part of their memory only."""

from pathlib import Path
from typing import Any

import pytest
import torch

from longcat_pack.longcat_backend import checkpoints, quantisation
from longcat_pack.longcat_backend.comfy_bridge import diffusers_engine
from longcat_pack.longcat_backend.precision import PRESETS

CPU = torch.device("cpu")


def leaves(model: Any) -> dict[str, torch.Tensor]:
    return {key: leaf for name, value in model.named_parameters() for key, leaf in quantisation.leaves(value, name)}


@pytest.mark.parametrize("name", ["int8-quanto", "int4-quanto", "fp8-torchao"])
@torch.inference_mode()
def test_a_part_of_it_asked_for_frees_all_of_it(folder: Path, comfy_dir: Path, fp8_device: None, name: str) -> None:
    import comfy.model_management as management

    checkpoint = checkpoints.open_checkpoint(folder)
    patcher = diffusers_engine.load(checkpoint, torch.bfloat16, PRESETS[name])
    before = leaves(patcher.model)
    for _ in range(2):
        management.load_models_gpu([patcher])
        mine = next(loaded for loaded in management.current_loaded_models if loaded.model is patcher)
        assert patcher.loaded_size() == patcher.model_size() > 0
        assert mine.model_unload(memory_to_free=1)
        management.current_loaded_models.remove(mine)
        assert patcher.loaded_size() == 0
    after = leaves(patcher.model)
    assert after.keys() == before.keys()
    assert all(after[key] is leaf for key, leaf in before.items())
