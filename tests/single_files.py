"""The demo checkpoint as ComfyUI's single files, and what may be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from longcat_pack.longcat_backend import checkpoints, component_files, layouts, precision, single_files

Tensors = Mapping[str, torch.Tensor]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of an official folder in ComfyUI's layout, by part."""
    official = {part: component_files.read_weights(folder / part) for part in single_files.PARTS}
    return {
        "transformer": dict(layouts.to_core(official["transformer"])),
        "text_encoder": official["text_encoder"],
        "vae": layouts.vae_to_single_file(official["vae"]),
    }


def headers(folder: Path) -> dict[str, dict[str, str]]:
    """The header entries that let the files of an official folder be opened again, by part."""
    checkpoint = checkpoints.open_checkpoint(folder)
    configs = checkpoint.configs
    texts = {name: (folder / "tokenizer" / name).read_text(encoding="utf-8") for name in TOKENIZER}
    transformer = {part: configs[part] for part in ("transformer", "scheduler")}
    return {
        "transformer": single_files.metadata(transformer, pipeline=checkpoint.flavour.pipeline),
        "text_encoder": single_files.metadata({"text_encoder": configs["text_encoder"]}, tokenizer=texts),
        "vae": single_files.metadata({"vae": configs["vae"]}),
    }


def write(source: Path, folder: Path, name: str = "longcat_tiny") -> dict[str, Path]:
    """The three files of an official folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {part: folder / f"{name}_{part}.safetensors" for part in single_files.PARTS}
    weights, notes = tensors(source), headers(source)
    for part, path in paths.items():
        save(weights[part], path, notes[part])
    return paths


def save(weights: Tensors, path: Path, header: Mapping[str, str] | None = None) -> None:
    """One file."""
    whole = {key: value.contiguous().clone() for key, value in weights.items()}
    save_file(whole, path, metadata=dict(header) if header else None)


def as_fp8(weights: Tensors, part: str, old: bool, rowwise: bool = False) -> dict[str, torch.Tensor]:
    """Block layers in scaled fp8, with the old names or the present ones."""
    return _quantised(weights, part, torch.float8_e4m3fn, 448.0, "float8_e4m3fn", old, rowwise)


def as_int8(weights: Tensors, part: str, rowwise: bool = False) -> dict[str, torch.Tensor]:
    """Block layers in int8."""
    return _quantised(weights, part, torch.int8, 127.0, "int8_tensorwise", False, rowwise)


def _quantised(
    weights: Tensors, part: str, dtype: torch.dtype, largest: float, name: str, old: bool, rowwise: bool
) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        layer = key.removesuffix(".weight")
        if layer == key or not precision.is_quantised(part, layer.removeprefix("model.")):
            result[key] = value
            continue
        scale = (value.float().abs().amax(dim=1, keepdim=True) if rowwise else value.float().abs().max()) / largest
        packed = value.float() / scale
        result[key] = packed.round().to(dtype) if dtype == torch.int8 else packed.to(dtype)
        result[f"{layer}.scale_weight" if old else f"{layer}.weight_scale"] = scale
        if old:
            result[f"{layer}.scale_input"] = torch.tensor(1.0)
        else:
            text = json.dumps({"format": name}).encode()
            result[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    return {**result, "scaled_fp8": torch.empty(0, dtype=dtype)} if old else result
