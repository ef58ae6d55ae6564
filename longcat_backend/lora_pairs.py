"""From the tensors of a LoRA file, by layer and part, to adapters of official layers."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from . import lora
from .errors import LongCatError
from .lora import LOHA, LOKR, Adapter, AnyAdapter, Difference, Factored
from .lora_alpha import CONFIG, Alphas
from .lora_dialects import ALPHA, DOWN, UP, Key, Layer

_DIFF, _DIFF_BIAS = "diff", "diff_b"
_WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_KNOWN = {DOWN, UP, ALPHA, _DIFF, _DIFF_BIAS, *LOHA, *LOKR}


@dataclass
class _Parts:
    """What a file holds for one layer."""

    layer: Layer
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # as they are in the file, for messages


class Pairs:
    """Builds the adapters of one file, and remembers where each alpha came from."""

    def __init__(self, name: str, alphas: Alphas | None, peft: bool) -> None:
        """
        Args:
            name: of the file, for messages.
            alphas: of the file's header or of the folder's configuration; alpha tensors go before it.
            peft: whether the file is PEFT's, which keeps alpha in another file.
        """
        self._name = name
        self._alphas = alphas
        self._peft = peft
        self._stored: set[str] = set()  # names of official layers
        self._configured: set[str] = set()
        self._assumed: set[str] = set()

    def build(self, tensors: Mapping[str, tuple[Key, torch.Tensor]]) -> tuple[AnyAdapter, ...]:
        """Adapters of official layers, in the order of the file.

        Raises:
            LongCatError: a part of a layer is missing, unknown, of the wrong shape, or not finite; the message names
                its key. Nothing is left out without a word.
        """
        layers: dict[str, _Parts] = {}
        for stored, (key, tensor) in tensors.items():
            parts = layers.setdefault(key.layer.name, _Parts(key.layer))
            if key.part not in _KNOWN:
                raise self._refused(stored, key.part)
            if key.part in parts.tensors:
                raise self._twice(stored, parts.keys[key.part])
            parts.tensors[key.part] = self._sound(stored, key.part, tensor)
            parts.keys[key.part] = stored
        adapters: dict[tuple[str, str], AnyAdapter] = {}
        for parts in layers.values():
            for adapter in self._of_layer(parts):
                kind = adapter.part if isinstance(adapter, Difference) else "product"
                earlier = adapters.setdefault((adapter.module, kind), adapter)
                if earlier is not adapter and not torch.equal(lora.delta(earlier), lora.delta(adapter)):
                    raise self._twice(next(iter(parts.keys.values())), adapter.module)
        return tuple(adapters.values())

    def notes(self) -> tuple[str, ...]:
        """Where the alphas came from, for the report."""
        notes = []
        if self._stored:
            notes.append(f"alpha: {len(self._stored)} from the file's tensors 来自文件中的张量")
        if self._configured and self._alphas is not None:
            notes.append(f"alpha: {len(self._configured)} from {self._alphas.source} 来自 {self._alphas.source}")
        if self._assumed:
            count = len(self._assumed)
            notes.append(
                f"alpha: not in the file for {count}, taken as equal to the rank (scale 1), as ComfyUI and "
                f"diffusers do 文件中缺少 {count} 个，按等于秩（缩放 1）处理，与 ComfyUI 和 diffusers 相同"
            )
        if self._assumed and self._peft:
            notes.append(
                f"WARNING: the file is PEFT's, which keeps alpha in {CONFIG}. Put both into a folder of their own; "
                "without it the LoRA may be several times too strong. "
                f"警告：该文件由 PEFT 写入，其 alpha 保存在 {CONFIG} 中。请把两者放入同一个单独的文件夹，"
                "否则强度可能偏大数倍。"
            )
        return tuple(notes)

    def _of_layer(self, parts: _Parts) -> Iterator[AnyAdapter]:
        for adapter in self._of_stored_layer(parts):
            if parts.layer.exchanged:
                adapter = lora.halves_exchanged(adapter)
            yield from _split(adapter, parts.layer.officials)

    def _of_stored_layer(self, parts: _Parts) -> Iterator[AnyAdapter]:
        """Adapters with the outputs of the file's layer, still all of them."""
        module, tensors = parts.layer.officials[0], parts.tensors
        if DOWN in tensors or UP in tensors:
            yield self._low_rank(parts, module)
        if any(name in tensors for name in (*LOHA, *LOKR)):
            yield self._factored(parts, module)
        if _DIFF in tensors:
            yield Difference(module, self._matrix(parts, _DIFF))
        if _DIFF_BIAS in tensors:
            yield Difference(module, tensors[_DIFF_BIAS].flatten(), "bias")
        if set(tensors) == {ALPHA}:
            raise self._missing(parts.keys[ALPHA], "lora_A, lora_B")

    def _low_rank(self, parts: _Parts, module: str) -> Adapter:
        for part, other in ((DOWN, UP), (UP, DOWN)):
            if part not in parts.tensors:
                raise self._missing(parts.keys[other], "lora_A / lora_down" if part == DOWN else "lora_B / lora_up")
        down, up = self._matrix(parts, DOWN), self._matrix(parts, UP)
        if down.shape[0] != up.shape[1] or not down.shape[0]:
            raise self._misshapen(
                parts.keys[UP], f"{list(up.shape)} beside {list(down.shape)}", "(out, rank) beside (rank, in)"
            )
        alpha = self._alpha(parts, parts.layer.officials[0], down.shape[0])
        return Adapter(module, down, up, down.shape[0] if alpha is None else alpha)

    def _factored(self, parts: _Parts, module: str) -> Factored:
        if DOWN in parts.tensors or _DIFF in parts.tensors:
            raise self._twice(next(iter(parts.keys.values())), "LyCORIS")
        names = LOHA if any(name in parts.tensors for name in LOHA) else LOKR
        factors = {name: self._matrix(parts, name) for name in names if name in parts.tensors}
        missing = _missing_factors(set(factors), names)
        if missing:
            raise self._missing(next(parts.keys[name] for name in factors), missing)
        if not _factors_fit(factors):
            shapes = {name: list(factor.shape) for name, factor in factors.items()}
            raise self._misshapen(next(parts.keys[name] for name in factors), str(shapes), "products that fit")
        adapter = Factored(module, factors, None)
        if adapter.rank is None:  # nothing is decomposed, so alpha means nothing
            return adapter
        return Factored(module, factors, self._alpha(parts, module, adapter.rank))

    def _alpha(self, parts: _Parts, module: str, rank: int) -> float | None:
        if ALPHA in parts.tensors:
            stored = parts.tensors[ALPHA]
            if stored.numel() != 1:
                raise self._misshapen(parts.keys[ALPHA], str(list(stored.shape)), "one number")
            self._stored.add(module)
            return float(stored)
        if self._alphas is not None:
            self._configured.add(module)
            return self._alphas.of(module, rank)
        self._assumed.add(module)
        return None

    def _matrix(self, parts: _Parts, part: str) -> torch.Tensor:
        tensor = parts.tensors[part]
        if tensor.ndim != 2:
            raise self._misshapen(parts.keys[part], str(list(tensor.shape)), "a matrix")
        return tensor

    def _sound(self, key: str, part: str, tensor: torch.Tensor) -> torch.Tensor:
        if part == ALPHA and tensor.dtype in _WHOLE:  # as some programs store it, and ComfyUI reads it
            tensor = tensor.double()
        if not tensor.is_floating_point():
            found = str(tensor.dtype).removeprefix("torch.")
            raise self._misshapen(key, found, "numbers of floating point")
        if tensor.dtype.itemsize == 1:  # 8-bit floats can be stored, but not computed with
            tensor = tensor.to(torch.bfloat16)
        if not tensor.isfinite().all():
            raise LongCatError(
                f"'{key}' in '{self._name}' holds values that are not numbers (NaN or infinite): the training failed "
                "or the file is damaged. Use an earlier save of this LoRA.",
                f"“{self._name}”中的“{key}”含有 NaN 或无穷大：训练失败或文件已损坏。请使用该 LoRA 更早的存档。",
            )
        return tensor

    def _refused(self, key: str, part: str) -> LongCatError:
        return LongCatError(
            f"'{key}' in '{self._name}': '{part}' is not supported, and without it the picture would be another. "
            "Supported are LoRA, LoHa and LoKr with alpha, diff and diff_b: save or convert the adapter as one of "
            "these.",
            f"“{self._name}”中的“{key}”：不支持“{part}”，而忽略它会改变画面。支持带 alpha 的 LoRA、LoHa、LoKr，"
            "以及 diff、diff_b：请保存或转换为其中之一。",
        )

    def _missing(self, key: str, what: str) -> LongCatError:
        return LongCatError(
            f"'{key}' in '{self._name}' has no counterpart: {what} is missing. The file is incomplete: download or "
            "save it again.",
            f"“{self._name}”中的“{key}”缺少对应项：{what}。文件不完整，请重新下载或保存。",
        )

    def _misshapen(self, key: str, found: str, expected: str) -> LongCatError:
        return LongCatError(
            f"'{key}' in '{self._name}' is {found}, expected {expected}. The file is damaged or in a format that is "
            "not known here.",
            f"“{self._name}”中的“{key}”为 {found}，应为 {expected}。文件已损坏或格式未知。",
        )

    def _twice(self, key: str, other: str) -> LongCatError:
        return LongCatError(
            f"'{self._name}' changes one layer twice in different ways: '{key}' and '{other}'. Split it into two "
            "files.",
            f"“{self._name}”对同一层有两种不同的修改：“{key}”与“{other}”。请拆分为两个文件。",
        )


def _split(adapter: AnyAdapter, officials: tuple[str, ...]) -> Iterator[AnyAdapter]:
    """One adapter for each official layer that the file's layer holds: their sizes are the hidden size, the last is
    the rest."""
    if len(officials) == 1:
        yield adapter
        return
    # Queries, keys and values have as many outputs as their layer has inputs.
    bias = isinstance(adapter, Difference) and adapter.part == "bias"
    hidden = adapter.shape[0] // (7 if len(officials) == 4 else 3) if bias else adapter.shape[1]
    for number, official in enumerate(officials):
        stop = adapter.shape[0] if number == len(officials) - 1 else hidden * (number + 1)
        yield lora.rows(adapter, hidden * number, stop, official)


def _missing_factors(found: set[str], names: tuple[str, ...]) -> str:
    if names == LOHA:
        return ", ".join(sorted(set(LOHA) - found))
    lacking = []
    for whole in ("lokr_w1", "lokr_w2"):
        halves = {f"{whole}_a", f"{whole}_b"}
        if whole not in found and not halves <= found:
            lacking.append(whole if not halves & found else ", ".join(sorted(halves - found)))
    return ", ".join(lacking)


def _factors_fit(factors: Mapping[str, torch.Tensor]) -> bool:
    for first, second in (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")):
        if first in factors and factors[first].shape[1] != factors[second].shape[0]:
            return False
    for first, second in (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")):
        if first in factors and factors[first].shape[1] != factors[second].shape[0]:
            return False
    if "hada_w1_a" not in factors:
        return True
    sizes = [(factors[f"hada_w{n}_a"].shape[0], factors[f"hada_w{n}_b"].shape[1]) for n in (1, 2)]
    return sizes[0] == sizes[1] and all(math.prod(size) for size in sizes)
