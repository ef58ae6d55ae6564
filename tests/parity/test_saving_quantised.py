"""A model that optimum-quanto or torchao quantised is saved as it is, and says the same when it is loaded again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longcat_pack.longcat_backend import checkpoints, component_files, precision, quantisation, single_files
from longcat_pack.longcat_backend import quantised_state as states
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training import base
from parity.saved_models import embeddings, load, save, saved, velocity

CPU = torch.device("cpu")
NAMES = ("int8-quanto", "int4-quanto")
TO_Q = "diffusion_model.velocity.transformer.transformer_blocks.0.attn.to_q.weight"


@pytest.fixture
def source(folder: Path) -> checkpoints.Checkpoint:
    return checkpoints.open_checkpoint(folder)


def weights(models: Path, part: str = "transformer") -> Path:
    names = {"transformer": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
    return models / "longcat_image" / "mine" / part / names[part]


def rewrite(path: Path, tensors: dict[str, torch.Tensor], layers: str) -> None:
    path.unlink()
    save_file(tensors, path, {"format": "pt", component_files.PACKED_LAYERS: layers})


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_says_the_same_and_is_not_quantised_again(
    name: str, models: Path, source: checkpoints.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantised_anew(*args: Any) -> None:
        raise AssertionError("other weights than the file holds")

    parts = load(source, "auto", name, "int8-quanto")
    report = save(parts, "folder")
    assert f"transformer: {name}\n" in report and "text_encoder: int8-quanto\n" in report
    again = saved(models, "folder")
    assert again.configs == source.configs and again.flavour == source.flavour
    with monkeypatch.context() as patch:
        patch.setattr(quantisation, "quantise", quantised_anew)
        model, clip, vae = load(again, "auto", "auto", "auto")
    assert torch.equal(velocity(model), velocity(parts[0]))
    assert torch.equal(embeddings(clip), embeddings(parts[1]))
    assert not torch.equal(velocity(model), velocity(load(source, "diffusers", "fp32")[0]))
    transformer, encoder = model.model.diffusion_model.velocity.transformer, clip.cond_stage_model.encoder.model
    quantisation.verify(transformer, "transformer", precision.PRESETS[name])
    quantisation.verify(encoder, "text_encoder", precision.PRESETS["int8-quanto"])
    assert model.model.diffusion_model.dtype == parts[0].model.diffusion_model.dtype
    before = [weights(models, part).read_bytes() for part in ("transformer", "text_encoder")]
    save((model, clip, vae), "folder", overwrite=True)
    assert [weights(models, part).read_bytes() for part in ("transformer", "text_encoder")] == before


def test_a_file_is_as_small_as_the_model(models: Path, source: checkpoints.Checkpoint) -> None:
    sizes = {}
    for name in ("bf16", *NAMES):
        save(load(source, "diffusers", name), "folder", overwrite=True)
        sizes[name] = sum(value.nbytes for value in load_file(weights(models)).values())
        assert (states.stored_preset(saved(models, "folder"), "transformer") is None) == (name == "bf16")
    assert sizes["int4-quanto"] < sizes["int8-quanto"] < sizes["bf16"] * 1.05


@pytest.mark.parametrize(
    ("engine", "name", "encoder", "words"),
    [
        (
            "auto",
            "bf16",
            "auto",
            "transformer of .* is stored in int8-quanto and cannot be loaded as bf16",
        ),
        ("diffusers", "int4-quanto", "auto", "cannot be loaded as int4-quanto"),
        ("core", "auto", "auto", "the engine core does not have"),
        ("auto", "auto", "fp8", "text_encoder of .* is stored in int8-quanto and cannot be loaded as fp8"),
    ],
)
def test_another_choice_than_the_file_is_refused(
    engine: str, name: str, encoder: str, words: str, models: Path, source: checkpoints.Checkpoint
) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import loading

    save(load(source, "auto", "int8-quanto", "int8-quanto"), "folder")
    with pytest.raises(LongCatError, match=words):
        load(saved(models, "folder"), engine, name, encoder)
    with pytest.raises(LongCatError, match=words):
        loading.check("mine", engine, name, encoder, None)


def test_group_offload_is_refused_by_the_precision_of_the_file(models: Path, source: checkpoints.Checkpoint) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import loading
    from longcat_pack.longcat_backend.memory import GroupOffload

    save(load(source, "auto", "int8-quanto"), "folder")
    with pytest.raises(LongCatError, match="cannot move weights of the precision 'int8-quanto'"):
        loading.check("mine", "auto", None, None, GroupOffload("block"))


def test_other_libraries_refuse_the_folder_instead_of_random_layers(
    models: Path, source: checkpoints.Checkpoint
) -> None:
    from diffusers import LongCatImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    save(load(source, "auto", "int8-quanto", "int8-quanto"), "folder")
    target = models / "longcat_image" / "mine"
    with pytest.raises(ValueError, match="has no `quant_method` attribute"):
        LongCatImageTransformer2DModel.from_pretrained(target / "transformer")
    with pytest.raises(ValueError, match="has no `quant_method` attribute"):
        Qwen2_5_VLForConditionalGeneration.from_pretrained(target / "text_encoder")


def test_comfyui_has_no_file_for_these_weights(models: Path, source: checkpoints.Checkpoint) -> None:
    model, clip, vae = load(source, "auto", "int8-quanto", "int8-quanto")
    for parts in ((model, None, None), (None, clip, None)):
        with pytest.raises(LongCatError, match="for which ComfyUI has no file layout"):
            save(parts, "comfyui")
        with pytest.raises(LongCatError, match="int8-quanto; quantising it again as fp8 would lose more"):
            save(parts, "comfyui", "fp8")
    assert not any(models.rglob("*.*"))


@pytest.mark.parametrize("layout", ["folder", "comfyui"])
@pytest.mark.parametrize("name", NAMES)
def test_quantised_weights_can_be_multiplied_out(
    name: str, layout: str, models: Path, source: checkpoints.Checkpoint
) -> None:
    parts = load(source, "auto", name, "int8-quanto")
    save(parts, layout, "fp32")
    again = saved(models, layout)
    assert all(again.packed(part) is None for part in single_files.PARTS)
    plain = load(again, "diffusers", "fp32", "fp32")
    torch.testing.assert_close(velocity(plain[0]), velocity(parts[0]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(embeddings(plain[1]), embeddings(parts[1]), rtol=1e-3, atol=1e-3)


def test_loras_beside_quantised_weights_are_not_left_out_silently(models: Path, source: checkpoints.Checkpoint) -> None:
    from comfy.weight_adapter import LoRAAdapter

    model, clip, vae = load(source, "auto", "int8-quanto")
    before = velocity(model)
    rows, columns = model.model.diffusion_model.velocity.transformer.transformer_blocks[0].attn.to_q.weight.shape
    lora = LoRAAdapter(set(), (torch.ones(rows, 2), torch.ones(2, columns), 2.0, None, None, None))
    patched = model.clone()
    patched.add_patches({TO_Q: lora}, 1.0)
    changed = velocity(patched)
    assert not torch.equal(changed, before)
    for layout, name in (("folder", "keep"), ("folder", "fp32"), ("comfyui", "bf16")):
        with pytest.raises(LongCatError, match="has LoRAs on 1 weights beside those in int8-quanto"):
            save((patched, clip, vae), layout, name)
    assert not any(models.rglob("*.*"))
    save((model, clip, vae), "folder")  # the other clone is the one that is loaded
    again = load(saved(models, "folder"), "auto", "auto")[0]
    assert torch.equal(velocity(again), before)
    again.add_patches({TO_Q: lora}, 1.0)
    assert torch.equal(velocity(again), changed)


def test_training_takes_the_base_as_the_file_holds_it(models: Path, source: checkpoints.Checkpoint) -> None:
    model, clip, vae = load(source, "auto", "int8-quanto")
    save((model, clip, vae), "folder")
    again = saved(models, "folder")
    trained = base.load_base(again, "int8-quanto", CPU)
    loaded, preset = model.model.diffusion_model.velocity, precision.PRESETS["int8-quanto"]
    expected, found = (states.quantised_state(one.transformer, preset)[0] for one in (loaded, trained))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    for other in ("bf16", "int4-quanto"):
        with pytest.raises(LongCatError, match="stored in int8-quanto, and can be used in that precision only"):
            base.load_base(again, other, CPU)


def test_training_refuses_another_base_precision_before_it_encodes(
    models: Path, source: checkpoints.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import training, training_request
    from longcat_pack.longcat_backend.training import headless

    def encoded(*args: Any) -> None:
        raise AssertionError("hours of work before the refusal")

    model, clip, vae = load(source, "auto", "int8-quanto")
    save((model, clip, vae), "folder")
    settings = SimpleNamespace(base_precision="bf16")
    config = SimpleNamespace(notes=(), checkpoint=models / "longcat_image" / "mine", settings=settings)
    monkeypatch.setattr(headless, "_dataset", encoded)
    monkeypatch.setattr(training_request, "require_task", encoded)
    with pytest.raises(LongCatError, match="stored in int8-quanto"):
        headless.train(cast(Any, config), CPU, lambda: False)
    again = load(saved(models, "folder"), "auto", "auto")[0]
    with pytest.raises(LongCatError, match="stored in int8-quanto"):
        training.train(again, clip, vae, cast(Any, None), cast(Any, SimpleNamespace(settings=settings)))


def test_the_compute_dtype_is_that_of_the_file(
    models: Path, source: checkpoints.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import auto, devices
    from longcat_pack.longcat_backend.devices import DevicePolicy

    with monkeypatch.context() as patch:
        patch.setattr(auto, "dtype", lambda *args: torch.bfloat16)
        parts = load(source, "auto", "int8-quanto", "int8-quanto")
    save(parts, "folder")
    model, clip, _ = load(saved(models, "folder"), "auto", "auto", "auto")
    assert model.model.diffusion_model.dtype == clip.cond_stage_model.encoder.dtype == torch.bfloat16
    assert torch.equal(velocity(model), velocity(parts[0]))
    assert torch.equal(embeddings(clip), embeddings(parts[1]))
    preset = precision.PRESETS["int8-quanto"]
    for part in ("transformer", "text_encoder"):
        assert auto.dtype(saved(models, "folder"), part, preset, devices.policy()) is torch.bfloat16
        assert auto.dtype(source, part, preset, devices.policy()) is torch.float32
    monkeypatch.setattr(DevicePolicy, "holds", lambda self, dtype: dtype != torch.bfloat16)
    for at in (0, 1):
        with pytest.raises(LongCatError, match="quantised beside weights in bfloat16, which this device"):
            load_one(at, saved(models, "folder"))


def load_one(place: int, checkpoint: checkpoints.Checkpoint) -> Any:
    from longcat_pack.longcat_backend.comfy_bridge import loading

    return loading.load_encoder(checkpoint, "auto") if place else loading.load_model(checkpoint, "auto", "auto")


def test_auto_counts_a_quantised_part_as_it_is_stored(
    models: Path, source: checkpoints.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longcat_pack.longcat_backend import memory

    save(load(source, "auto", "int4-quanto"), "folder")
    weighed = []
    weigh = memory.weigh

    def note(shapes: Any, part: str, preset: precision.Preset, *args: Any) -> memory.Weights:
        weights = weigh(shapes, part, preset, *args)
        weighed.append((part, preset.name, weights.total))
        return weights

    monkeypatch.setattr(memory, "weigh", note)
    load_one(1, saved(models, "folder"))
    stored = sum(value.nbytes for value in load_file(weights(models)).values())
    sizes = {total for part, name, total in weighed if part == "transformer" and name == "int4-quanto"}
    assert {name for part, name, _ in weighed if part == "transformer"} == {"int4-quanto"}
    assert len(sizes) == 1 and 0.8 < sizes.pop() / stored <= 1  # the scales are not counted


def test_a_file_that_contradicts_its_map_is_refused(models: Path, source: checkpoints.Checkpoint) -> None:
    from longcat_pack.longcat_backend import verification

    save(load(source, "auto", "int8-quanto"), "folder")
    path = weights(models)
    with safe_open(path, "pt") as file:
        layers = json.loads(file.metadata()[component_files.PACKED_LAYERS])
    stored = load_file(path)
    one = next(iter(layers))
    less = {key: value for key, value in stored.items() if key != f"{one}.weight._scale"}
    other = {**stored, f"{one}.weight._data": stored[f"{one}.weight._data"].float()}
    foreign = {**stored, f"{one}.bias": stored[f"{one}.bias"].to(torch.int8)}
    for tensors, text, words in (
        (stored, "{", "damaged"),
        (stored, "[]", "damaged"),
        (stored, '{"x": 1}', "damaged"),
        (stored, "{}", "stored as I8, which is a quantised or foreign format"),
        (stored, json.dumps({**layers, one: "int4-quanto"}), "'int4-quanto', 'int8-quanto'"),
        (stored, json.dumps(dict.fromkeys(layers, "fp8")), "'fp8', which this pack cannot load"),
        (stored, json.dumps({**layers, "nowhere": "int8-quanto"}), "layer 'nowhere'"),
        (less, json.dumps(layers), f"1 missing: {one}.weight._scale"),
        (other, json.dumps(layers), f"hold float32 in '{one}.weight._data'"),
        (foreign, json.dumps(layers), f"'{one}.bias' is stored as I8"),
    ):
        rewrite(path, tensors, text)
        with pytest.raises(LongCatError, match=words):
            verification.verify(saved(models, "folder"))


def test_fp8_is_saved_anywhere_and_loaded_where_it_can_be_multiplied(
    models: Path, source: checkpoints.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longcat_pack.longcat_backend import verification
    from longcat_pack.longcat_backend.comfy_bridge import auto
    from longcat_pack.longcat_backend.devices import DevicePolicy

    layers = importlib.import_module("longcat_pack.longcat_backend.torchao_layers")
    api = importlib.import_module("torchao.quantization.quant_api")
    name, states_of = "fp8-torchao", []
    with monkeypatch.context() as patch:
        patch.setattr(layers, "multiplies_fp8_by_row", lambda device: True)
        patch.setattr(api, "_check_hardware_support", lambda granularity: None)
        patch.setattr(DevicePolicy, "require", lambda *args, **kwargs: None)
        patch.setattr(auto, "dtype", lambda *args: torch.bfloat16)
        model, clip, vae = load(source, "auto", name)
        report = save((model, clip, vae), "folder")
        again = load(saved(models, "folder"), "auto", "auto")[0]
        for one in (model, again):
            transformer = one.model.diffusion_model.velocity.transformer
            quantisation.verify(transformer, "transformer", precision.PRESETS[name])
            states_of.append(states.quantised_state(transformer, precision.PRESETS[name])[0])
    assert f"transformer: {name}\n" in report
    first, second = states_of
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key].float(), value.float()) for key, value in second.items())
    verification.verify(saved(models, "folder"))
    with pytest.raises(LongCatError, match=f"'{name}' cannot be used on this device"):
        load(saved(models, "folder"), "auto", "auto")
