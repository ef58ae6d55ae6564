"""Core's loader on our MODEL: layers that a file's header lists and core leaves out are an error."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longcat_pack.longcat_backend import lora_files
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.lora import Adapter

Loaded = Callable[[str], tuple[Any, Any, Any]]
ENGINES = ["core", "diffusers"]
QUERIES = "transformer_blocks.0.attn.to_q"
TIME = "time_embed.timestep_embedder.linear_1"
LAYERS = {QUERIES: "double_blocks.0.img_attn.qkv", TIME: "time_in.in_layer"}


def by_core(model: Any, path: Path) -> Any:
    """As core's LoraLoaderModelOnly does it."""
    import comfy.sd
    import comfy.utils

    tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    return comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0, lora_metadata=metadata)[0]


def adapter(model: Any, layer: str) -> Adapter:
    from longcat_pack.longcat_backend.comfy_bridge import patch_keys

    rows, columns = patch_keys.places(model.model)[f"{layer}.weight"].shape
    return Adapter(layer, torch.ones(2, columns), torch.ones(rows, 2), 2.0)


def diffusers_file(model: Any, path: Path, layers: Sequence[str], targets: Any) -> Path:
    """As diffusers and SimpleTuner write it: official names, and a header with the targets that were trained."""
    tensors = {}
    for layer in layers:
        pair = adapter(model, layer)
        tensors[f"transformer.{layer}.lora_A.weight"] = pair.down
        tensors[f"transformer.{layer}.lora_B.weight"] = pair.up
    header = {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.target_modules": targets}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(header)})
    return path


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("targets", [[QUERIES, TIME], ["to_q", "linear_1"], ["to_q", "timestep_embedder.linear_1"]])
def test_a_target_that_core_does_not_find_is_named(
    engine: str, targets: list[str], loaded: Loaded, tmp_path: Path
) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import lora

    model = loaded(engine)[0]
    path = diffusers_file(model, tmp_path / "theirs.safetensors", [QUERIES, TIME], targets)
    with pytest.raises(LongCatError, match=f"changes the layer '{targets[1]}', which ComfyUI's loader did not find"):
        by_core(model, path)
    patched, report = lora.apply(model, lora_files.read(path).adapters, 1.0)
    assert len(patched.patches) == 2 and "2 layers matched" in report


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("targets", [[QUERIES], ["to_q", "q_proj"], r".*\.to_q", None, [1]], ids=str)
def test_targets_that_are_all_there_or_cannot_be_told_are_no_error(
    engine: str, targets: Any, loaded: Loaded, tmp_path: Path
) -> None:
    """A regular expression, and the names of a text encoder's layers."""
    model = loaded(engine)[0]
    assert by_core(model, diffusers_file(model, tmp_path / "theirs.safetensors", [QUERIES], targets)).patches


def test_what_is_written_is_found_whole_by_core_on_its_own_engine(loaded: Loaded, tmp_path: Path) -> None:
    """Under core's names, which nobody knows on the other engine."""
    core, diffusers = loaded("core")[0], loaded("diffusers")[0]
    lora_files.write(tmp_path / "ours.safetensors", [adapter(core, layer) for layer in LAYERS])
    assert len(by_core(core, tmp_path / "ours.safetensors").patches) == 2
    with pytest.raises(LongCatError, match=f"changes the layer '{TIME}'"):
        by_core(diffusers, tmp_path / "ours.safetensors")


def test_a_fused_layer_has_all_of_its_targets(loaded: Loaded, tmp_path: Path) -> None:
    model = loaded("core")[0]
    down = adapter(model, QUERIES).down
    name = f"diffusion_model.{LAYERS[QUERIES]}"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": torch.ones(3 * down.shape[1], 2)}
    header = {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.target_modules": [QUERIES]}
    save_file(tensors, tmp_path / "fused.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    assert by_core(model, tmp_path / "fused.safetensors").patches
