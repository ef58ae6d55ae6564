"""A checkpoint made of three files: transformer, text encoder and VAE, in ComfyUI's layout or the official one.

Files that LongCatSaveCheckpoint wrote carry their configs and tokenizer in the header. Others are taken for the
published LongCat-Image, and refused if a single shape differs.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from . import flavours, layouts, official, text_encoder, transformer, verification
from .checkpoints import Checkpoint, differences, require_tokenizer, shapes
from .errors import LongCatError
from .layouts import Plan, Rows
from .tensor_files import TensorFile, damaged

METADATA = "longcat_image"
PARTS = ("transformer", "text_encoder", "vae")
_PREFIXES = {"transformer": layouts.TRANSFORMER_PREFIXES, "text_encoder": (), "vae": layouts.VAE_PREFIXES}
_TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class SingleFilesCheckpoint(Checkpoint):
    """Three files; the tokenizer is the one in the text encoder's header, else that of ``default_tokenizer``."""

    files: Mapping[str, Path]
    default_tokenizer: Path

    def weights(self, component: str) -> Mapping[str, torch.Tensor]:
        """All tensors by their official names; quantised ones come in float32."""
        file = _open(component, self.files[component])
        if component == "vae":
            stored = {key: file.read(Rows(key)) for key in file.shapes}
            return stored if layouts.is_official_vae(stored) else layouts.vae_to_official(stored)
        return layouts.Arranged(_plan(component, file), file.read)

    def shapes(self, component: str) -> dict[str, torch.Size]:
        """The shape of every tensor by its official name."""
        return _shapes(component, _open(component, self.files[component]))

    def quantised(self, component: str, quantisation: str) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """The weights that the file already holds in that format, as they are."""
        file = _open(component, self.files[component])
        if component == "transformer" and not layouts.is_core(file.shapes):
            return {}
        keys = {key: key for key, how in file.quantised.items() if how.format == quantisation}
        if component == "text_encoder":
            keys = {name: key for name, key in text_encoder.language_keys(file.shapes).items() if key in keys}
        return {name: _packed(file, key, name) for name, key in keys.items()}

    def tokenizer_folder(self) -> AbstractContextManager[Path]:
        """The tokenizer in the text encoder's header, in a temporary folder; else the one given."""
        path = self.files["text_encoder"]
        texts = _written_by_us(path, _open("text_encoder", path).metadata).get("tokenizer")
        return _tokenizer_in(path, texts) if isinstance(texts, dict) else nullcontext(self.default_tokenizer)

    def processor_config(self) -> Mapping[str, Any]:
        """The published one: single files carry none."""
        return official.PROCESSOR


def open_single_files(files: Mapping[str, Path], default_tokenizer: Path) -> SingleFilesCheckpoint:
    """Read the headers of the three files, and check that each holds what it should and that they fit together.

    Args:
        files: the path of each of ``PARTS``.
        default_tokenizer: folder of Qwen2.5's tokenizer, for a text encoder without one.

    Raises:
        LongCatError: a file is damaged, holds another model or a format that cannot be read, or they do not belong
            together.
    """
    opened = {part: _open(part, files[part]) for part in PARTS}
    name = files["transformer"].stem
    notes = {part: _written_by_us(file.path, file.metadata) for part, file in opened.items()}
    defaults = {
        "transformer": official.TRANSFORMER,
        "scheduler": official.scheduler(name),
        "text_encoder": official.TEXT_ENCODER,
        "vae": official.VAE,
    }
    saved = {key: value for note in notes.values() for key, value in _configs(note).items()}
    configs = {**defaults, **saved}
    for part in (*PARTS, "scheduler"):
        verification.check_values(part, configs[part])
    for part in PARTS:
        _require_shapes(part, opened[part], configs[part], part in saved)
    _require_match(files, configs)
    if "tokenizer" not in notes["text_encoder"]:
        require_tokenizer(default_tokenizer)
    pipeline = notes["transformer"].get("pipeline")
    if pipeline not in (flavours.TEXT_TO_IMAGE, flavours.EDIT):
        pipeline = official.pipeline(name)
    flavour = flavours.identify(pipeline, name, configs["scheduler"])
    return SingleFilesCheckpoint(flavour, configs, dict(files), default_tokenizer)


def fingerprint(files: Mapping[str, Path]) -> str:
    """A hash that changes when one of the files does (name, size or time of change)."""
    stats = [(path, path.stat()) for path in sorted(files.values())]
    lines = [f"{path}:{stat.st_size}:{stat.st_mtime_ns}" for path, stat in stats]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def metadata(configs: Mapping[str, Mapping[str, Any]], **more: Any) -> dict[str, str]:
    """The header entry that lets a file be opened again; ``more`` is the ``pipeline`` or the ``tokenizer``."""
    return {METADATA: json.dumps({"configs": configs, **more}, ensure_ascii=False), "format": "pt"}


def _open(part: str, path: Path) -> TensorFile:
    return TensorFile(path, _PREFIXES[part])


def _plan(part: str, file: TensorFile) -> Plan:
    if part == "transformer" and layouts.is_core(file.shapes):
        return layouts.plan_official(file.shapes)
    return {key: (Rows(key),) for key in file.shapes}


def _shapes(part: str, file: TensorFile) -> dict[str, torch.Size]:
    if part == "vae":
        return file.shapes if layouts.is_official_vae(file.shapes) else layouts.vae_shapes_to_official(file.shapes)
    return layouts.arranged_shapes(_plan(part, file), file.shapes)


def _packed(file: TensorFile, key: str, name: str) -> dict[str, torch.Tensor]:
    layer, how = name.removesuffix("weight"), file.quantised[key]
    config = json.dumps(how.config()).encode("utf-8")
    return {
        name: file.stored(key),
        f"{layer}weight_scale": file.stored(how.scale),
        f"{layer}comfy_quant": torch.tensor(list(config), dtype=torch.uint8),
    }


def _written_by_us(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    try:
        note = json.loads(header.get(METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    return note if isinstance(note, dict) else {}


def _configs(note: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    configs = note.get("configs")
    entries = configs.items() if isinstance(configs, dict) else ()
    return {part: config for part, config in entries if part in (*PARTS, "scheduler") and isinstance(config, dict)}


def _require_shapes(part: str, file: TensorFile, config: Mapping[str, Any], own_config: bool) -> None:
    found = _shapes(part, file)
    if part == "transformer":
        expected = shapes(transformer.empty_transformer(config).state_dict())
    elif part == "vae":
        expected = verification.vae_shapes(config)
    else:
        expected = shapes(text_encoder.empty_text_model(config).state_dict())
        found = {name: found[key] for name, key in text_encoder.language_keys(found).items()}
    result = differences(expected, found)
    if result is None:
        return
    model, zh_model = ("its own header", "其文件头") if own_config else _MODELS[part]
    raise LongCatError(
        f"'{file.path.name}' does not fit {model}: {result[0]}. Choose the {_WORDS[part][0]} of LongCat-Image; to "
        "use a checkpoint of another size, keep its folder in the official layout.",
        f"“{file.path.name}”与{zh_model}不符：{result[1]}。请选择 LongCat-Image 的{_WORDS[part][1]}；"
        "其他规模的检查点请使用官方目录结构的文件夹。",
    )


_MODELS = {
    "transformer": ("LongCat-Image's transformer", " LongCat-Image 的扩散模型"),
    "text_encoder": ("Qwen2.5-VL-7B", " Qwen2.5-VL-7B"),
    "vae": ("LongCat-Image's VAE (FLUX's ae.safetensors)", " LongCat-Image 的 VAE（FLUX 的 ae.safetensors）"),
}
_WORDS = {
    "transformer": ("transformer", "扩散模型"),
    "text_encoder": ("text encoder", "文本编码器"),
    "vae": ("VAE", "VAE"),
}


def _require_match(files: Mapping[str, Path], configs: Mapping[str, Mapping[str, Any]]) -> None:
    encoder = text_encoder.empty_text_model(configs["text_encoder"]).config.hidden_size
    wanted = configs["transformer"]["joint_attention_dim"]
    channels, patched = configs["vae"]["latent_channels"], configs["transformer"]["in_channels"]
    for part, found, expected in (("text_encoder", encoder, wanted), ("vae", channels * 4, patched)):
        if found != expected:
            one, other = files["transformer"].name, files[part].name
            raise LongCatError(
                f"'{one}' and '{other}' do not belong together: the transformer takes {expected} channels, the "
                f"{_WORDS[part][0]} gives {found}. Choose the {_WORDS[part][0]} that came with the transformer.",
                f"“{one}”与“{other}”不配套：扩散模型接受 {expected} 个通道，{_WORDS[part][1]}给出 {found} 个。"
                f"请选择与扩散模型配套的{_WORDS[part][1]}。",
            )


@contextmanager
def _tokenizer_in(path: Path, texts: Mapping[str, Any]) -> Iterator[Path]:
    foreign = [name for name, text in texts.items() if name not in _TOKENIZER_NAMES or not isinstance(text, str)]
    if foreign:
        raise damaged(path, ValueError(f"no tokenizer file: {foreign[0]}"))
    with TemporaryDirectory(prefix="longcat-tokenizer-") as folder:
        for name, text in texts.items():
            (Path(folder) / name).write_text(text, encoding="utf-8", newline="")
        require_tokenizer(Path(folder))
        yield Path(folder)
