"""An edit starts from the official conditioning and ends at the picture of the reference pipeline."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from longcat_pack.longcat_backend import editing, latents
from parity import edit_reference as ref
from parity.test_mps import emulated_mac

FIXTURE = Path(__file__).with_name("reference_edit_embeddings.safetensors")
TOLERANCE = 1e-5
LATENT_TOLERANCE = 1e-4
AREA = 128 * 128
PROMPT = 'make the circle "A7" yellow'
NEGATIVE = "模糊"
STEPS = 4
SEED = 11
# Landscape, portrait, square, and 1452×1920 scaled down.
SIZES = ((192, 108), (90, 160), (100, 100), (145, 192))
ENGINES = ("core", "diffusers")
Loaded = Callable[[str], tuple[Any, Any, Any]]


@pytest.fixture(scope="module")
def edit_folder(pack_dir: Path) -> Path:
    """The edit demo."""
    return pack_dir / "demo" / "LongCat-Tiny-Edit"


@pytest.fixture(scope="module")
def edit_loaded(comfy_dir: Path, edit_folder: Path) -> Loaded:
    """MODEL, CLIP and VAE of the edit checkpoint in fp32 for an engine, loaded once."""
    from longcat_pack.longcat_backend.comfy_bridge import files, loading, vae

    checkpoint = files.Place(folder=edit_folder).open()
    clip, decoder = loading.load_encoder(checkpoint, "fp32"), vae.load(checkpoint)
    return functools.cache(lambda engine: (loading.load_model(checkpoint, engine, "fp32"), clip, decoder))


@pytest.fixture(scope="module")
def edit_reference(edit_folder: Path) -> Any:
    """Diffusers' edit pipeline at the official positions."""
    return ref.pipeline(edit_folder)


def official() -> list[tuple[str, Image.Image, torch.Tensor]]:
    """Prompt, half-size picture and embeddings made with transformers 4.57.1; the last row stands for all pads."""
    with safe_open(FIXTURE, framework="pt") as file:
        return [
            (
                prompt,
                Image.fromarray(file.get_tensor(f"{index}.picture").numpy()),
                file.get_tensor(f"{index}.embeddings"),
            )
            for index, prompt in enumerate(json.loads(file.metadata()["prompts"]))
        ]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse random blocks, enlarged smoothly."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def as_image(*pictures: Image.Image) -> torch.Tensor:
    """Pictures as ComfyUI's LoadImage gives them."""
    return torch.stack([torch.from_numpy(np.array(each).astype(np.float32) / 255) for each in pictures])


def encode(loaded: Loaded, image: torch.Tensor, size: tuple[int, int], prompt: str = PROMPT) -> Any:
    from longcat_pack.longcat_backend.comfy_bridge import editing as bridge

    _, clip, vae = loaded("core")
    return bridge.encode(clip, vae, image, prompt, NEGATIVE, editing.canvas_size(*size, AREA))[:3]


@pytest.mark.parametrize("index", range(len(official())))
@torch.inference_mode()
def test_embeddings_equal_the_official_ones(index: int, edit_loaded: Loaded) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import clip as clip_bridge
    from longcat_pack.longcat_backend.comfy_bridge import editing as bridge

    prompt, half, expected = official()[index]
    _, clip, _ = edit_loaded("core")
    inputs = bridge._vision(clip).inputs([half], clip.tokenizer.tokenizer)
    tokens = clip.tokenizer.inspect(prompt)
    found = clip.encode_from_tokens(clip_bridge.edit_tokens(tokens.ids, inputs))[0]
    real = len(expected) - 1
    assert len(found) == 514 + inputs[0].picture.rows * inputs[0].picture.columns
    assert relative_error(found[:real], expected[:real]) <= TOLERANCE
    assert relative_error(found[real:], expected[real:].expand(len(found) - real, -1)) <= TOLERANCE


def test_the_reference_pipeline_of_these_tests_is_official_too(edit_reference: Any) -> None:
    for prompt, half, expected in official():
        with torch.no_grad():
            found = edit_reference._encode_prompt([prompt], half)[0]
        assert relative_error(found[: len(expected)], expected) <= TOLERANCE


@functools.cache
def reference_run(pipe: Any, size: tuple[int, int], scale: float) -> torch.Tensor:
    settings = {"guidance_scale": scale, "num_inference_steps": STEPS, "negative_prompt": NEGATIVE}
    return ref.draw(pipe, picture(*size), PROMPT, AREA, seed=SEED, **settings)


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.inference_mode()
def test_conditioning_equals_the_pipelines(size: tuple[int, int], edit_loaded: Loaded, edit_reference: Any) -> None:
    positive, negative, latent = encode(edit_loaded, as_image(picture(*size)), size)
    width, height = editing.canvas_size(*size, AREA)
    canvas = edit_reference.image_processor.resize(picture(*size), height, width)
    half = edit_reference.image_processor.resize(canvas, height // 2, width // 2)
    for found, prompt in ((positive, PROMPT), (negative, NEGATIVE)):
        assert relative_error(found[0][0], edit_reference._encode_prompt([prompt], half)) <= TOLERANCE
        assert torch.equal(found[0][1]["reference_latents"][0], latent["samples"])
        # What core does by itself for one reference; said in words in case that changes.
        assert found[0][1]["reference_latents_method"] == "index"
    assert latent["samples"].shape == (1, latents.CHANNELS, height // 8, width // 8)
    pixels = edit_reference.image_processor.preprocess(canvas, height, width)
    expected = edit_reference._encode_vae_image(pixels, None)
    model, _, _ = edit_loaded("core")
    assert relative_error(model.model.process_latent_in(latent["samples"]), expected) <= TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.inference_mode()
def test_full_run_equals_the_pipeline(
    engine: str, scale: float, size: tuple[int, int], edit_loaded: Loaded, edit_reference: Any
) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import guidance, sampling

    expected = reference_run(edit_reference, size, scale)
    positive, negative, latent = encode(edit_loaded, as_image(picture(*size)), size)
    model, _, _ = edit_loaded(engine)
    patched = guidance.patch(model, renorm=True)  # which counts for text to image alone
    sigmas = sampling.schedule(patched, latent, STEPS)
    drawn = sampling.sample(patched, positive, negative, latent, sigmas, scale, SEED)["samples"]
    assert relative_error(latents.pack(model.model.process_latent_in(drawn)), expected) <= LATENT_TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
@torch.inference_mode()
def test_an_emulated_mac_edits_alike(
    engine: str, edit_folder: Path, edit_reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another device than the CPU: everything is brought there, and nothing float64 is."""
    from longcat_pack.longcat_backend.comfy_bridge import files, guidance, loading, sampling, vae

    size = SIZES[0]
    expected = reference_run(edit_reference, size, 4.5)
    with emulated_mac(monkeypatch, fp32_vae=True, gpu_only=True):
        checkpoint = files.Place(folder=edit_folder).open()
        model = loading.load_model(checkpoint, engine, "fp32")
        parts = model, loading.load_encoder(checkpoint, "fp32"), vae.load(checkpoint)
        positive, negative, latent = encode(lambda _: parts, as_image(picture(*size)), size)
        tower = parts[1].cond_stage_model.vision.encoder.tower
        assert {weight.device.type for weight in (*tower.parameters(), *tower.buffers())} == {"mps"}
        patched = guidance.patch(model, renorm=False)
        sigmas = sampling.schedule(patched, latent, STEPS)
        drawn = sampling.sample(patched, positive, negative, latent, sigmas, 4.5, SEED)["samples"]
        packed = latents.pack(model.model.process_latent_in(drawn)).cpu()
    assert relative_error(packed, expected) <= LATENT_TOLERANCE
