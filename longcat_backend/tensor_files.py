"""One safetensors file of weights, plain or quantised as ComfyUI stores them.

A quantised layer has a weight of 8 bits with its scale beside it: ``X.scale_weight`` in files with the old marker
``scaled_fp8``, else ``X.weight_scale`` with the format in ``X.comfy_quant`` or in the header. Only headers and those
few bytes are read until a tensor is asked for.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import LongCatError
from .layouts import Rows, without_prefix

# The format's names.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
_OLD_MARKER = "scaled_fp8"
_OLD_FORMATS = {stored: name for name, stored in FORMATS.items() if stored in FLOATS}
_HEADER_QUANTISATION = "_quantization_metadata"
_SCALE_NAMES = (".weight_scale", ".scale_weight")
_COMPANIONS = (*_SCALE_NAMES, ".comfy_quant", ".input_scale", ".scale_input")
_DEFAULT_GROUP = 256


@dataclass(frozen=True)
class Quantisation:
    """How the weight of one layer is stored."""

    format: str
    scale: str  # the key of the scale: one number, or one per row
    group: int = 0  # input features that were rotated together by a Hadamard matrix; 0: none

    def config(self) -> dict[str, Any]:
        """What ComfyUI stores about the layer under ``comfy_quant``."""
        rotation = {"convrot": True, "convrot_groupsize": self.group} if self.group else {}
        return {"format": self.format, **rotation}


class TensorFile:
    """The weights of one file under their names without ComfyUI's prefixes, read when they are asked for."""

    def __init__(self, path: Path, prefixes: tuple[str, ...] = ()) -> None:
        """Read the header.

        Raises:
            LongCatError: the file is no sound safetensors file, or holds weights in an unknown format.
        """
        self.path = path
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self._stored = {without_prefix(key, prefixes): key for key in self._file.keys()}  # noqa: SIM118
            slices = {key: self._file.get_slice(stored) for key, stored in self._stored.items()}
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error
        self._dtypes = {key: value.get_dtype() for key, value in slices.items()}
        self.quantised = self._find_quantised(prefixes)
        self.shapes = {key: torch.Size(value.get_shape()) for key, value in slices.items() if not self._is_aside(key)}
        self._refuse_foreign()

    def read(self, rows: Rows) -> torch.Tensor:
        """Rows of a weight: as stored, or dequantised to float32.

        Raises:
            LongCatError: the file was cut short or changed since its header was read.
        """
        tensor = rows.of(self.stored(rows.key))
        how = self.quantised.get(rows.key)
        if how is None:
            return tensor
        scale = self.stored(how.scale).float()
        return dequantise(tensor, rows.of(scale) if scale.numel() > 1 else scale.reshape(()), how.group)

    def stored(self, key: str) -> torch.Tensor:
        """A tensor of the file as it is, a quantised weight or its scale too.

        Raises:
            LongCatError: as for :meth:`read`.
        """
        try:
            tensor: torch.Tensor = self._file.get_tensor(self._stored[key])
        except (SafetensorError, OSError) as error:
            raise damaged(self.path, error) from error
        return tensor

    def _find_quantised(self, prefixes: tuple[str, ...]) -> dict[str, Quantisation]:
        layers = _header_layers(self.path, self.metadata.get(_HEADER_QUANTISATION), prefixes)
        for key in self._dtypes:
            layer, _, end = key.rpartition(".")
            if end == "comfy_quant":
                layers[layer] = _parse_config(self.path, layer, bytes(self.stored(key).tolist()))
            elif end == "scale_weight" and _OLD_MARKER in self._dtypes:
                layers[layer] = {"format": _OLD_FORMATS.get(self._dtypes.get(f"{layer}.weight", ""))}
        return {f"{layer}.weight": self._quantisation(layer, config) for layer, config in layers.items()}

    def _quantisation(self, layer: str, config: Mapping[str, Any]) -> Quantisation:
        name = config.get("format")
        scale = next((layer + end for end in _SCALE_NAMES if layer + end in self._dtypes), None)
        stored = self._dtypes.get(f"{layer}.weight")
        if name not in FORMATS or scale is None or stored != FORMATS[name]:
            known = ", ".join(FORMATS)
            found = f"{name}, stored as {stored}, {'with' if scale else 'without'} a scale"
            raise LongCatError(
                f"The layer '{layer}' in '{self.path.name}' is quantised in a way that cannot be read: {found}. "
                f"Expected one of {known} with its scale. Use the bf16 file, or one of these formats.",
                f"“{self.path.name}”中的层“{layer}”的量化方式无法读取：{found}。应为 {known} 之一并带有缩放系数。"
                "请使用 bf16 文件或上述格式之一。",
            )
        nested = config.get("params")
        options = {**(nested if isinstance(nested, dict) else {}), **config}
        return Quantisation(str(name), scale, rotation_group(options))

    def _is_aside(self, key: str) -> bool:
        """Whether a tensor only says how another one is stored."""
        end = next((end for end in _COMPANIONS if key.endswith(end)), None)
        return key == _OLD_MARKER or (end is not None and f"{key.removesuffix(end)}.weight" in self.quantised)

    def _refuse_foreign(self) -> None:
        for key in self.shapes:
            if key not in self.quantised and self._dtypes[key] not in FLOATS:
                raise foreign_format(key, self._dtypes[key])


def rotation_group(config: Mapping[str, Any]) -> int:
    """How many input features of a layer were rotated together, from what ComfyUI stores about it; 0: none."""
    return int(config.get("convrot_groupsize", _DEFAULT_GROUP)) if config.get("convrot") else 0


def dequantise(tensor: torch.Tensor, scale: torch.Tensor, group: int = 0) -> torch.Tensor:
    """A quantised weight (rows, columns) in float32.

    Args:
        scale: one number, or (rows, 1) or (rows,).
        group: columns that were rotated together, see :class:`Quantisation`.
    """
    if scale.ndim == 1:
        scale = scale[:, None]
    values = tensor.float() * scale
    if not group:
        return values
    from comfy_kitchen.tensor import TensorWiseINT8Layout  # comes with ComfyUI

    params = TensorWiseINT8Layout.Params(
        scale=scale,
        orig_dtype=torch.float32,
        orig_shape=tuple(tensor.shape),
        convrot=True,
        convrot_groupsize=group,
    )
    rotated: torch.Tensor = TensorWiseINT8Layout.dequantize(tensor, params)
    return rotated


def damaged(path: Path, error: Exception) -> LongCatError:
    """The error for a file that is no sound safetensors file."""
    name = f"{path.parent.name}/{path.name}"
    return LongCatError(
        f"'{name}' is damaged or was not downloaded completely ({error}). Download this file again.",
        f"“{name}”已损坏或下载不完整（{error}）。请重新下载该文件。",
    )


def foreign_format(key: str, found: str) -> LongCatError:
    """The error for a weight in a format that is neither of floating point nor ComfyUI's."""
    return LongCatError(
        f"The weight '{key}' is stored as {found}, which is a quantised or foreign format. Expected one "
        f"of {', '.join(FLOATS)}: use the official weights and choose the precision in LongCatLoader.",
        f"权重“{key}”以 {found} 存储，属于量化或其他格式，应为 {', '.join(FLOATS)} 之一。"
        "请使用官方权重，并在 LongCatLoader 中选择精度。",
    )


def _header_layers(path: Path, text: str | None, prefixes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    if text is None:
        return {}
    layers = _parse_config(path, _HEADER_QUANTISATION, text.encode()).get("layers")
    entries = layers.items() if isinstance(layers, dict) else ()
    return {without_prefix(layer, prefixes): config for layer, config in entries if isinstance(config, dict)}


def _parse_config(path: Path, place: str, text: bytes) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, ValueError(f"{place}: {error}")) from error
    return config if isinstance(config, dict) else {}
