"""The five defects of optimum-quanto, and two that showed here: each one's guard, in the order of their numbers.

Q1 a LoRA merged into quantised weights is dropped; Q2 a plain reload leaves random layers; Q3 the CPU's int8 kernel
crashes on unaligned memory; Q4 models can be neither copied nor cast; Q5 int4 does not compile.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from longcat_pack.longcat_backend import checkpoints, precision, quantisation, quantised_state, transformer
from longcat_pack.longcat_backend.errors import LongCatError

CPU = torch.device("cpu")
NAMES = ("int8-quanto", "int4-quanto")
LAYER = "transformer_blocks.0.attn.to_q"

Velocity = transformer.VelocityModel


@pytest.fixture(scope="module")
def checkpoint(pack_dir: Path) -> checkpoints.Checkpoint:
    return checkpoints.open_checkpoint(pack_dir / "demo" / "LongCat-Tiny")


@pytest.fixture
def quantised(checkpoint: checkpoints.Checkpoint) -> Callable[[str], Velocity]:
    def build(name: str) -> Velocity:
        model = transformer.load_transformer(checkpoint, torch.bfloat16)
        quantisation.quantise(model.transformer, "transformer", precision.PRESETS[name])
        return model

    return build


@pytest.fixture
def empty(checkpoint: checkpoints.Checkpoint) -> Velocity:
    return Velocity(transformer.empty_transformer(checkpoint.configs["transformer"]))


@torch.inference_mode()
def forward(model: Velocity) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    samples, text = torch.randn(1, 16, 8, 8, generator=draw), torch.randn(1, 512, 64, generator=draw)
    return model(samples.bfloat16(), torch.tensor([0.5]), text.bfloat16())


def assert_aligned(model: Velocity) -> None:
    leaves = [leaf for parameter in model.parameters() for _, leaf in quantisation.leaves(parameter, "")]
    assert all(leaf.data_ptr() % 64 == 0 for leaf in leaves)


def add_lora(model: Velocity) -> None:
    model.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "ff.net.2"], init_lora_weights=False))


# Q1


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_beside_the_weights_changes_the_output(quantised: Callable[[str], Velocity], name: str) -> None:
    model = quantised(name)
    plain = forward(model)
    add_lora(model)
    with_lora = forward(model)
    assert float((with_lora - plain).float().norm() / plain.float().norm()) > 0.01
    model.transformer.disable_adapters()
    assert torch.equal(forward(model), plain)


@pytest.mark.parametrize("name", NAMES)
def test_fusing_is_refused(quantised: Callable[[str], Velocity], name: str) -> None:
    model = quantised(name)
    add_lora(model)
    expected = forward(model)
    for fuse in (model.transformer.fuse_lora, copy.deepcopy(model).transformer.fuse_lora):
        with pytest.raises(LongCatError, match="cannot be merged into quantised weights"):
            fuse()
    assert torch.equal(forward(model), expected)


@pytest.mark.parametrize("name", NAMES)
def test_quanto_still_drops_what_is_merged(quantised: Callable[[str], Velocity], name: str) -> None:
    """The reason for the guard: when this fails, the guard may go."""
    model = quantised(name)
    plain = forward(model)
    add_lora(model)
    type(model.transformer).fuse_lora(model.transformer)
    assert torch.equal(forward(model), plain)


# Q2


def save(model: Velocity, name: str, file: Path) -> None:
    tensors, layers = quantised_state.quantised_state(model.transformer, precision.PRESETS[name])
    save_file(tensors, file, {"layers": json.dumps(layers)})


def load(model: Velocity, file: Path) -> None:
    with safe_open(file, "pt") as opened:
        layers = json.loads(opened.metadata()["layers"])
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    quantised_state.load_quantised(model.transformer, "transformer", tensors, layers, CPU)
    assert_aligned(model)  # or the next forward may end the process


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_is_the_same_when_loaded(
    quantised: Callable[[str], Velocity], empty: Velocity, tmp_path: Path, name: str
) -> None:
    model = quantised(name)
    save(model, name, tmp_path / "model.safetensors")
    load(empty, tmp_path / "model.safetensors")
    quantisation.verify(empty.transformer, "transformer", precision.PRESETS[name])
    assert torch.equal(forward(empty), forward(model))
    assert not any(parameter.requires_grad for parameter in empty.parameters())
    with pytest.raises(LongCatError, match="cannot be merged"):
        empty.transformer.fuse_lora()


def test_fp8_is_saved_and_loaded_too(
    checkpoint: checkpoints.Checkpoint,
    empty: Velocity,
    tmp_path: Path,
    fp8_device: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from longcat_pack.longcat_backend import torchao_layers as layers

    model = transformer.load_transformer(checkpoint, torch.bfloat16)
    preset = precision.PRESETS["fp8-torchao"]
    quantisation.quantise(model.transformer, "transformer", preset)
    save(model, preset.name, tmp_path / "model.safetensors")
    load(empty, tmp_path / "model.safetensors")
    quantisation.verify(empty.transformer, "transformer", preset)
    for key, value in model.state_dict().items():
        parts, again = quantisation.leaves(value, key), quantisation.leaves(empty.state_dict()[key], key)
        assert all(torch.equal(one.float(), two.float()) for (_, one), (_, two) in zip(parts, again, strict=True))
    monkeypatch.setattr(layers, "multiplies_fp8_by_row", lambda device: False)
    with pytest.raises(LongCatError, match="multiplies in fp8"):
        load(empty, tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["weight._scale", "bias", "weight._data"])
def test_a_file_that_lacks_a_part_is_refused(
    quantised: Callable[[str], Velocity], empty: Velocity, name: str, part: str
) -> None:
    tensors, layers = quantised_state.quantised_state(quantised(name).transformer, precision.PRESETS[name])
    key = next(key for key in tensors if key.startswith(f"{LAYER}.{part}"))
    del tensors[key]
    with pytest.raises(LongCatError, match=f"1 missing: {key}"):
        quantised_state.load_quantised(empty.transformer, "transformer", tensors, layers, CPU)


def test_what_the_map_does_not_say_is_refused(quantised: Callable[[str], Velocity], empty: Velocity) -> None:
    tensors, layers = quantised_state.quantised_state(
        quantised("int8-quanto").transformer, precision.PRESETS["int8-quanto"]
    )
    load_into = empty.transformer
    for wrong, words in (
        ({}, "quantised to -,"),
        ({name: preset for name, preset in layers.items() if name != LAYER}, f"1 missing: {LAYER}.weight;"),
        ({**layers, "transformer_blocks.0.attn.unknown": "int8-quanto"}, "'transformer_blocks.0.attn.unknown'"),
        ({**layers, LAYER: "int3-quanto"}, "'int3-quanto'"),
        ({**layers, LAYER: "bf16"}, "'bf16'"),
        ({**layers, LAYER: "int4-quanto"}, "'int4-quanto', 'int8-quanto'"),
        (dict.fromkeys(layers, "int4-quanto"), r"missing: .*\.weight\._data\._data"),
    ):
        with pytest.raises(LongCatError, match=words):
            quantised_state.load_quantised(load_into, "transformer", tensors, wrong, CPU)
    tensors[f"{LAYER}.weight._data"] = tensors[f"{LAYER}.weight._data"].float()
    with pytest.raises(LongCatError, match=f"hold float32 in '{LAYER}.weight._data'"):
        quantised_state.load_quantised(load_into, "transformer", tensors, layers, CPU)


def test_a_plain_reload_still_leaves_random_layers(quantised: Callable[[str], Velocity], checkpoint: Any) -> None:
    """The reason for the guard: torch finds no weight and no error in the file."""
    model = quantised("int8-quanto")
    plain = transformer.load_transformer(checkpoint, torch.bfloat16).transformer
    before = plain.get_submodule(LAYER).weight.clone()
    plain.load_state_dict(model.transformer.state_dict(), strict=False)
    assert torch.equal(plain.get_submodule(LAYER).weight, before)


# Q3


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes one byte after an aligned address, as in a mapped file."""
    buffer = torch.empty(tensor.numel() + 1, dtype=torch.uint8)
    placed = buffer[1:].view(tensor.dtype).view(tensor.shape)
    placed.copy_(tensor)
    assert placed.data_ptr() % 64 != 0
    return placed


@pytest.mark.parametrize("name", NAMES)
def test_loaded_weights_are_aligned(quantised: Callable[[str], Velocity], empty: Velocity, name: str) -> None:
    model = quantised(name)
    tensors, layers = quantised_state.quantised_state(model.transformer, precision.PRESETS[name])
    tensors = {key: unaligned(value) if value.dtype.itemsize == 1 else value for key, value in tensors.items()}
    quantised_state.load_quantised(empty.transformer, "transformer", tensors, layers, CPU)
    leaves = [leaf for parameter in empty.parameters() for _, leaf in quantisation.leaves(parameter, "")]
    assert_aligned(empty)
    assert not {leaf.data_ptr() for leaf in leaves} & {value.data_ptr() for value in tensors.values()}
    assert torch.equal(forward(empty), forward(model))


def test_a_mapped_file_can_be_unaligned(tmp_path: Path) -> None:
    """The reason for the guard: the format aligns the first tensor alone."""
    tensors = {"a": torch.zeros(3, dtype=torch.int8), "b": torch.zeros(64, dtype=torch.int8)}
    save_file(tensors, tmp_path / "odd.safetensors")
    mapped = load_file(tmp_path / "odd.safetensors")
    assert any(value.data_ptr() % 64 for value in mapped.values())


# Q4


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_equal_and_independent(quantised: Callable[[str], Velocity], name: str) -> None:
    model = quantised(name)
    twin = copy.deepcopy(model)
    expected = forward(model)
    assert torch.equal(forward(twin), expected)
    quantisation.verify(twin.transformer, "transformer", precision.PRESETS[name])
    for _, leaf in quantisation.leaves(twin.transformer.get_submodule(LAYER).weight, LAYER):
        leaf.zero_()
    assert not torch.equal(forward(twin), expected)
    assert torch.equal(forward(model), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_cast_is_refused_in_words(quantised: Callable[[str], Velocity], name: str) -> None:
    model = quantised(name)
    expected = forward(model)
    assert torch.equal(forward(model.to(torch.bfloat16)), expected)
    qtype = precision.PRESETS[name].format
    layer = model.transformer.get_submodule(LAYER)
    for cast in (lambda: layer.to(torch.float16), layer.float, layer.half, lambda: layer.to("cpu", torch.float32)):
        with pytest.raises(LongCatError, match=f"quantised to {qtype} cannot be cast"):
            cast()
    assert torch.equal(forward(model), expected)


# Q5


def test_both_presets_compile(quantised: Callable[[str], Velocity]) -> None:
    for name in NAMES:
        model = quantised(name)
        expected = forward(model)
        torch.compiler.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
            assert torch.equal(forward(model), expected)


@pytest.mark.parametrize("group", [128, 32])
def test_int4_in_storage_that_does_not_compile_did_not_take(
    checkpoint: checkpoints.Checkpoint, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    """In groups of 128 quanto repacks bf16 weights for a kernel that torch.compile cannot trace."""
    model = transformer.load_transformer(checkpoint, torch.bfloat16)
    preset = precision.PRESETS["int4-quanto"]
    backend = quantisation.require(preset, CPU)
    quantised = backend.quantised

    def in_groups(layer: nn.Linear, preset: precision.Preset) -> nn.Module:
        with monkeypatch.context() as patch:
            patch.setattr(backend, "GROUP", group)
            return quantised(layer, preset)

    monkeypatch.setattr(backend, "quantised", in_groups)
    with pytest.raises(LongCatError, match="did not take"):
        quantisation.quantise(model.transformer, "transformer", preset)


# Beyond the five


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_in_inference_mode_as_with_gradients(quantised: Callable[[str], Velocity], name: str) -> None:
    """ComfyUI's mode; quanto's own int4 layer raises there."""
    layer = quantised(name).transformer.get_submodule(LAYER)
    tokens = torch.randn(1, 8, 128, dtype=torch.bfloat16)
    with torch.inference_mode():
        found = layer(tokens)
    torch.testing.assert_close(found.clone(), layer(tokens), rtol=0.02, atol=0.02)


def test_int4_keeps_its_bits_when_it_moves(quantised: Callable[[str], Velocity]) -> None:
    """Repacked weights lose bits with each move between devices."""
    layer = quantised("int4-quanto").transformer.get_submodule(LAYER)
    assert type(layer.weight).__name__ == "WeightQBitsTensor"
    leaves = dict(quantisation.leaves(layer.weight, LAYER))
    moved = dict(quantisation.leaves(layer.weight.to("cpu", copy=True), LAYER))
    assert leaves.keys() == moved.keys()
    assert all(torch.equal(leaves[key], moved[key]) for key in leaves)


def test_int4_is_unpacked_without_quantos_own_kernel(
    quantised: Callable[[str], Velocity], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA quanto would compile it on first use, which takes nvcc and a minute."""
    layer = quantised("int4-quanto").transformer.get_submodule(LAYER)
    expected = layer.weight.dequantize()
    from longcat_pack.longcat_backend import quanto_layers

    assert torch.equal(quanto_layers.unpacked(layer.weight), expected)

    def compiled(*args: Any) -> None:
        raise AssertionError("quanto's kernel was asked for")

    monkeypatch.setattr(torch.ops.quanto, "unpack", compiled)
    with torch.inference_mode():
        rows = torch.randn(2, layer.in_features, dtype=expected.dtype)
        assert torch.equal(layer(rows), torch.nn.functional.linear(rows, expected, layer.bias))
