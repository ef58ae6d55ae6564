"""Sizes, packing and positions, against diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers import LongCatImagePipeline
from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids

from longcat_pack.longcat_backend import latents
from longcat_pack.longcat_backend.errors import LongCatError

SIZES = [(128, 128), (192, 128), (1344, 768), (16, 16)]
SCALING = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def noise(width: int, height: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 16, height // 8, width // 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_packing_is_the_pipelines_and_unpacking_its_inverse(width: int, height: int) -> None:
    samples = noise(width, height)
    packed = latents.pack(samples)
    assert torch.equal(packed, LongCatImagePipeline._pack_latents(samples, 2, 16, height // 8, width // 8))
    assert packed.shape == (2, latents.token_count(samples), latents.PACKED_CHANNELS)
    assert torch.equal(latents.unpack(packed, height // 8, width // 8), samples)
    assert torch.equal(LongCatImagePipeline._unpack_latents(packed, height, width, 8), samples)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_position_ids_are_the_pipelines(width: int, height: int) -> None:
    rows, columns = height // 16, width // 16
    text, image = latents.position_ids(512, [(height // 8, width // 8)])
    expected = prepare_pos_ids(modality_id=1, type="image", start=(512, 512), height=rows, width=columns)
    assert torch.equal(image, expected)
    assert torch.equal(text, prepare_pos_ids(modality_id=0, type="text", start=(0, 0), num_token=512))
    assert image.dtype == text.dtype == torch.float32


def test_reference_images_get_the_next_modalities_at_the_same_start() -> None:
    _, ids = latents.position_ids(600, [(4, 4), (4, 6)])
    expected = [
        prepare_pos_ids(modality_id=modality, type="image", start=(600, 600), height=2, width=columns)
        for modality, columns in ((1, 2), (2, 3))
    ]
    assert torch.equal(ids, torch.cat(expected))


@pytest.mark.parametrize(("height", "width", "tokens"), [(2, 2, 1), (3, 2, 2), (3, 5, 6), (128, 128, 4096)])
def test_an_odd_side_takes_a_whole_patch(height: int, width: int, tokens: int) -> None:
    assert latents.token_count(torch.empty(1, 16, height, width)) == tokens


def test_every_aspect_is_drawable_and_named_after_its_size() -> None:
    for name, (width, height) in latents.ASPECTS.items():
        latents.check_size(width, height)
        assert f"({width}x{height})" in name
        assert width % latents.GRID == height % latents.GRID == 0
        left, right = map(int, name.split(" ")[0].split(":"))
        assert width / height == pytest.approx(left / right, rel=0.05)
        assert 0.9 <= width * height / 1024**2 <= 1.02


@pytest.mark.parametrize(
    ("side", "near"),
    [(1000, "992 / 1008"), (1, "16 / 32"), (0, "16 / 32"), (-5, "16 / 32"), (4090, "4080 / 4096"), (5000, "4096.")],
)
def test_a_side_off_the_grid_is_refused_with_the_nearest_sizes(side: int, near: str) -> None:
    with pytest.raises(LongCatError) as caught:
        latents.check_size(side, 1024)
    assert f"width {side} " in caught.value.en and f"Use {near}" in caught.value.en
    assert near.rstrip(".") in caught.value.zh
    with pytest.raises(LongCatError, match=f"height {side} "):
        latents.check_size(1024, side)


@pytest.mark.parametrize("batch", [0, -1, 65])
def test_a_batch_out_of_range_is_refused(batch: int) -> None:
    with pytest.raises(LongCatError, match=f"batch_size is {batch}"):
        latents.empty_latent(64, 64, batch)


def test_an_empty_latent_has_the_shape_of_its_picture() -> None:
    latent = latents.empty_latent(192, 128, 3)
    assert latent.shape == (3, 16, 16, 24)
    assert not latent.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_counted(value: float) -> None:
    samples = noise(64, 64)
    latents.check_finite(samples)
    samples[:, 0, 0, 0] = value
    with pytest.raises(LongCatError, match="holds 2 values"):
        latents.check_finite(samples)


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 4, 8, 8), (1, 16, 1, 8, 8), (0, 16, 8, 8), (1, 16, 8, 0), ()])
def test_another_models_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LongCatError, match="expected"):
        latents.check_unpacked(torch.zeros(shape))
    latents.check_unpacked(torch.zeros(1, 16, 1, 1))


@pytest.mark.parametrize("given", [(0, 0), (128, 128)])
def test_packed_latents_come_back_unscaled(given: tuple[int, int]) -> None:
    samples = noise(128, 128)
    scaled = (samples - SCALING["shift_factor"]) * SCALING["scaling_factor"]
    unpacked = latents.unpack_scaled(latents.pack(scaled), SCALING, *given)
    assert torch.allclose(unpacked, samples, atol=1e-5)


@pytest.mark.parametrize(("width", "height"), [(128, 256), (128, 0), (136, 128), (4096, 4096)])
def test_packed_latents_of_another_size_are_refused(width: int, height: int) -> None:
    with pytest.raises(LongCatError):
        latents.unpack_scaled(torch.zeros(1, 64, 64), SCALING, width, height)
