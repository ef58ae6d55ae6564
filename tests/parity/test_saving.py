"""What is saved in either layout and loaded again is the same to the bit; so is what a quantised model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longcat_pack.longcat_backend import checkpoints, layouts, single_files, verification
from longcat_pack.longcat_backend.errors import LongCatError
from parity.saved_models import embeddings, files, load, save, saved, velocity


@pytest.mark.parametrize("layout", ["folder", "comfyui"])
@pytest.mark.parametrize("engine", ["core", "diffusers"])
def test_unquantised_weights_come_back_bit_for_bit(engine: str, layout: str, models: Path, folder: Path) -> None:
    source = checkpoints.open_checkpoint(folder)
    parts = load(source, engine)
    report = save(parts, layout)
    again = saved(models, layout)
    verification.verify(again)
    assert again.configs == source.configs and again.flavour == source.flavour
    for part in single_files.PARTS:
        expected, found = source.weights(part), again.weights(part)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key].float(), value.to(found[key].dtype).float()), key
    assert all(value.dtype == torch.bfloat16 for value in again.weights("transformer").values())
    assert "vision tower and output head copied" in report
    for other in ("core", "diffusers"):
        ours, theirs = load(again, other), load(source, other)
        assert torch.equal(velocity(ours[0]), velocity(theirs[0]))
        assert torch.equal(embeddings(ours[1]), embeddings(theirs[1]))


def test_a_saved_folder_is_whole(models: Path, folder: Path) -> None:
    from diffusers import LongCatImagePipeline

    save(load(checkpoints.open_checkpoint(folder), "core", "bf16", "fp32"), "folder")
    target = models / "longcat_image" / "mine"
    pipeline = LongCatImagePipeline.from_pretrained(target, torch_dtype=torch.float32)
    original = LongCatImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    for part in single_files.PARTS:
        expected, found = (getattr(one, part).state_dict() for one in (original, pipeline))
        assert all(torch.equal(found[key], value) for key, value in expected.items()), part
    for part in ("tokenizer", "text_processor"):
        for path in (folder / part).iterdir():
            assert (target / part / path.name).read_bytes() == path.read_bytes()


def test_files_do_for_a_folder_and_back(models: Path, folder: Path) -> None:
    """From single files there is no processor to copy, and the tokenizer comes from the header."""
    save(load(checkpoints.open_checkpoint(folder)), "comfyui")
    report = save(load(saved(models, "comfyui")), "folder")
    again = saved(models, "folder")
    verification.verify(again)
    assert "text_processor is missing" in report
    assert not (models / "longcat_image" / "mine" / "text_processor").exists()
    source = checkpoints.open_checkpoint(folder)
    assert torch.equal(embeddings(load(again)[1]), embeddings(load(source)[1]))


def test_without_its_source_a_text_encoder_is_saved_without_the_parts_that_are_not_loaded(
    models: Path, folder: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "source")
    parts = load(checkpoints.open_checkpoint(tmp_path / "source"))
    shutil.rmtree(tmp_path / "source")
    assert "no vision tower" in save(parts, "comfyui")
    keys = load_file(files(models)["text_encoder"])
    assert not any(key.startswith(("visual.", "lm_head.")) for key in keys)
    verification.verify(saved(models, "comfyui"))


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("when", ["loading", "saving"])
def test_quantised_models_say_the_same_again(
    precision: str, when: str, models: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import kitchen

    def quantised_anew(*args: Any) -> None:
        raise AssertionError("in bf16 that would give other weights than the file holds")

    source = checkpoints.open_checkpoint(folder)
    quantised = load(source, "core", precision, precision)
    if when == "loading":
        save(quantised, "comfyui")
    else:
        save(load(source, "diffusers", "fp32", "fp32"), "comfyui", precision)
    with monkeypatch.context() as patch:
        patch.setattr(kitchen, "pack", quantised_anew)
        again = load(saved(models, "comfyui"), "core", precision, precision)
    assert torch.equal(velocity(again[0]), velocity(quantised[0]))
    assert torch.equal(embeddings(again[1]), embeddings(quantised[1]))
    assert not torch.equal(velocity(again[0]), velocity(load(source)[0]))
    expected, found = quantised[0].model.diffusion_model.state_dict(), again[0].model.diffusion_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].float(), value.float()) for key, value in expected.items())


def test_quantised_weights_can_be_multiplied_out_but_not_quantised_again(models: Path, folder: Path) -> None:
    parts = load(checkpoints.open_checkpoint(folder), "core", "int8", "int8")
    with pytest.raises(LongCatError, match="lose more"):
        save(parts, "comfyui", "fp8")
    with pytest.raises(LongCatError, match="an official folder cannot hold"):
        save(parts, "folder")
    assert not any(models.rglob("*.safetensors"))
    save(parts, "folder", "fp32")
    plain = load(saved(models, "folder"), "core", "fp32")
    assert (velocity(plain[0]) - velocity(parts[0])).abs().max() < 0.2


LAYER = {
    "core": "diffusion_model.double_blocks.0.img_attn.qkv.weight",
    "diffusers": "diffusion_model.velocity.transformer.transformer_blocks.0.attn.to_q.weight",
    "core modulation": "diffusion_model.double_blocks.0.img_mod.lin.weight",
    "diffusers modulation": "diffusion_model.velocity.transformer.transformer_blocks.0.norm1.linear.weight",
}


@pytest.mark.parametrize(
    ("layer", "precision", "layout"),
    [
        ("core", "fp32", "folder"),
        ("core", "fp32", "comfyui"),
        ("core", "fp8", "comfyui"),
        ("core modulation", "fp32", "comfyui"),
        ("diffusers", "fp32", "folder"),
        ("diffusers", "fp32", "comfyui"),
        ("diffusers modulation", "fp32", "folder"),
    ],
)
def test_patches_are_baked_in(layer: str, precision: str, layout: str, models: Path, folder: Path) -> None:
    engine, key = layer.split()[0], LAYER[layer]
    plain, clip, vae = load(checkpoints.open_checkpoint(folder), engine, precision)
    patched = plain.clone()
    shape = plain.model.state_dict()[key].shape
    patched.add_patches({key: ("diff", (torch.full(shape, 0.25),))}, 1.0)
    changed, unchanged = velocity(patched), velocity(plain)
    assert not torch.equal(changed, unchanged)
    report = save((patched, clip, vae), layout)
    assert "1 weights with LoRA" in report
    assert torch.equal(velocity(load(saved(models, layout), engine, precision)[0]), changed)
    velocity(patched)  # leaves its patches in the weights that both clones share
    save((plain, clip, vae), layout, overwrite=True)
    assert torch.equal(velocity(load(saved(models, layout), engine, precision)[0]), unchanged)


def test_weights_in_the_hands_of_group_offload_are_left_alone(models: Path, folder: Path) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import patchers

    model = load(checkpoints.open_checkpoint(folder), "diffusers")[0]
    grouped = patchers.group_patcher(model.model, model.load_device, model.offload_device)
    grouped.attachments = model.attachments
    with pytest.raises(LongCatError, match="group offload"):
        save((grouped, None, None), "comfyui")


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("fp32", torch.float32)])
def test_a_precision_is_that_of_every_tensor(precision: str, dtype: torch.dtype, models: Path, folder: Path) -> None:
    save(load(checkpoints.open_checkpoint(folder)), "comfyui", precision)
    for path in files(models).values():
        assert {value.dtype for value in load_file(path).values()} == {dtype}


@pytest.mark.parametrize("part", single_files.PARTS)
def test_one_part_alone(part: str, models: Path, folder: Path) -> None:
    parts = load(checkpoints.open_checkpoint(folder))
    alone = tuple(one if name == part else None for name, one in zip(single_files_order(), parts, strict=True))
    with pytest.raises(LongCatError, match="needs model, clip and vae"):
        save(alone, "folder")
    save(alone, "comfyui")
    assert [path for path in models.rglob("*") if path.is_file()] == [files(models)[part]]
    with pytest.raises(LongCatError, match="is there already"):
        save(alone, "comfyui")


def single_files_order() -> tuple[str, str, str]:
    return ("transformer", "text_encoder", "vae")


def test_nothing_and_foreign_parts_are_refused(models: Path, folder: Path, comfy_dir: Path) -> None:
    import comfy.sd

    with pytest.raises(LongCatError, match="nothing to save"):
        save((None, None, None), "comfyui")
    model, clip, vae = load(checkpoints.open_checkpoint(folder))
    model.remove_attachments("longcat_checkpoint")
    with pytest.raises(LongCatError, match="not LongCatLoader's"):
        save((model, None, None), "comfyui")
    foreign = comfy.sd.VAE(sd=layouts.vae_to_single_file(published_vae()))
    with pytest.raises(LongCatError, match="not LongCatLoader's"):
        save((None, None, foreign), "comfyui")


def published_vae() -> dict[str, torch.Tensor]:
    from longcat_pack.longcat_backend import official

    shapes = verification.vae_shapes(official.VAE)
    return {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
