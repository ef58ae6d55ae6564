"""The LoRA beside the frozen transformer: peft's layers, with their weights in fp32 apart from the computation.

The layers compute in the model's own dtype, without autocast, so that the forward of training is that of drawing.
What the optimiser changes are fp32 copies (masters); they are published to the layers after every update.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ..errors import LongCatError
from ..lora import Adapter
from .draws import seed_of

NAME = "default"  # of the adapter in peft
_ATTENTION = r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)|single_transformer_blocks\.\d+\.attn\.to_[qkv]"
_OFFICIAL = (
    rf"{_ATTENTION}|transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
)
_ALL = rf"{_OFFICIAL}|single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
# 100, 180 and 220 layers at full size: those of SimpleTuner, of the official script, and all linear layers of blocks.
PATTERNS = {"attention": re.compile(_ATTENTION), "official": re.compile(_OFFICIAL), "all": re.compile(_ALL)}


def target_layers(transformer: nn.Module, targets: str) -> list[str]:
    """Names of the linear layers that a set of targets stands for; ``targets`` is a key of ``PATTERNS``."""
    pattern = PATTERNS[targets]
    layers = transformer.named_modules()
    return [name for name, layer in layers if isinstance(layer, nn.Linear) and pattern.fullmatch(name)]


@dataclass
class Adapters:
    """The adapters of one transformer: names, layers of peft, and the fp32 masters, A and B in turn."""

    alpha: float
    names: list[str]
    layers: list[LoraLayer]
    masters: list[nn.Parameter]

    def live(self) -> list[nn.Parameter]:
        """What the forward uses, in the order of the masters."""
        return [
            parameter for layer in self.layers for parameter in (layer.lora_A[NAME].weight, layer.lora_B[NAME].weight)
        ]

    @torch.no_grad()
    def publish(self, weights: Sequence[torch.Tensor] | None = None) -> None:
        """Give the layers the masters, or other weights of the same shapes, rounded to their dtype."""
        torch._foreach_copy_(self.live(), list(weights or self.masters))

    @torch.no_grad()
    def collect(self) -> None:
        """Add the layers' gradients to those of the masters, and forget them."""
        found = [pair for pair in zip(self.live(), self.masters, strict=True) if pair[0].grad is not None]
        added = [(master.grad, parameter.grad) for parameter, master in found if master.grad is not None]
        if added:
            torch._foreach_add_(*map(list, zip(*added, strict=True)))
        first = [(parameter, master) for parameter, master in found if master.grad is None]
        for _, master in first:
            master.grad = torch.empty_like(master)
        if first:
            torch._foreach_copy_([master.grad for _, master in first], [parameter.grad for parameter, _ in first])
        for parameter, _ in found:
            parameter.grad = None

    def forget_gradients(self) -> None:
        """Without a trace of a step that was broken off."""
        for parameter in (*self.live(), *self.masters):
            parameter.grad = None

    @contextmanager
    def showing(self, weights: Sequence[torch.Tensor]) -> Iterator[None]:
        """Let the layers compute with other weights, such as the average, for a while."""
        self.publish(weights)
        try:
            yield
        finally:
            self.publish()

    def exported(self, weights: Sequence[torch.Tensor] | None = None) -> tuple[Adapter, ...]:
        """Copies in fp32 on the CPU, of the masters or of other weights in their order, for a file."""
        given = [value.detach().float().cpu().clone() for value in weights or self.masters]
        return tuple(
            Adapter(name, down, up, self.alpha)
            for name, down, up in zip(self.names, given[::2], given[1::2], strict=True)
        )


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Let a model that is being trained compute as if it had no adapters."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def inject(transformer: nn.Module, targets: str, rank: int, alpha: float, seed: int, device: torch.device) -> Adapters:
    """Put fresh adapters beside the layers that ``targets`` names. Nothing but them needs a gradient afterwards.

    A is drawn as peft draws it (Kaiming, a = sqrt 5), from the seed and the layer's name; B is zero, so the output
    does not change. Quantised layers keep their weights; the adapters stand beside them, on ``device``.

    Raises:
        LongCatError: the transformer has no such layer, or its weights were made in inference mode.
    """
    names = target_layers(transformer, targets)
    if not names:
        raise LongCatError(
            f"The transformer has no layer that the targets '{targets}' name, so it is not LongCat-Image's. Load it "
            "from a LongCat-Image checkpoint.",
            f"该变换器没有目标“{targets}”所指的层，因此不是 LongCat-Image 的变换器。请从 LongCat-Image 检查点加载。",
        )
    _refuse_inference_tensors(transformer)
    dtypes = {name: _compute_dtype(transformer.get_submodule(name)) for name in names}
    # peft declares alpha as a whole number and divides it by the rank; any number does.
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)  # type: ignore[arg-type]
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator, which belongs to the host
        inject_adapter_in_model(config, transformer, NAME)
    layers = [transformer.get_submodule(name) for name in names]
    masters: list[nn.Parameter] = []
    for name, layer in zip(names, layers, strict=True):
        down, up = layer.lora_A[NAME], layer.lora_B[NAME]
        for part in (down, up):
            part.to(device, dtypes[name]).requires_grad_(True)
        masters += [_first(down.weight, seed_of("adapter", seed, name)), _zeros(up.weight)]
    adapters = Adapters(alpha, names, layers, masters)
    adapters.publish()
    return adapters


def _first(weight: torch.Tensor, seed: int) -> nn.Parameter:
    drawn = torch.empty(weight.shape)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(drawn.to(weight.device))


def _zeros(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(torch.zeros(weight.shape, device=weight.device))


def _compute_dtype(layer: nn.Module) -> torch.dtype:
    """A quantised weight claims the dtype of its computation."""
    dtype: torch.dtype = layer.weight.dtype
    return dtype


def _refuse_inference_tensors(transformer: nn.Module) -> None:
    made = [name for name, tensor in transformer.named_parameters() if tensor.is_inference()]
    if made:
        raise LongCatError(
            f"{len(made)} weights ({made[0]}, …) were made in PyTorch's inference mode and cannot be trained beside. "
            "Load the checkpoint anew, outside inference mode.",
            f"{len(made)} 个权重（{made[0]} 等）是在 PyTorch 推理模式下创建的，无法在其旁训练。"
            "请在推理模式之外重新加载检查点。",
        )
