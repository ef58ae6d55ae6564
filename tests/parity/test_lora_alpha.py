"""Alphas of every kind of number count as they do in core's loader."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longcat_pack.longcat_backend import lora, lora_files

LAYER = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float16, torch.float64], ids=str)
def test_an_alpha_of_any_dtype_counts_as_in_core(dtype: torch.dtype, comfy_dir: Path, tmp_path: Path) -> None:
    import comfy.lora

    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(8, 6, generator=generator), torch.randn(5, 8, generator=generator)
    name = "lora_unet_" + LAYER.replace(".", "_")
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(2).to(dtype),
    }
    save_file(tensors, tmp_path / "kohya.safetensors")
    (adapter,) = lora_files.read(tmp_path / "kohya.safetensors").adapters
    patches = [(1.0, patch, 1.0, None, None) for patch in comfy.lora.load_lora(tensors, {name: LAYER}).values()]
    theirs = comfy.lora.calculate_weight(patches, torch.zeros(5, 6), LAYER)
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(lora.delta(adapter).float(), theirs)
