"""Optimisers of kept libraries by one name each, and the learning rate as a function of the step."""

import importlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import LongCatError
from ..quantisation import leaves
from .settings import TrainSettings

BETAS = (0.9, 0.999)
LION_BETAS = (0.9, 0.99)
# Optimiser to the module that holds it, the class, and what pip calls the package.
_OPTIONAL = {
    "adamw-8bit": ("torchao.optim", "AdamW8bit", "torchao"),
    "prodigy": ("prodigyopt", "Prodigy", "prodigyopt"),
    "lion": ("lion_pytorch", "Lion", "lion-pytorch"),
}
LEAST_PRODIGY_RATE = 0.1
# What its authors advise for diffusion models, see prodigyopt's README.
_PRODIGY = {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
log = logging.getLogger(__name__)


def make(settings: TrainSettings, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that the settings name, over the fp32 masters.

    Raises:
        LongCatError: its package is missing, with the command that installs it.
    """
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=BETAS, weight_decay=decay)
    kind = _optional(settings.optimiser)
    if settings.optimiser == "prodigy" and rate < LEAST_PRODIGY_RATE:
        log.warning(
            "Prodigy finds the learning rate by itself and multiplies it by yours, which is %g: set it to 1. "
            "Prodigy 会自行估计学习率并乘以您设置的 %g：请设为 1。",
            rate,
            rate,
        )
    betas = LION_BETAS if settings.optimiser == "lion" else BETAS
    extra = _PRODIGY if settings.optimiser == "prodigy" else {}
    optimiser: torch.optim.Optimizer = kind(parameters, lr=rate, betas=betas, weight_decay=decay, **extra)
    return optimiser


def _optional(name: str) -> Any:
    module, kind, package = _OPTIONAL[name]
    try:
        return getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError, OSError) as error:
        raise LongCatError(
            f"The optimiser '{name}' needs the Python package '{package}', which cannot be used here: {error}. "
            f"Install it with: pip install {package}. Or choose adamw.",
            f"优化器“{name}”需要 Python 包“{package}”，但此处无法使用：{error}。"
            f"请运行 pip install {package}，或选择 adamw。",
        ) from error


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Of the update that ends a step (1 is the first): linear warm-up, then the schedule, down to 0 at the end."""
    warmed = min(1.0, step / (settings.warmup + 1))
    if settings.schedule == "constant" or step <= settings.warmup:
        return settings.learning_rate * warmed
    done = (step - settings.warmup - 1) / max(1, settings.steps - settings.warmup)
    left = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.learning_rate * left


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """For the next update; torchao's optimisers hold it in a tensor."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def without_compiling(settings: TrainSettings) -> AbstractContextManager[Any]:
    """torchao compiles its update, for which a machine needs a compiler; only ``compile`` asks for that."""
    if settings.optimiser != "adamw-8bit" or settings.compile:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def clip(parameters: Iterable[nn.Parameter], norm: float) -> float:
    """Scale the gradients so that their common norm is at most ``norm`` (0: any), and give the norm before that."""
    total = nn.utils.clip_grad_norm_(list(parameters), norm or math.inf)
    return float(total)


def exported(optimiser: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state of an optimiser: plain tensors by name, and its numbers, such as Prodigy's estimate of the rate."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for key, value in _state(optimiser):
        if isinstance(value, torch.Tensor):
            tensors.update({name: leaf.detach().cpu().clone() for name, leaf in leaves(value, key)})
        else:
            numbers[key] = value
    for place, group in enumerate(optimiser.param_groups):
        numbers |= {f"group.{place}.{key}": value for key, value in group.items() if _is_number(value)}
    return tensors, numbers


@torch.no_grad()
def restore(optimiser: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
    """Give a fresh optimiser the state of :func:`exported`.

    It makes its buffers by an update with gradients of zero; the parameters have to be set after this.

    Raises:
        LongCatError: the state is that of another optimiser, or of another version of it.
    """
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    optimiser.zero_grad()
    own = {name: leaf for key, value in _state(optimiser) for name, leaf in _tensors(value, key)}
    if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
        odd = sorted(own.keys() ^ tensors.keys())
        raise LongCatError(
            f"The saved state is of another optimiser or another version of its package ({', '.join(odd[:3]) or '-'}). "
            "Install the version that the run began with, or start the run anew in another folder.",
            f"保存的状态属于另一种优化器或其软件包的另一版本（{', '.join(odd[:3]) or '-'}）。"
            "请安装开始训练时的版本，或在另一文件夹中重新开始。",
        )
    for name, leaf in own.items():
        leaf.copy_(tensors[name])
    for place, group in enumerate(optimiser.param_groups):
        group.update({key: numbers[f"group.{place}.{key}"] for key, value in group.items() if _is_number(value)})
    for place, parameter in enumerate(_parameters(optimiser)):
        state = optimiser.state[parameter]
        state.update({key: numbers[f"{place}.{key}"] for key, value in state.items() if _is_number(value)})


def _parameters(optimiser: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _state(optimiser: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    for place, parameter in enumerate(_parameters(optimiser)):
        for key, value in optimiser.state[parameter].items():
            yield f"{place}.{key}", value


def _tensors(value: Any, key: str) -> Iterable[tuple[str, torch.Tensor]]:
    return leaves(value, key) if isinstance(value, torch.Tensor) else ()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


class Average:
    """An exponential moving average of the masters, whose decay grows with the steps to what was set.

    Source: ``EMAModel`` of diffusers: at step k the decay is min(decay, (1 + k) / (10 + k)).
    """

    def __init__(self, masters: Sequence[torch.Tensor], decay: float) -> None:
        self.decay = decay
        self.weights = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, masters: Sequence[torch.Tensor], step: int) -> None:
        """Take the masters of a step in; the first is 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for weight, master in zip(self.weights, masters, strict=True):
            weight.lerp_(master, 1 - decay)
