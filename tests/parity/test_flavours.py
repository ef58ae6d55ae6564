"""What LongCatSampler draws without a setting changed, or with its flavour's: what the official pipeline draws."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longcat_pack.longcat_backend import editing, latents
from longcat_pack.longcat_backend.errors import LongCatError
from parity import edit_reference as ref
from parity import reference as text_ref

TOLERANCE = 1e-4
SOURCE = (100, 140)
AREA = 64 * 64
SEED = 7
EDIT_PROMPT, TEXT_PROMPT = "把圆形改成红色", "红圆"
FAST = {"steps": 1, "guidance": 1.0}

Parts = tuple[Any, Any, Any]


def node_defaults() -> dict[str, Any]:
    """LongCatSampler as it is when it is dropped on the canvas."""
    from longcat_pack.nodes.sampling import LongCatSampler

    inputs = {entry.id: getattr(entry, "default", None) for entry in LongCatSampler.define_schema().inputs}
    return {name: value for name, value in inputs.items() if value is not None}


def sample(parts: Parts, conditioning: tuple[Any, Any, dict[str, Any]], **changed: Any) -> torch.Tensor:
    """Packed, scaled latents that LongCatSampler draws."""
    from longcat_pack.nodes.sampling import LongCatSampler

    positive, negative, latent = conditioning
    settings = {**node_defaults(), "seed": SEED, **changed}
    output = LongCatSampler.execute(parts[0], positive, negative, latent, **settings)
    return latents.pack(parts[0].model.process_latent_in(output.args[0]["samples"]))


def load(folder: Path) -> Parts:
    from longcat_pack.longcat_backend.comfy_bridge import files, loading, vae

    checkpoint = files.Place(folder=folder).open()
    model = loading.load_model(checkpoint, "core", "fp32")
    return model, loading.load_encoder(checkpoint, "fp32"), vae.load(checkpoint)


def picture() -> Image.Image:
    blocks = np.random.default_rng(2).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(SOURCE, Image.Resampling.BICUBIC)


def edit_conditioning(parts: Parts) -> tuple[Any, Any, dict[str, Any]]:
    from longcat_pack.longcat_backend.comfy_bridge import editing as bridge

    image = torch.from_numpy(np.asarray(picture()).astype(np.float32) / 255)[None]
    return bridge.encode(parts[1], parts[2], image, EDIT_PROMPT, "", editing.canvas_size(*SOURCE, AREA))[:3]


def text_conditioning(parts: Parts) -> tuple[Any, Any, dict[str, Any]]:
    from longcat_pack.longcat_backend.comfy_bridge import clip

    encoded = (clip.encode(parts[1], prompt)[0] for prompt in (TEXT_PROMPT, ""))
    return *encoded, {"samples": latents.empty_latent(64, 64, 1)}


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def folders(folder: Path) -> dict[str, Path]:
    """A checkpoint of each flavour that is sampled in another way."""
    demos = {"edit": "LongCat-Tiny-Edit", "edit-turbo": "LongCat-Tiny-Edit-Turbo"}
    return {"final": folder, **{key: folder.with_name(name) for key, name in demos.items()}}


@pytest.fixture(scope="module")
def parts(comfy_dir: Path, folders: dict[str, Path]) -> dict[str, Parts]:
    """MODEL, CLIP and VAE of each flavour in fp32."""
    return {key: load(path) for key, path in folders.items()}


@torch.inference_mode()
def test_untouched_it_edits_as_the_untouched_pipeline(parts: dict[str, Parts], folders: dict[str, Path]) -> None:
    expected = ref.draw(ref.pipeline(folders["edit"]), picture(), EDIT_PROMPT, AREA, seed=SEED)
    assert relative_error(sample(parts["edit"], edit_conditioning(parts["edit"])), expected) <= TOLERANCE


@torch.inference_mode()
def test_untouched_it_draws_as_the_untouched_pipeline(parts: dict[str, Parts], reference: Any) -> None:
    expected = text_ref.draw(reference, TEXT_PROMPT, seed=SEED, output="latent", height=64, width=64)
    assert relative_error(sample(parts["final"], text_conditioning(parts["final"])), expected) <= TOLERANCE


@pytest.mark.parametrize(("key", "steps"), [("final", 50), ("edit", 50), ("edit-turbo", 8)])
def test_flavour_defaults_are_the_official_settings(parts: dict[str, Parts], key: str, steps: int) -> None:
    from longcat_pack.longcat_backend.comfy_bridge.sampling import Settings, settle

    expected = Settings(steps, 1.0 if key == "edit-turbo" else 4.5, key == "final")
    own = Settings(3, 2.0, not expected.renorm)
    assert settle(parts[key][0], [], own, flavour_defaults=True) == expected
    assert settle(parts[key][0], [], own) == own
    untouched = node_defaults()
    assert key == "edit-turbo" or (untouched["steps"], untouched["guidance"]) == (expected.steps, expected.guidance)


@torch.inference_mode()
def test_turbo_takes_eight_forwards_without_guidance(parts: dict[str, Parts], folders: dict[str, Path]) -> None:
    settings = {"num_inference_steps": 8, "guidance_scale": 1.0}
    expected = ref.draw(ref.pipeline(folders["edit-turbo"]), picture(), EDIT_PROMPT, AREA, seed=SEED, **settings)
    conditioning = edit_conditioning(parts["edit-turbo"])
    batches: list[int] = []
    network = parts["edit-turbo"][0].model.diffusion_model
    hook = network.register_forward_pre_hook(lambda _, args: batches.append(args[0].shape[0]))
    try:
        drawn = sample(parts["edit-turbo"], conditioning, flavour_defaults=True)
    finally:
        hook.remove()
    assert batches == [1] * 8
    assert relative_error(drawn, expected) <= TOLERANCE


@torch.inference_mode()
def test_what_a_flavour_was_not_made_for_is_said(parts: dict[str, Parts], caplog: pytest.LogCaptureFixture) -> None:
    def said(key: str, conditioning: Any, **changed: Any) -> str:
        caplog.clear()
        sample(parts[key], conditioning, **{**FAST, **changed})
        return " ".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")

    edit, text = edit_conditioning(parts["edit"]), text_conditioning(parts["final"])
    assert "LongCatSampler: the checkpoint is LongCat-Image final, which draws from text" in said("final", edit)
    assert "LongCatSampler: the checkpoint is LongCat-Image edit, which edits" in said("edit", text)
    assert "made for 8 steps without guidance" in said("edit-turbo", edit, guidance=4.5)
    assert not said("final", text) and not said("edit", edit) and not said("edit-turbo", edit)
    assert not said("edit-turbo", edit, guidance=4.5, flavour_defaults=True)


@torch.inference_mode()
def test_the_flavour_of_a_model_from_elsewhere_is_not_guessed(parts: dict[str, Parts]) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import formats

    model, *others = parts["edit"]
    unknown = model.clone()
    formats.attach_source(unknown, None)  # as core's loaders leave it
    conditioning = edit_conditioning(parts["edit"])
    assert sample((unknown, *others), conditioning, **FAST).isfinite().all()
    with pytest.raises(LongCatError, match="flavour_defaults is on.*its flavour is not known"):
        sample((unknown, *others), conditioning, flavour_defaults=True)
