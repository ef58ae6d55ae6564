"""What LongCatSaveCheckpoint writes in ComfyUI's layout, core's own loaders read: the same model comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longcat_pack.longcat_backend import checkpoints, layouts, official, text_encoder, transformer, verification

# What core knows a LongCat by, in the smallest size that it detects.
SMALL = {**official.TRANSFORMER, "num_attention_heads": 2, "num_layers": 1, "num_single_layers": 2}


@pytest.fixture
def small(folder: Path, tmp_path: Path) -> checkpoints.Checkpoint:
    """A checkpoint with a random transformer that core's detection takes for LongCat-Image."""
    target = tmp_path / "small"
    shutil.copytree(folder, target)
    (target / "transformer" / "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: (torch.randn(value.shape, generator=generator) * 0.05).bfloat16()
        for key, value in transformer.empty_transformer(SMALL).state_dict().items()
    }
    save_file(weights, target / "transformer" / "diffusion_pytorch_model.safetensors")
    return checkpoints.open_checkpoint(target)


@pytest.fixture
def models(comfy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import folder_paths

    for kind in ("diffusion_models", "text_encoders", "vae"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"}))
    return tmp_path


def velocity(model: Any) -> torch.Tensor:
    """At a noise level that needs no rounding, which core does not do."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    generator = torch.Generator().manual_seed(0)
    latent, text = torch.randn(1, 16, 8, 8, generator=generator), torch.randn(1, 512, 3584, generator=generator)
    with torch.no_grad():
        return model.model.apply_model(latent, torch.tensor([0.5]), c_crossattn=text)


@pytest.mark.parametrize("precision", ["fp32", "fp8", "int8"])
@pytest.mark.parametrize("engine", ["core", "diffusers"])
def test_load_diffusion_model_reads_the_transformer(
    precision: str, engine: str, small: checkpoints.Checkpoint, models: Path
) -> None:
    import comfy.sd

    from longcat_pack.longcat_backend.comfy_bridge import loading, saving

    saving.save(loading.load_model(small, engine, "fp32"), None, None, "small", "comfyui", precision, False)
    path = models / "diffusion_models" / "longcat_small.safetensors"
    theirs = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
    ours = velocity(loading.load_model(small, "core", precision))
    assert ours.std() > 0.1
    assert torch.equal(velocity(theirs), ours)


@torch.inference_mode()
def test_load_vae_reads_the_vae_of_the_published_size(folder: Path, models: Path, tmp_path: Path) -> None:
    import comfy.sd

    from longcat_pack.longcat_backend.comfy_bridge import editing, loading, saving, vae

    target = tmp_path / "published"
    shutil.copytree(folder, target)
    (target / "vae" / "config.json").write_text(json.dumps(dict(official.VAE)), encoding="utf-8")
    shapes = verification.vae_shapes(official.VAE)
    generator = torch.Generator().manual_seed(0)
    weights = {key: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for key, shape in shapes.items()}
    save_file(weights, target / "vae" / "diffusion_pytorch_model.safetensors")
    ours = vae.load(checkpoints.open_checkpoint(target))
    saving.save(None, None, ours, "published", "comfyui", "keep", False)
    written = load_file(models / "vae" / "longcat_published_vae.safetensors")
    assert written.keys() == layouts.vae_to_single_file(weights).keys()
    theirs = comfy.sd.VAE(sd=written)
    latent = torch.randn(1, 16, 4, 4, generator=generator)
    assert torch.allclose(theirs.decode(latent), ours.decode(latent), atol=1e-6)
    clip, image = loading.load_encoder(checkpoints.open_checkpoint(folder), "fp32"), torch.rand(1, 32, 32, 3)
    expected, found = (editing.encode(clip, each, image, "red", "", (32, 32))[2]["samples"] for each in (ours, theirs))
    assert torch.allclose(found, expected, atol=1e-6)


def test_load_clip_finds_every_key_of_a_text_encoder(comfy_dir: Path) -> None:
    """The published size needs 16 GB, so the keys alone are compared."""
    import comfy.ops
    import comfy.text_encoders.llama
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig

    theirs = comfy.text_encoders.llama.Qwen25_7BVLI({}, torch.bfloat16, "meta", comfy.ops.manual_cast)
    with torch.device("meta"):
        whole = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(dict(official.TEXT_ENCODER)))
    ours = {
        f"model.{key}": value.shape
        for key, value in text_encoder.empty_text_model(official.TEXT_ENCODER).state_dict().items()
    }
    rest = {
        key.removeprefix("model."): value.shape
        for key, value in whole.state_dict().items()
        if key.startswith(("model.visual.", "lm_head."))
    }
    found = {**ours, **rest}
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: found.get(key) for key in expected} == expected
    assert found.keys() - expected.keys() <= {"lm_head.weight"}
