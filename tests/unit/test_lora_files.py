"""LoRA files: where alpha comes from, what is written, and what a bad file is told."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from longcat_pack.longcat_backend import lora_dialects, lora_files, saving
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.lora import Adapter, Difference, Factored, delta

LAYER = "transformer_blocks.0.attn.to_q"
Save = Callable[..., Path]


def pair(name: str = f"transformer.{LAYER}", rank: int = 4) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(rank, 6), f"{name}.lora_B.weight": torch.ones(8, rank)}


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, name: str = "it") -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata)
        return path

    return write


def the_adapter(path: Path) -> Any:
    (adapter,) = lora_files.read(path).adapters
    return adapter


def metadata(config: dict[str, Any]) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}


def test_alpha_comes_from_tensors_then_from_the_header_then_from_the_folder(save: Save) -> None:
    header = metadata({"r": 4, "lora_alpha": 2.0})
    name = f"base_model.model.{LAYER}"
    config = save(pair(name)).parent / "adapter_config.json"
    config.write_text(json.dumps({"lora_alpha": 32, "r": 4}), encoding="utf-8")
    assert the_adapter(save({**pair(name), f"{name}.alpha": torch.tensor(1.0)}, header)).scale == 0.25
    assert the_adapter(save(pair(name), header)).scale == 0.5
    assert the_adapter(save(pair(name))).scale == 8.0
    assert the_adapter(save(pair())).scale == 1.0  # a file of another program that lies in the same folder
    config.unlink()
    assert the_adapter(save(pair(name))).scale == 1.0


def test_the_report_says_where_alpha_came_from_and_warns_when_it_is_unknown(save: Save) -> None:
    peft = save(pair(f"base_model.model.{LAYER}"))
    note, warning = lora_files.read(peft).notes
    assert "not in the file for 1" in note and "scale 1" in note and "缩放 1" in note
    assert "WARNING" in warning and "adapter_config.json" in warning and "警告" in warning
    (peft.parent / "adapter_config.json").write_text("{}", encoding="utf-8")
    file = lora_files.read(peft)
    assert file.notes == ("alpha: 1 from adapter_config.json 来自 adapter_config.json",)
    assert file.adapters[0].alpha == 8  # PEFT's default
    (note,) = lora_files.read(save({**pair(), f"transformer.{LAYER}.alpha": torch.tensor(1.0)})).notes
    assert "from the file's tensors" in note
    (note,) = lora_files.read(save(pair())).notes
    assert "WARNING" not in note


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"alpha_pattern": {"to_q": 2.0}}, 0.5),
        ({"alpha_pattern": {"attn.to_q": 2.0}}, 0.5),
        ({"alpha_pattern": {f"^{LAYER}": 2.0}}, 0.5),
        ({"alpha_pattern": {r".*\.to_[qk]": 2.0}}, 0.5),
        ({"alpha_pattern": {"_q": 2.0}}, 4.0),  # no whole part of the name
        ({"use_rslora": True}, 8.0),  # alpha / sqrt(rank)
    ],
)
def test_patterns_and_rank_stabilised_scales_are_peft_s(config: dict[str, Any], scale: float, save: Save) -> None:
    path = save(pair(f"base_model.model.{LAYER}"))
    text = json.dumps({"r": 4, "lora_alpha": 16, **config})
    (path.parent / "adapter_config.json").write_text(text, encoding="utf-8")
    assert math.isclose(the_adapter(path).scale, scale)


def test_a_folder_is_read_as_the_file_in_it(save: Save, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2}), encoding="utf-8")
    save(pair(f"base_model.model.{LAYER}"), name="adapter_model")
    assert the_adapter(tmp_path).scale == 0.5


def test_what_is_written_names_its_layers_its_settings_and_its_trigger_words(tmp_path: Path) -> None:
    path = tmp_path / "new" / "zorb.safetensors"
    adapter = Adapter(LAYER, torch.ones(4, 6), torch.ones(8, 4), alpha=1.0)
    settings = {"model_flavour": "final", "steps": 3, "note": "佐布"}
    lora_files.write(path, [adapter], settings, trigger_words=["zorb", "佐布"])
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert set(tensors) == {f"transformer.{LAYER}.lora_A.weight", f"transformer.{LAYER}.lora_B.weight"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads(header["lora_adapter_metadata"])
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (4, 4)
    assert json.loads(header["longcat_settings"]) == settings
    assert header["modelspec.architecture"] == "longcat_image-final/lora"
    assert (header["modelspec.title"], header["modelspec.trigger_phrase"]) == ("zorb", "zorb, 佐布")
    assert torch.equal(delta(the_adapter(path)), delta(adapter))
    assert [entry.name for entry in path.parent.iterdir()] == ["zorb.safetensors"]


def test_a_write_that_fails_leaves_the_older_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "zorb.safetensors"
    adapter = Adapter(LAYER, torch.ones(4, 6), torch.ones(8, 4), 4.0)
    lora_files.write(path, [adapter])
    before = path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.os, "fsync", full)
    other = [Adapter(LAYER, torch.zeros(4, 6), torch.ones(8, 4), 4.0)]
    with pytest.raises(LongCatError, match="^The LoRA could not be written .*No space left") as caught:
        lora_files.write(path, other)
    assert caught.value.zh.startswith("LoRA 写入失败")
    monkeypatch.setattr(saving, "free_space", lambda folder: 0)
    with pytest.raises(LongCatError, match="^The LoRA needs .* Free some space\\.") as caught:
        lora_files.write(path, other)
    assert caught.value.zh.startswith("LoRA 需要") and caught.value.zh.endswith("请腾出空间。")
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(LongCatError, match="no layers"):
        lora_files.write(path, [])


def test_keys_of_other_models_parts_are_listed(save: Save) -> None:
    file = lora_files.read(save({**pair(), "lora_te_text_model_encoder.lora_up.weight": torch.ones(2, 2)}))
    assert len(file.adapters) == 1
    assert file.unmatched == ("lora_te_text_model_encoder.lora_up.weight",)
    assert file.dialect == "diffusers (official names)"


def test_a_fused_layer_becomes_its_official_ones(save: Save) -> None:
    name = "lora_unet_single_blocks_1_linear1"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.arange(56.0).view(28, 2)}
    adapters = lora_files.read(save(tensors)).adapters
    block = "single_transformer_blocks.1"
    names = [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"]
    assert [adapter.module for adapter in adapters] == names
    assert [adapter.up.shape[0] for adapter in adapters] == [4, 4, 4, 16]
    assert torch.equal(torch.cat([adapter.up for adapter in adapters]), tensors[f"{name}.lora_up.weight"])


def test_the_native_last_modulation_has_its_halves_the_other_way_around(save: Save) -> None:
    name = "diffusion_model.final_layer.adaLN_modulation.1"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 4), f"{name}.lora_B.weight": torch.tensor([[1.0], [2.0]])}
    adapter = the_adapter(save(tensors))
    assert adapter.module == "norm_out.linear"
    assert adapter.up.flatten().tolist() == [2.0, 1.0]


def test_lycoris_and_differences_become_what_they_are(save: Save) -> None:
    loha = {f"lycoris_x_embedder.hada_w{n}_{half}": torch.ones(4, 4) for n in (1, 2) for half in "ab"}
    lokr = {"lycoris_context_embedder.lokr_w1": torch.ones(2, 2), "lycoris_context_embedder.lokr_w2": torch.ones(2, 3)}
    plain = {"diffusion_model.proj_out.diff_b": torch.ones(5)}
    first, second, third = lora_files.read(save({**loha, **lokr, **plain})).adapters
    found = {adapter.module: adapter for adapter in (first, second, third)}
    assert isinstance(found["x_embedder"], Factored) and found["x_embedder"].algorithm == "loha"
    assert isinstance(found["context_embedder"], Factored) and found["context_embedder"].shape == (4, 6)
    assert isinstance(found["proj_out"], Difference) and found["proj_out"].part == "bias"


NAN = torch.tensor(float("nan"))
BAD: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "half a pair": (
        {f"transformer.{LAYER}.lora_A.weight": torch.ones(4, 6)},
        rf"transformer.{LAYER}.lora_A.weight.*lora_B / lora_up is missing",
    ),
    "alpha alone": ({f"transformer.{LAYER}.alpha": torch.tensor(1.0)}, "lora_A, lora_B is missing"),
    "two ranks": (
        {**pair(), f"transformer.{LAYER}.lora_B.weight": torch.ones(8, 3)},
        r"lora_B.weight' .* is \[8, 3\] beside \[4, 6\]",
    ),
    "a vector": ({**pair(), f"transformer.{LAYER}.lora_B.weight": torch.ones(8)}, r"is \[8\], expected a matrix"),
    "whole numbers": (
        {**pair(), f"transformer.{LAYER}.lora_B.weight": torch.ones(8, 4, dtype=torch.int8)},
        "is int8, expected numbers of floating point",
    ),
    "NaN": ({**pair(), f"transformer.{LAYER}.lora_B.weight": NAN.expand(8, 4).clone()}, "lora_B.weight.*not numbers"),
    "alpha NaN": ({**pair(), f"transformer.{LAYER}.alpha": NAN}, "alpha.*not numbers"),
    "alpha yes": ({**pair(), f"transformer.{LAYER}.alpha": torch.tensor(True)}, "alpha' .* is bool, expected numbers"),
    "two alphas": ({**pair(), f"transformer.{LAYER}.alpha": torch.ones(2)}, r"alpha' .* is \[2\], expected one number"),
    "DoRA": ({**pair(), f"transformer.{LAYER}.dora_scale": torch.ones(8, 1)}, "'dora_scale' is not supported"),
    "PEFT's DoRA": (
        {**pair(), f"transformer.{LAYER}.lora_magnitude_vector": torch.ones(8)},
        "'lora_magnitude_vector' is not supported",
    ),
    "LoRA bias": ({**pair(), f"transformer.{LAYER}.lora_B.bias": torch.ones(8)}, "'lora_B.bias' is not supported"),
    "a whole weight": ({**pair(), f"transformer.{LAYER}.weight": torch.ones(8, 6)}, "'weight' is not supported"),
    "Tucker": (
        {**pair(), f"transformer.{LAYER}.lora_mid.weight": torch.ones(4, 4, 1, 1)},
        "'lora_mid.weight' is not supported",
    ),
    "half a LoHa": ({f"lycoris_{LAYER}.hada_w1_a": torch.ones(8, 2)}, "hada_w1_b, hada_w2_a, hada_w2_b is missing"),
    "half a LoKr": (
        {f"lycoris_{LAYER}.lokr_w1": torch.ones(2, 2), f"lycoris_{LAYER}.lokr_w2_a": torch.ones(2, 2)},
        "lokr_w2_b is missing",
    ),
    "a LoKr that does not fit": (
        {
            f"lycoris_{LAYER}.lokr_w1": torch.ones(2, 2),
            f"lycoris_{LAYER}.lokr_w2_a": torch.ones(2, 2),
            f"lycoris_{LAYER}.lokr_w2_b": torch.ones(3, 2),
        },
        "expected products that fit",
    ),
    "one layer twice": (
        {**pair(), **{key: value + 1 for key, value in pair(f"diffusion_model.{LAYER}").items()}},
        "changes one layer twice",
    ),
    "one part twice": (
        {**pair(), f"transformer.{LAYER}.lora_A.default.weight": torch.ones(4, 6)},
        "changes one layer twice",
    ),
    "Stable Diffusion XL": (
        {"lora_unet_input_blocks_4_1_proj_in.lora_up.weight": torch.ones(2, 2)},
        "None of the 1 keys .* names a layer of LongCat-Image, for example: lora_unet_input",
    ),
    "nothing": ({}, "holds no tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_told_which_key_is_wrong(case: str, save: Save) -> None:
    tensors, message = BAD[case]
    with pytest.raises(LongCatError, match=message):
        lora_files.read(save(tensors))


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", None])
def test_a_damaged_file_is_named(content: bytes | None, save: Save) -> None:
    path = save(pair())
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    with pytest.raises(LongCatError, match="it.safetensors' is damaged"):
        lora_files.read(path)


@pytest.mark.parametrize("suffix", [".pt", ".CKPT", ".bin", ".pth"])
def test_a_pickle_is_not_opened(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"old{suffix}"
    path.write_bytes(pickle.dumps(_Boom()))
    for place in (path, tmp_path):  # a PEFT folder too
        with pytest.raises(LongCatError, match="is a pickle, which can run any program"):
            lora_files.read(place)


class _Boom:
    def __reduce__(self) -> Any:
        return pytest.fail, ("the pickle was opened",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"lora_alpha": "many"}', "cannot be read"),
        ('{"lora_alpha": NaN}', "cannot be read"),
        ('{"alpha_pattern": [1]}', "cannot be read"),
        ('{"alpha_pattern": {"[": 2.0}}', r"alpha_pattern '\['"),  # no regular expression; PEFT refuses it too
        ('{"peft_type": "LOHA"}', "asks for peft_type LOHA"),
        ('{"init_lora_weights": "pissa_niter_16"}', "asks for init_lora_weights pissa_niter_16"),
        ('{"use_dora": true}', "asks for use_dora"),
        ('{"bias": "all"}', "asks for bias all"),
    ],
)
def test_a_bad_configuration_is_named(text: str, message: str, save: Save) -> None:
    path = save(pair(f"base_model.model.{LAYER}"))
    (path.parent / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(LongCatError, match=f"adapter_config.json.*{message}"):
        lora_files.read(path)
    broken = save(pair(), {"lora_adapter_metadata": "{"}, name="header")
    with pytest.raises(LongCatError, match="header.safetensors: lora_adapter_metadata.*cannot be read"):
        lora_files.read(broken)


@pytest.mark.parametrize(
    "name", ["", "weight", "transformer", "lora_unet_", "a.b.c.d.e.f.g", "transformer_blocks.x.attn.to_q"]
)
def test_names_that_are_no_layers_are_not_taken_for_one(name: str) -> None:
    assert lora_dialects.parse(f"{name}.lora_A.weight") is None
