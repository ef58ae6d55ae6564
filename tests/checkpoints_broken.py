"""Copies of the demo checkpoint with one thing wrong."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Break = Callable[[Path], None]
Tensors = dict[str, torch.Tensor]

WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
# A tensor of each part, by its name in the file.
KEYS = {
    "transformer": "x_embedder.bias",
    "vae": "decoder.conv_in.bias",
    "text_encoder": "model.norm.weight",
}
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


def copy(source: Path, folder: Path) -> Path:
    """A whole copy in the place of whatever is there."""
    remove(folder)
    return Path(shutil.copytree(source, folder))


def remove(path: Path) -> None:
    """Delete a file, a link or a folder."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def text(name: str, content: str) -> Break:
    """Another content of a file."""

    def apply(folder: Path) -> None:
        (folder / name).write_text(content, encoding="utf-8")

    return apply


def raw(name: str, content: bytes) -> Break:
    """Other bytes in a file."""

    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return apply


def without(name: str) -> Break:
    """A file or folder taken away."""

    def apply(folder: Path) -> None:
        assert (folder / name).exists()
        remove(folder / name)

    return apply


def config(name: str, **changes: Any) -> Break:
    """Other values in a JSON file; None takes a value away."""

    def apply(folder: Path) -> None:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        values = {key: value for key, value in {**values, **changes}.items() if value is not None}
        (folder / name).write_text(json.dumps(values), encoding="utf-8")

    return apply


def tensors(part: str, change: Callable[[Tensors], Any]) -> Break:
    """Other weights in a part; ``change`` works on the dict of tensors."""

    def apply(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS[part])
        change(weights)
        save_file(weights, folder / WEIGHTS[part], metadata={"format": "pt"})

    return apply


def missing_key(part: str) -> Break:
    """One tensor taken away."""
    return tensors(part, lambda weights: weights.pop(KEYS[part]))


def extra_key(part: str) -> Break:
    """One tensor too many."""
    return tensors(part, lambda weights: weights.update({"surplus.weight": torch.zeros(2)}))


def wrong_shape(part: str) -> Break:
    """One tensor of another shape."""
    return tensors(part, lambda weights: weights.update({KEYS[part]: torch.zeros(3)}))


def as_integers(part: str) -> Break:
    """One tensor in int8, as in a quantised file."""
    return tensors(part, lambda weights: weights.update({KEYS[part]: weights[KEYS[part]].to(torch.int8)}))


def cut_short(part: str) -> Break:
    """A file without its last 100 bytes."""

    def apply(folder: Path) -> None:
        path = folder / WEIGHTS[part]
        path.write_bytes(path.read_bytes()[:-100])

    return apply


def huge_header(part: str) -> Break:
    """A file whose header claims to have 2^62 bytes."""

    def apply(folder: Path) -> None:
        path = folder / WEIGHTS[part]
        path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])

    return apply


def folder_for_file(part: str) -> Break:
    """A folder that bears the name of the weight file."""

    def apply(folder: Path) -> None:
        remove(folder / WEIGHTS[part])
        (folder / WEIGHTS[part]).mkdir()

    return apply


def sharded(folder: Path) -> None:
    """The transformer in two shards with an index; a sound checkpoint."""
    path = folder / WEIGHTS["transformer"]
    weights = load_file(path)
    remove(path)
    keys = sorted(weights)
    weight_map = {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, path.parent / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    content = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content), encoding="utf-8")


def missing_shard(folder: Path) -> None:
    """Two shards in the index, one in the folder."""
    sharded(folder)
    remove(folder / "transformer/diffusion_pytorch_model-00002-of-00002.safetensors")


def escaping_index(folder: Path) -> None:
    """An index whose weight_map names a sound weight file in the folder above."""
    path = folder / WEIGHTS["transformer"]
    keys = load_file(path)
    path.rename(folder / "outside.safetensors")
    content = {"weight_map": dict.fromkeys(keys, "../outside.safetensors")}
    (folder / INDEX).write_text(json.dumps(content), encoding="utf-8")


# id: (what is wrong, words that the message must hold)
CASES: dict[str, tuple[Break, tuple[str, ...]]] = {
    "flux": (config("model_index.json", _class_name="FluxPipeline"), ("FluxPipeline", "LongCatImagePipeline")),
    "no index": (without("model_index.json"), ("model_index.json",)),
    "index is a list": (text("model_index.json", "[1, 2]"), ("model_index.json", "JSON object")),
    "index is broken": (text("model_index.json", '{"_class_name":'), ("model_index.json", "Expecting value")),
    "index is no text": (raw("model_index.json", b"\xff\xfe\x00"), ("model_index.json", "utf-8")),
    "index is deep": (text("model_index.json", "[" * 100_000), ("model_index.json", "recursion")),
    "class is a list": (config("model_index.json", _class_name=["x"]), ("model_index.json", "LongCatImagePipeline")),
    "no scheduler": (without("scheduler"), ("scheduler_config.json",)),
    "no transformer": (without("transformer"), ("transformer/config.json",)),
    "no tokenizer": (without("tokenizer"), ("tokenizer", "tokenizer.json", "merges.txt")),
    "broken config": (text("transformer/config.json", "{,}"), ("transformer/config.json",)),
    "empty config": (text("vae/config.json", ""), ("vae/config.json",)),
    "more layers": (config("transformer/config.json", num_layers=4), ("transformer_blocks.3", "missing")),
    "fewer layers": (config("transformer/config.json", num_layers=2), ("transformer_blocks.2", "unknown")),
    "endless layers": (config("transformer/config.json", num_layers=10**9), ("num_layers", "1000000000")),
    "no layers given": (config("transformer/config.json", num_layers=None), ("num_layers", "lacks")),
    "layers in words": (config("transformer/config.json", num_layers="three"), ("num_layers", "three")),
    "rope": (config("transformer/config.json", axes_dims_rope=[8, 12, 16]), ("axes_dims_rope", "32")),
    "channels": (config("transformer/config.json", in_channels=32), ("x_embedder.weight", "shape")),
    "text config": (text("text_encoder/config.json", '{"text_config": 7}'), ("text_encoder",)),
    "vae blocks": (config("vae/config.json", down_block_types=["Nothing"] * 4), ("vae", "Nothing")),
    "vae scaling": (config("vae/config.json", scaling_factor=None), ("scaling_factor", "lacks")),
    "vae scaling zero": (config("vae/config.json", scaling_factor=0), ("scaling_factor", "0")),
    "scheduler class": (config("scheduler/scheduler_config.json", _class_name="DDIMScheduler"), ("DDIMScheduler",)),
    "scheduler value": (config("scheduler/scheduler_config.json", max_shift="big"), ("scheduler", "TypeError")),
    "scheduler range": (config("scheduler/scheduler_config.json", max_image_seq_len=256), ("ZeroDivisionError",)),
    "zero bytes": (raw(WEIGHTS["vae"], b""), ("damaged", "diffusion_pytorch_model.safetensors")),
    "huge header": (huge_header("transformer"), ("damaged", "diffusion_pytorch_model.safetensors")),
    "folder for file": (folder_for_file("transformer"), ("found 0", "transformer")),
    "no weights": (without(WEIGHTS["text_encoder"]), ("found 0", "text_encoder")),
    "integers": (as_integers("transformer"), ("I8", "x_embedder.bias")),
    "missing shard": (missing_shard, ("diffusion_pytorch_model-00002-of-00002.safetensors", "missing")),
    "escaping index": (escaping_index, ("../outside.safetensors", "outside the folder")),
    "index without map": (text(INDEX, "{}"), ("weight_map",)),
    "map is a list": (text(INDEX, '{"weight_map": ["a"]}'), ("weight_map",)),
    "map of numbers": (text(INDEX, '{"weight_map": {"a": 1}}'), ("weight_map",)),
    "absolute map": (text(INDEX, '{"weight_map": {"a": "/etc/passwd"}}'), ("/etc/passwd", "outside the folder")),
}
for _part in WEIGHTS:
    _key = KEYS[_part].removeprefix("model.")
    CASES[f"{_part} cut short"] = (cut_short(_part), ("not downloaded completely", _part))
    CASES[f"{_part} missing key"] = (missing_key(_part), ("1 missing", _key, f"{_part}/config.json"))
    CASES[f"{_part} extra key"] = (extra_key(_part), ("1 unknown", "surplus.weight", f"{_part}/config.json"))
    CASES[f"{_part} wrong shape"] = (wrong_shape(_part), ("1 wrong shape", _key, "(3,)", f"{_part}/config.json"))

# What only loading can find.
TOKENIZER_CASES: dict[str, tuple[Break, tuple[str, ...]]] = {
    "tokenizer is broken": (text("tokenizer/tokenizer.json", "{"), ("tokenizer",)),
    "tokenizer settings are broken": (text("tokenizer/tokenizer_config.json", "[]"), ("tokenizer",)),
    "tokenizer with code": (
        config(
            "tokenizer/tokenizer_config.json",
            tokenizer_class="Foreign",
            auto_map={"AutoTokenizer": ["foreign.Foreign", None]},
        ),
        ("tokenizer", "trust_remote_code"),
    ),
}
