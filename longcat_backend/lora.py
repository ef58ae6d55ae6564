"""Adapters: changes to linear layers of the transformer, each small beside the layer, under its official name.

Whatever dialect a file is in (:mod:`lora_dialects`), it becomes these; whatever engine and precision a model has, it
is given these (``comfy_bridge.lora``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .errors import LongCatError

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


@dataclass(frozen=True)
class Adapter:
    """A LoRA on one layer: its output gains ``alpha / rank * up(down(input))``."""

    module: str  # official name, "transformer_blocks.0.attn.to_q"
    down: torch.Tensor  # (rank, in_features)
    up: torch.Tensor  # (out_features, rank)
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of ``down``."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the layer it fits."""
        return self.up.shape[0], self.down.shape[1]


@dataclass(frozen=True)
class Factored:
    """LyCORIS' LoHa or LoKr on one layer, whose change is a Hadamard or a Kronecker product of small matrices."""

    module: str
    factors: Mapping[str, torch.Tensor]  # names of LOHA or LOKR
    alpha: float | None  # None: not scaled

    @property
    def algorithm(self) -> str:
        """``"loha"`` or ``"lokr"``."""
        return "loha" if "hada_w1_a" in self.factors else "lokr"

    @property
    def rank(self) -> int | None:
        """The rank of what is decomposed; None where both matrices of a LoKr are whole."""
        names = ("hada_w1_b",) if self.algorithm == "loha" else ("lokr_w2_b", "lokr_w1_b")
        return next((self.factors[name].shape[0] for name in names if name in self.factors), None)

    @property
    def scale(self) -> float:
        """What the product is multiplied by; alpha means nothing where nothing is decomposed."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the layer it fits."""
        if self.algorithm == "loha":
            return self.factors["hada_w1_a"].shape[0], self.factors["hada_w1_b"].shape[1]
        first, second = self._outline("lokr_w1"), self._outline("lokr_w2")
        return first[0] * second[0], first[1] * second[1]

    def _outline(self, name: str) -> tuple[int, int]:
        if name in self.factors:
            return self.factors[name].shape[0], self.factors[name].shape[1]
        return self.factors[f"{name}_a"].shape[0], self.factors[f"{name}_b"].shape[1]


@dataclass(frozen=True)
class Difference:
    """Values that are added to the weight or the bias of one layer as they are."""

    module: str
    values: torch.Tensor  # (out_features, in_features), or (out_features,) for a bias
    part: str = "weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor it is added to."""
        return tuple(self.values.shape)


AnyAdapter = Adapter | Factored | Difference


def delta(adapter: AnyAdapter) -> torch.Tensor:
    """What is added to the weight, or to the bias, at strength 1, in float32."""
    if isinstance(adapter, Difference):
        return adapter.values.float()
    if isinstance(adapter, Adapter):
        return adapter.scale * (adapter.up.float() @ adapter.down.float())
    if adapter.algorithm == "loha":
        first, second = (_product(adapter.factors, f"hada_w{number}") for number in (1, 2))
        return adapter.scale * first * second
    first, second = (_product(adapter.factors, f"lokr_w{number}") for number in (1, 2))
    return adapter.scale * torch.kron(first.contiguous(), second.contiguous())


def rows(adapter: AnyAdapter, start: int, stop: int, module: str) -> AnyAdapter:
    """The part of an adapter that changes the outputs ``start`` to ``stop``, as an adapter of another layer."""
    if isinstance(adapter, Adapter):
        return replace(adapter, module=module, up=adapter.up[start:stop])
    if isinstance(adapter, Difference):
        return replace(adapter, module=module, values=adapter.values[start:stop])
    if adapter.algorithm == "loha":
        cut = {name: adapter.factors[name][start:stop] for name in ("hada_w1_a", "hada_w2_a")}
        return replace(adapter, module=module, factors={**adapter.factors, **cut})
    # The rows of a Kronecker product are no such product, unless the cut happens to suit it.
    dtype = next(iter(adapter.factors.values())).dtype
    return Difference(module, delta(adapter)[start:stop].to(dtype))


def halves_exchanged(adapter: AnyAdapter) -> AnyAdapter:
    """The adapter of a layer whose two halves of outputs lie the other way around."""
    if isinstance(adapter, Adapter):
        return replace(adapter, up=_exchanged(adapter.up))
    if isinstance(adapter, Difference):
        return replace(adapter, values=_exchanged(adapter.values))
    if adapter.algorithm == "loha":
        cut = {name: _exchanged(adapter.factors[name]) for name in ("hada_w1_a", "hada_w2_a")}
        return replace(adapter, factors={**adapter.factors, **cut})
    dtype = next(iter(adapter.factors.values())).dtype
    return Difference(adapter.module, _exchanged(delta(adapter)).to(dtype))


def require_fit(adapter: AnyAdapter, shape: tuple[int, ...] | None) -> None:
    """Refuse an adapter for a layer that the model lacks, or has in another size.

    Args:
        shape: of the weight, or of the bias, that it changes; None: there is no such linear layer.

    Raises:
        LongCatError: it does not fit.
    """
    if shape is None:
        raise LongCatError(
            f"The LoRA changes the layer '{adapter.module}', which this model does not have as a linear layer. It was "
            "made for another model: choose a LoRA for LongCat-Image.",
            f"该 LoRA 修改了层“{adapter.module}”，而当前模型没有该线性层。"
            "它属于其他模型，请选择 LongCat-Image 的 LoRA。",
        )
    if adapter.shape != tuple(shape):
        raise LongCatError(
            f"The LoRA's change of the layer '{adapter.module}' has the shape {list(adapter.shape)}, the model's "
            f"layer {list(shape)}. It was made for another model: choose a LoRA for this one.",
            f"该 LoRA 对层“{adapter.module}”的修改形状为 {list(adapter.shape)}，而模型中该层为 {list(shape)}。"
            "它属于其他模型，请选择与当前模型匹配的 LoRA。",
        )


def _product(factors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name in factors:
        return factors[name].float()
    return factors[f"{name}_a"].float() @ factors[f"{name}_b"].float()


def _exchanged(tensor: torch.Tensor) -> torch.Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])
