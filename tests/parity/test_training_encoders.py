"""What the trainer learns from is what the nodes give, and what it draws on the way is what they draw."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import edit_checkpoint
import pytest
import torch

from longcat_pack.longcat_backend import labelled_grid, latents, sampler
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training import base, dataset
from parity import reference as official

Loaded = Callable[[str], tuple[Any, Any, Any]]
PROMPT = 'a large red star at the top with "A7"'


@pytest.fixture(scope="module")
def encoders(loaded: Loaded) -> Any:
    """Those of the demo checkpoint's CLIP and VAE."""
    from longcat_pack.longcat_backend.comfy_bridge.training_encoders import GraphEncoders

    _, clip, vae = loaded("core")
    return GraphEncoders(clip, vae, "test")


def pixels(size: tuple[int, int]) -> torch.Tensor:
    """A picture (1, 3, height, width) in -1..1 of whole 8-bit values."""
    values = torch.randint(0, 256, (1, 3, size[1], size[0]), generator=torch.Generator().manual_seed(3))
    return values / 127.5 - 1


def test_captions_are_encoded_as_prompts_are(loaded: Loaded, encoders: Any) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import clip as clip_bridge

    for prompt in (PROMPT, "左边有一个佐布", ""):
        conditioning, _ = clip_bridge.encode(loaded("core")[1], prompt)
        assert torch.equal(encoders.text(prompt, None), conditioning[0][0][0])


def test_pictures_become_the_pipelines_latents(encoders: Any, reference: Any) -> None:
    given = pixels((96, 64))
    config = reference.vae.config
    with torch.no_grad():
        expected = (reference.vae.encode(given).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    torch.testing.assert_close(encoders.latents(given), expected, atol=1e-4, rtol=1e-4)
    decoded = encoders.pixels(expected)
    with torch.no_grad():
        shown = reference.vae.decode(expected / config.scaling_factor + config.shift_factor).sample[0]
    torch.testing.assert_close(decoded, (shown.movedim(0, -1) / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_instructions_are_encoded_as_edits_are(folder: Path, tmp_path: Path, encoders: Any) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import editing, files, loading
    from longcat_pack.longcat_backend.comfy_bridge.training_encoders import GraphEncoders

    checkpoint = files.Place(folder=edit_checkpoint.make(folder, tmp_path / "Tiny-Edit")).open()
    clip = loading.load_encoder(checkpoint, "fp32")
    own = GraphEncoders(clip, encoders.vae, "test")
    picture = pixels((96, 64))
    image = (picture.movedim(1, -1) + 1) / 2
    positive, negative, latent, _ = editing.encode(clip, encoders.vae, image, "make it red", "", (96, 64))
    assert torch.equal(own.text("make it red", picture), positive[0][0][0])
    assert torch.equal(own.text("", picture), negative[0][0][0])
    config = checkpoint.configs["vae"]
    scaled = (latent["samples"] - config["shift_factor"]) * config["scaling_factor"]
    torch.testing.assert_close(own.latents(picture), scaled, atol=1e-5, rtol=1e-5)


def test_identities_tell_weights_and_precisions_apart(loaded: Loaded, encoders: Any) -> None:
    from longcat_pack.longcat_backend.comfy_bridge.training_encoders import GraphEncoders

    _, clip, vae = loaded("core")
    again = GraphEncoders(clip, vae, "test")
    assert (again.encoder_identity, again.vae_identity) == (encoders.encoder_identity, encoders.vae_identity)
    weight = next(vae.first_stage_model.parameters())
    kept = weight.data
    weight.data = kept * 1.01
    assert GraphEncoders(clip, vae, "test").vae_identity != encoders.vae_identity
    weight.data = kept
    encoder = clip.cond_stage_model.encoder
    encoder.dtype, dtype = torch.bfloat16, encoder.dtype
    assert GraphEncoders(clip, vae, "test").encoder_identity != encoders.encoder_identity
    encoder.dtype = dtype


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_the_bare_model_draws_the_pipelines_picture(
    loaded: Loaded, encoders: Any, reference: Any, guidance: float
) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import formats

    checkpoint = formats.source(loaded("core")[0].clone())
    model = base.load_base(checkpoint, "fp32", torch.device("cpu"))
    prompt = sampler.Prompt(encoders.text(PROMPT, None), encoders.text("", None))
    settings = {"guidance_scale": guidance, "num_inference_steps": 3, "height": 64, "width": 96}
    expected = official.draw(reference, PROMPT, seed=5, output="latent", **settings)
    drawn = sampler.sample(
        model, prompt, (96, 64), 5, 3, guidance, torch.device("cpu"), checkpoint.configs["scheduler"]
    )
    difference = (latents.pack(drawn) - expected).norm() / expected.norm()
    assert difference <= 1e-4


def test_a_model_of_unknown_origin_is_refused(loaded: Loaded) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import training_request

    model = loaded("core")[0]
    assert training_request.require_checkpoint(model.clone()).flavour.key == "final"
    stranger = model.clone()
    stranger.attachments = {}
    with pytest.raises(LongCatError, match="not known where this MODEL was loaded from"):
        training_request.require_checkpoint(stranger)
    with pytest.raises(LongCatError, match="LongCatLoader"):
        training_request.require_checkpoint(None)


def test_a_dataset_for_another_task_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import training_request

    for name in ("a", "b"):
        (tmp_path / "set" / "references").mkdir(parents=True, exist_ok=True)
        for folder in (tmp_path / "set", tmp_path / "set" / "references"):
            labelled_grid.as_image((pixels((128, 128))[0].movedim(0, -1) + 1) / 2).save(folder / f"{name}.png")
        (tmp_path / "set" / f"{name}.txt").write_text("make it red", encoding="utf-8")
    pairs = dataset.read_folder(dataset.DatasetSettings(folder="set", resolutions="128"), [tmp_path])
    checkpoint = training_request.require_checkpoint(loaded("core")[0])
    with pytest.raises(LongCatError, match="LongCat-Image-Edit"):
        training_request.require_task(checkpoint, pairs)
