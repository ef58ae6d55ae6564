"""Official and ComfyUI layouts hold the same bits, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from longcat_pack.longcat_backend import checkpoints, component_files, layouts

Tensors = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def sound(pack_dir: Path) -> Path:
    return pack_dir / "demo" / "LongCat-Tiny"


@pytest.fixture(scope="module")
def transformer(sound: Path) -> Tensors:
    return component_files.read_weights(sound / "transformer")


@pytest.fixture(scope="module")
def vae(sound: Path) -> Tensors:
    return component_files.read_weights(sound / "vae")


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


def test_the_core_layout_is_the_one_that_comfyui_converts_to(transformer: Tensors, comfy_dir: Path) -> None:
    import comfy.model_detection

    renamed = {key.replace("time_embed.", "time_text_embed."): value.clone() for key, value in transformer.items()}
    assert_same(layouts.to_core(transformer), comfy.model_detection.convert_diffusers_mmdit(renamed, ""))


def test_the_official_layout_comes_back_bit_for_bit(transformer: Tensors) -> None:
    assert_same(layouts.to_official(dict(layouts.to_core(transformer))), transformer)


def test_the_names_of_norms_in_early_files_are_known(transformer: Tensors) -> None:
    old = {
        key.replace("_norm.weight", "_norm.scale") if "norm." in key else key: value
        for key, value in layouts.to_core(transformer).items()
    }
    assert any(key.endswith("query_norm.scale") for key in old)
    assert_same(layouts.to_official(old), transformer)


def test_shapes_are_arranged_as_tensors_are(transformer: Tensors) -> None:
    core = dict(layouts.to_core(transformer))
    assert layouts.is_core(core) and not layouts.is_core(transformer)
    shapes = checkpoints.shapes(core)
    assert layouts.arranged_shapes(layouts.plan_official(shapes), shapes) == checkpoints.shapes(transformer)


@pytest.mark.parametrize("key", ["surplus.weight", "double_blocks.0.surplus.weight"])
def test_unknown_keys_keep_their_name(key: str, transformer: Tensors) -> None:
    core = {**layouts.to_core(transformer), key: torch.ones(2)}
    official = {**transformer, key: torch.ones(2)}
    assert layouts.to_official(core)[key].shape == (2,)
    assert layouts.to_core(official)[key].shape == (2,)


def test_surplus_and_missing_rows_show_in_the_shapes(transformer: Tensors) -> None:
    shapes = checkpoints.shapes(dict(layouts.to_core(transformer)))
    rows, columns = shapes["single_blocks.0.linear1.weight"]
    for rows_found in (rows + 5, rows - 5, 1, 0):
        changed = {**shapes, "single_blocks.0.linear1.weight": torch.Size([rows_found, columns])}
        official = layouts.arranged_shapes(layouts.plan_official(changed), changed)
        assert official["single_transformer_blocks.0.proj_mlp.weight"][0] == max(0, rows_found - 3 * columns)


def test_nothing_is_copied_on_the_way_to_the_official_layout(transformer: Tensors) -> None:
    core = dict(layouts.to_core(transformer))
    query = layouts.to_official(core)["transformer_blocks.0.attn.to_q.weight"]
    assert query.data_ptr() == core["double_blocks.0.img_attn.qkv.weight"].data_ptr()


def test_the_vae_has_the_keys_that_comfyui_converts_to(vae: Tensors, comfy_dir: Path) -> None:
    import comfy.diffusers_convert

    assert_same(layouts.vae_to_single_file(vae), comfy.diffusers_convert.convert_vae_state_dict(dict(vae)))


def test_the_vae_comes_back_bit_for_bit(vae: Tensors) -> None:
    single = layouts.vae_to_single_file(vae)
    assert layouts.is_official_vae(vae) and not layouts.is_official_vae(single)
    assert_same(layouts.vae_to_official(single), vae)
    assert layouts.vae_shapes_to_official(checkpoints.shapes(single)) == checkpoints.shapes(dict(vae))


def test_the_official_vae_has_its_blocks_in_the_right_order() -> None:
    """The demo's VAE has as many channels everywhere, so only the real one tells the order of the blocks."""
    from longcat_pack.longcat_backend import official, verification

    expected = verification.vae_shapes(official.VAE)
    single = layouts.vae_to_single_file({key: torch.empty(shape, device="meta") for key, shape in expected.items()})
    assert single["decoder.up.0.block.0.conv1.weight"].shape == (128, 256, 3, 3)
    assert single["decoder.up.3.upsample.conv.weight"].shape == (512, 512, 3, 3)
    assert layouts.vae_shapes_to_official(checkpoints.shapes(single)) == expected


def test_a_prefix_is_taken_off_once() -> None:
    prefixes = layouts.TRANSFORMER_PREFIXES
    for prefix in (*prefixes, ""):
        assert layouts.without_prefix(f"{prefix}img_in.weight", prefixes) == "img_in.weight"
    assert layouts.without_prefix("model.diffusion_model.transformer.x", prefixes) == "transformer.x"
