"""Single files hold the same checkpoint as the folder; whatever else they hold is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import single_files as files
import torch

from longcat_pack.longcat_backend import (
    checkpoints,
    flavours,
    layouts,
    official,
    single_files,
    tensor_files,
    text_encoder,
    transformer,
    verification,
)
from longcat_pack.longcat_backend.errors import LongCatError


@pytest.fixture(scope="module")
def sound(pack_dir: Path) -> Path:
    return pack_dir / "demo" / "LongCat-Tiny"


@pytest.fixture(scope="module")
def parts(sound: Path) -> dict[str, dict[str, torch.Tensor]]:
    return files.tensors(sound)


@pytest.fixture(scope="module")
def notes(sound: Path) -> dict[str, dict[str, str]]:
    return files.headers(sound)


@pytest.fixture
def paths(sound: Path, tmp_path: Path) -> dict[str, Path]:
    return files.write(sound, tmp_path / "files")


def opened(paths: dict[str, Path], tokenizer: Path = Path("nowhere")) -> single_files.SingleFilesCheckpoint:
    return single_files.open_single_files(paths, tokenizer)


def prefixed(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in weights.items()}


def multiplied_out(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a quantised file, without what stands beside them."""
    plain = {}
    for key, value in weights.items():
        layer = key.removesuffix(".weight")
        scale = weights.get(f"{layer}.weight_scale", weights.get(f"{layer}.scale_weight"))
        if not key.endswith(("_scale", ".scale_weight", ".scale_input", ".comfy_quant", "scaled_fp8")):
            plain[key] = value if layer == key or scale is None else value.float() * scale
    return plain


def refusal(paths: dict[str, Path], tokenizer: Path = Path("nowhere")) -> str:
    with pytest.raises(LongCatError) as caught:
        opened(paths, tokenizer)
    assert str(caught.value) == f"{caught.value.en}\n{caught.value.zh}"
    return caught.value.en


def test_three_files_are_the_checkpoint_of_the_folder(sound: Path, paths: dict[str, Path]) -> None:
    folder, single = checkpoints.open_checkpoint(sound), opened(paths)
    verification.verify(single)
    assert single.configs == folder.configs
    assert single.flavour == folder.flavour
    for part in single_files.PARTS:
        expected, found = folder.weights(part), single.weights(part)
        assert single.shapes(part) == folder.shapes(part)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    ids = [text_encoder.load_tokenizer(one).encode("a red 圆形 on blue") for one in (folder, single)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("transformer", lambda weights: prefixed("model.diffusion_model.", weights)),
        ("transformer", lambda weights: prefixed("diffusion_model.", weights)),
        ("transformer", lambda weights: dict(layouts.to_official(weights))),
        (
            "text_encoder",
            lambda weights: {key.replace("model.", "model.language_model."): weights[key] for key in weights},
        ),
        ("vae", lambda weights: prefixed("first_stage_model.", weights)),
        ("vae", layouts.vae_to_official),
    ],
    ids=["model.diffusion_model", "diffusion_model", "official", "language_model", "first_stage_model", "official vae"],
)
def test_other_names_of_the_same_weights_are_known(
    part: str,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    sound: Path,
    paths: dict[str, Path],
    parts: dict[str, dict[str, torch.Tensor]],
    notes: dict[str, dict[str, str]],
) -> None:
    files.save(change(parts[part]), paths[part], notes[part])
    single, folder = opened(paths), checkpoints.open_checkpoint(sound)
    verification.verify(single)
    if part == "text_encoder":
        found, expected = (text_encoder.language_keys(one.shapes(part)) for one in (single, folder))
        assert found.keys() == expected.keys()
        assert all(torch.equal(single.weights(part)[found[key]], folder.weights(part)[expected[key]]) for key in found)
    else:
        assert all(torch.equal(single.weights(part)[key], value) for key, value in folder.weights(part).items())


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
@pytest.mark.parametrize("kind", ["old fp8", "fp8", "fp8 by row", "int8", "int8 by row", "fp8 in the header"])
def test_quantised_files_are_multiplied_out(
    part: str,
    kind: str,
    sound: Path,
    paths: dict[str, Path],
    parts: dict[str, dict[str, torch.Tensor]],
    notes: dict[str, dict[str, str]],
) -> None:
    rowwise, header = kind.endswith("by row"), notes[part]
    if kind.startswith("int8"):
        weights, name = files.as_int8(parts[part], part, rowwise), "int8_tensorwise"
    else:
        weights, name = files.as_fp8(parts[part], part, kind.startswith("old"), rowwise), "float8_e4m3fn"
    expected = multiplied_out(weights)
    expected = layouts.to_official(expected) if part == "transformer" else expected
    if kind == "fp8 in the header":
        marked = [key for key in weights if key.endswith(".comfy_quant")]
        layers = {key.removesuffix(".comfy_quant"): {"format": name} for key in marked}
        header = {**header, "_quantization_metadata": json.dumps({"layers": layers})}
        weights = {key: value for key, value in weights.items() if key not in marked}
    files.save(weights, paths[part], header)
    single, folder = opened(paths), checkpoints.open_checkpoint(sound)
    assert single.shapes(part) == folder.shapes(part)
    found = single.weights(part)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert len(single.quantised(part, name)) > 10
    assert single.quantised(part, "nvfp4") == {}


def test_a_quantised_layer_is_handed_on_as_comfyui_loads_it(
    paths: dict[str, Path], parts: dict[str, dict[str, torch.Tensor]], notes: dict[str, dict[str, str]]
) -> None:
    weights = files.as_fp8(parts["text_encoder"], "text_encoder", old=True)
    files.save(weights, paths["text_encoder"], notes["text_encoder"])
    stored = opened(paths).quantised("text_encoder", "float8_e4m3fn")
    packed = stored["layers.0.mlp.up_proj.weight"]
    assert set(packed) == {f"layers.0.mlp.up_proj.{end}" for end in ("weight", "weight_scale", "comfy_quant")}
    assert packed["layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert json.loads(bytes(packed["layers.0.mlp.up_proj.comfy_quant"].tolist())) == {"format": "float8_e4m3fn"}


def test_rotated_int8_is_rotated_back(tmp_path: Path, comfy_dir: Path) -> None:
    from comfy.quant_ops import QuantizedTensor

    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    packed = QuantizedTensor.from_float(
        weight, "TensorWiseINT8Layout", per_channel=True, convrot=True, convrot_groupsize=16
    )
    config = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
    marker = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    files.save({**packed.state_dict("x.weight"), "x.comfy_quant": marker}, tmp_path / "x.safetensors")
    file = tensor_files.TensorFile(tmp_path / "x.safetensors")
    for rows in (layouts.Rows("x.weight"), layouts.Rows("x.weight", 2, 5)):
        assert torch.allclose(file.read(rows), rows.of(weight), atol=0.05)
        assert torch.equal(file.read(rows), rows.of(packed.dequantize()))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"format": "nvfp4"}, ("nvfp4", "int8_tensorwise", "x_embedder")),
        ({"format": "int8_tensorwise"}, ("int8_tensorwise", "F8_E4M3")),
        ({}, ("None", "float8_e4m3fn")),
    ],
)
def test_an_unknown_format_is_named(config: dict[str, str], words: tuple[str, ...], tmp_path: Path) -> None:
    marker = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    weights = {"x_embedder.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "x_embedder.weight_scale": torch.ones(())}
    files.save({**weights, "x_embedder.comfy_quant": marker}, tmp_path / "x.safetensors")
    with pytest.raises(LongCatError) as caught:
        tensor_files.TensorFile(tmp_path / "x.safetensors")
    assert all(word in caught.value.en for word in words), caught.value.en


def test_integers_without_a_format_are_refused(paths: dict[str, Path], parts: Any, notes: Any) -> None:
    weights = {**parts["transformer"], "img_in.bias": torch.zeros(128, dtype=torch.int8)}
    files.save(weights, paths["transformer"], notes["transformer"])
    assert "img_in.bias" in refusal(paths)


@pytest.mark.parametrize("part", single_files.PARTS)
def test_a_file_of_another_model_is_refused(part: str, paths: dict[str, Path], parts: Any, notes: Any) -> None:
    key = {"transformer": "img_in.bias", "text_encoder": "model.norm.weight", "vae": "decoder.conv_in.bias"}[part]
    for changed, words in (
        ({**parts[part], "surplus.weight": torch.zeros(1)}, "surplus.weight"),
        ({name: value for name, value in parts[part].items() if name != key}, "1 missing"),
        ({**parts[part], key: torch.zeros(3)}, "(3,)"),
    ):
        files.save(changed, paths[part], notes[part])
        text = refusal(paths)
        assert words in text and paths[part].name in text and "its own header" in text


@pytest.mark.parametrize("part", single_files.PARTS)
def test_a_file_without_configs_is_taken_for_the_published_model(
    part: str, paths: dict[str, Path], parts: Any, pack_dir: Path
) -> None:
    files.save(parts[part], paths[part])
    text = refusal(paths, pack_dir / "demo" / "LongCat-Tiny" / "tokenizer")
    assert paths[part].name in text
    assert {"transformer": "LongCat-Image's transformer", "text_encoder": "Qwen2.5-VL-7B", "vae": "FLUX"}[part] in text


def test_the_published_configs_describe_the_published_model() -> None:
    for part, config in (("transformer", official.TRANSFORMER), ("vae", official.VAE)):
        verification.check_values(part, config)
    count = sum(
        shape.numel()
        for shape in checkpoints.shapes(transformer.empty_transformer(official.TRANSFORMER).state_dict()).values()
    )
    assert round(count / 1e9, 2) == 6.27
    config = text_encoder.empty_text_model(official.TEXT_ENCODER).config
    assert config.rope_parameters["mrope_section"] == [16, 24, 24] and config.rope_parameters["rope_theta"] == 1e6


def test_parts_of_different_models_are_refused(paths: dict[str, Path], parts: Any, notes: Any) -> None:
    configs = json.loads(notes["transformer"][single_files.METADATA])["configs"]
    configs["transformer"]["joint_attention_dim"] = 32
    weights = {**parts["transformer"], "txt_in.weight": parts["transformer"]["txt_in.weight"][:, :32]}
    files.save(weights, paths["transformer"], single_files.metadata(configs))
    assert "do not belong together" in refusal(paths)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("longcat_image_bf16", "final"),
        ("longcat_image_dev_bf16", "dev"),
        ("longcat_image_edit_bf16", "edit"),
        ("LongCat-Image-Edit-Turbo-fp8", "edit-turbo"),
    ],
)
def test_the_flavour_is_known_by_the_name(name: str, key: str) -> None:
    assert flavours.identify(official.pipeline(name), name, official.scheduler(name)).key == key


@pytest.mark.parametrize("text", ["{", "[]", '"x"', '{"configs": 7}', '{"configs": {"vae": 7}}'])
def test_a_senseless_note_in_the_header_is_no_config(text: str, paths: dict[str, Path], parts: Any) -> None:
    files.save(parts["vae"], paths["vae"], {single_files.METADATA: text})
    assert paths["vae"].name in refusal(paths)


def test_endless_layers_in_the_header_are_refused_before_they_are_built(
    paths: dict[str, Path], parts: Any, notes: Any
) -> None:
    configs = json.loads(notes["transformer"][single_files.METADATA])["configs"]
    configs["transformer"]["num_layers"] = 10**9
    files.save(parts["transformer"], paths["transformer"], single_files.metadata(configs))
    assert "1000000000" in refusal(paths)


@pytest.mark.parametrize("name", ["../tokenizer.json", "/tmp/tokenizer.json", "code.py"])
def test_a_tokenizer_may_only_bring_its_own_files(name: str, paths: dict[str, Path], parts: Any, notes: Any) -> None:
    note = json.loads(notes["text_encoder"][single_files.METADATA])
    header = single_files.metadata(note["configs"], tokenizer={**note["tokenizer"], name: "x"})
    files.save(parts["text_encoder"], paths["text_encoder"], header)
    with pytest.raises(LongCatError, match="no tokenizer file"), opened(paths).tokenizer_folder():
        pass


def test_without_a_tokenizer_of_its_own_the_given_one_is_used(
    sound: Path, paths: dict[str, Path], parts: Any, notes: Any, tmp_path: Path
) -> None:
    note = json.loads(notes["text_encoder"][single_files.METADATA])
    files.save(parts["text_encoder"], paths["text_encoder"], single_files.metadata(note["configs"]))
    with opened(paths, sound / "tokenizer").tokenizer_folder() as folder:
        assert folder == sound / "tokenizer"
    assert "tokenizer.json" in refusal(paths, tmp_path)


def test_a_file_that_is_cut_short_is_named(paths: dict[str, Path]) -> None:
    paths["vae"].write_bytes(paths["vae"].read_bytes()[:-100])
    assert "damaged" in refusal(paths) and paths["vae"].name in refusal(paths)


def test_the_fingerprint_follows_every_file(paths: dict[str, Path]) -> None:
    seen = {single_files.fingerprint(paths)}
    for path in paths.values():
        path.write_bytes(path.read_bytes() + b" ")
        seen.add(single_files.fingerprint(paths))
    assert len(seen) == 4


def test_the_published_files_are_accepted_without_a_header_of_ours(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their shapes alone: the files themselves have 29 GB."""

    class Headers:
        metadata: dict[str, str] = {}
        quantised: dict[str, Any] = {}

        def __init__(self, path: Path, shapes: dict[str, torch.Size]) -> None:
            self.path, self.shapes = path, shapes

    dit = transformer.empty_transformer(official.TRANSFORMER).state_dict()
    encoder = text_encoder.empty_text_model(official.TEXT_ENCODER).state_dict()
    vae = {key: torch.empty(shape, device="meta") for key, shape in verification.vae_shapes(official.VAE).items()}
    published = {
        "transformer": layouts.to_core(dit),
        "text_encoder": {f"model.{key}": value for key, value in encoder.items()},
        "vae": layouts.vae_to_single_file(vae),
    }
    paths = {part: Path(f"longcat_image_edit_turbo_{part}.safetensors") for part in single_files.PARTS}
    monkeypatch.setattr(
        single_files, "_open", lambda part, path: Headers(path, checkpoints.shapes(dict(published[part])))
    )
    single = single_files.open_single_files(paths, sound / "tokenizer")
    verification.verify(single)
    assert single.flavour.key == "edit-turbo"
    assert dict(single.configs["vae"]) == dict(official.VAE)
    del published["vae"]["decoder.conv_in.bias"]
    assert "1 missing: decoder.conv_in.bias" in refusal(paths, sound / "tokenizer")
