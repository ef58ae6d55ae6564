"""What a training run is told, as one value that is checked, written to JSON and compared when a run goes on."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import LongCatError
from ..memory import GroupOffload
from ..precision import PRESETS
from ..quantisation import check_group_offload

TARGETS = ("attention", "official", "all")
OPTIMISERS = ("adamw", "adamw-8bit", "prodigy", "lion")
SCHEDULES = ("constant", "cosine", "linear")
BASE_PRECISIONS = ("bf16", "fp32", "int8-quanto", "int4-quanto", "fp8-torchao")
CHECKPOINTING = ("none", "block", "every-second")
OFFLOADS = ("none", "block", "leaf")
FLOW_SHIFTS = ("batch", "run")

_CHOICES = {
    "targets": TARGETS,
    "optimiser": OPTIMISERS,
    "schedule": SCHEDULES,
    "base_precision": BASE_PRECISIONS,
    "checkpointing": CHECKPOINTING,
    "offload": OFFLOADS,
}
# Smallest and largest value of each number; the largest is there to catch a slip, not to limit anybody.
_RANGES = {
    "steps": (1, 10_000_000),
    "batch": (1, 1024),
    "accumulation": (1, 4096),
    "rank": (1, 4096),
    "learning_rate": (0.0, 10.0),
    "weight_decay": (0.0, 10.0),
    "warmup": (0, 10_000_000),
    "clip": (0.0, 1e9),
    "ema": (0.0, 0.999999),
    "seed": (0, 2**64 - 1),
    "offload_blocks": (1, 64),
    "save_every": (0, 10_000_000),
    "keep": (1, 1000),
    "validate_every": (0, 10_000_000),
    "preservation_weight": (0.0, 1000.0),
}
# What may change when a run goes on: how long it lasts, what it writes, and how the same numbers are computed.
CHANGEABLE = frozenset(
    {"steps", "save_every", "keep", "validate_every"}
    | {"checkpointing", "compile", "modulation_table", "offload", "offload_blocks", "offload_stream"}
)


@dataclass(frozen=True)
class TrainSettings:
    """One LoRA training run. The defaults are the recipe of ``trainers.md`` (b).

    Raises:
        LongCatError: a value is of another type, out of range or not among the choices.
    """

    steps: int = 1000  # updates of the adapters
    batch: int = 1  # pictures in a forward
    accumulation: int = 1  # forwards in an update
    rank: int = 16
    alpha: float | None = None  # None: the rank, so that the scale alpha / rank is 1
    targets: str = "official"
    learning_rate: float = 1e-4
    optimiser: str = "adamw"
    weight_decay: float = 1e-3
    schedule: str = "constant"
    warmup: int = 0  # steps over which the learning rate rises from near 0
    clip: float = 1.0  # largest norm of the gradient of all adapters; 0: no limit
    ema: float = 0.0  # decay of the average of the adapters; 0: none is kept
    seed: int = 0
    base_precision: str = "bf16"
    checkpointing: str = "block"
    compile: bool = False
    modulation_table: bool = True  # where the base computes in bf16
    offload: str = "none"
    offload_blocks: int = 1  # in a group, at block level without a stream
    offload_stream: bool = True
    flow_shift: str | float = "batch"  # "batch", "run", or the shift s itself, which makes mu = ln s
    save_every: int = 250  # 0: at the end and when interrupted only
    keep: int = 3  # states on the disk, besides the best
    validate_every: int = 250  # 0: never
    preservation_prompts: tuple[str, ...] = ()  # what the model goes on drawing as before, see ``preservation``
    preservation_weight: float = 1.0  # of its loss beside that of the pictures; 0: no preservation

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            _check_kind(name, kind, getattr(self, name))
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        for name, (least, most) in _RANGES.items():
            _check_range(name, getattr(self, name), least, most)
        _check_prompts("preservation_prompts", self.preservation_prompts)
        if self.alpha is not None:
            _check_range("alpha", self.alpha, 1e-6, 1e6)
        if isinstance(self.flow_shift, str):
            _check_choice("flow_shift", self.flow_shift, FLOW_SHIFTS)
        else:
            _check_range("flow_shift", self.flow_shift, 0.01, 100.0)
        offload = self.group_offload()
        if offload is not None:
            offload.check()
            check_group_offload(PRESETS[self.base_precision], disk=False)
            if self.compile:
                raise _compiled_and_moved()

    @property
    def effective_alpha(self) -> float:
        """Alpha, which is the rank unless it was set."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def preserves(self) -> bool:
        """Whether something is to be drawn as before."""
        return bool(self.preservation_prompts) and self.preservation_weight > 0

    def group_offload(self) -> GroupOffload | None:
        """diffusers' group offload as set, or None."""
        if self.offload == "none":
            return None
        return GroupOffload(self.offload, self.offload_blocks, self.offload_stream)

    def to_json(self) -> dict[str, Any]:
        """Every setting by its name, of JSON's own types."""
        return {**asdict(self), "preservation_prompts": list(self.preservation_prompts)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainSettings":
        """Settings from :meth:`to_json`; what is missing takes its default.

        Raises:
            LongCatError: a name is unknown, or see the class.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise unknown_keys(unknown, known)
        given = dict(values)
        if isinstance(given.get("preservation_prompts"), list):  # JSON has no tuples
            given["preservation_prompts"] = tuple(given["preservation_prompts"])
        return cls(**given)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Settings that differ and with which a run cannot go on, each as ``name: old -> new``."""
    old = {**TrainSettings().to_json(), **old}  # what there was no setting for yet
    names = sorted((set(old) | set(new)) - CHANGEABLE)
    missing = "-"
    return [
        f"{name}: {old.get(name, missing)} -> {new.get(name, missing)}"
        for name in names
        if old.get(name, missing) != new.get(name, missing)
    ]


def _compiled_and_moved() -> LongCatError:
    """Compiled code keeps the weights themselves for the backward pass, when they have been moved away."""
    return LongCatError(
        "The training settings 'compile' and 'offload' exclude each other: compiled blocks need their weights on the "
        "device until the backward pass. Switch compile off, or set offload to none.",
        "训练设置“compile”与“offload”互斥：编译后的块在反向传播之前需要权重留在设备上。"
        "请关闭 compile，或把 offload 设为 none。",
    )


def unknown_keys(unknown: list[str], known: list[str]) -> LongCatError:
    """The error for names that no setting has, each with the nearest one that there is."""
    told, told_zh = [], []
    for name in unknown:
        near = difflib.get_close_matches(name, known, 1)
        told.append(f"'{name}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
        told_zh.append(f"“{name}”" + (f"（是否想写“{near[0]}”？）" if near else ""))
    return LongCatError(
        f"Unknown training settings: {', '.join(told)}. Known ones: {', '.join(sorted(known))}.",
        f"未知的训练设置：{'、'.join(told_zh)}。可用的设置：{'、'.join(sorted(known))}。",
    )


_KINDS: dict[str, tuple[type, ...]] = {
    "steps": (int,),
    "batch": (int,),
    "accumulation": (int,),
    "rank": (int,),
    "alpha": (float, int, type(None)),
    "targets": (str,),
    "learning_rate": (float, int),
    "optimiser": (str,),
    "weight_decay": (float, int),
    "schedule": (str,),
    "warmup": (int,),
    "clip": (float, int),
    "ema": (float, int),
    "seed": (int,),
    "base_precision": (str,),
    "checkpointing": (str,),
    "compile": (bool,),
    "modulation_table": (bool,),
    "offload": (str,),
    "offload_blocks": (int,),
    "offload_stream": (bool,),
    "flow_shift": (str, float, int),
    "save_every": (int,),
    "keep": (int,),
    "validate_every": (int,),
    "preservation_prompts": (tuple,),
    "preservation_weight": (float, int),
}


def _check_kind(name: str, kinds: tuple[type, ...], value: Any) -> None:
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not fits:
        names = {type(None): "null", tuple: "list"}  # as JSON calls them
        wanted = " or ".join(names.get(kind, kind.__name__) for kind in kinds)
        raise LongCatError(
            f"The training setting '{name}' is {value!r}; expected a value of type {wanted}.",
            f"训练设置“{name}”为 {value!r}，应为 {wanted} 类型的值。",
        )


def _check_prompts(name: str, prompts: tuple[Any, ...]) -> None:
    wrong = [prompt for prompt in prompts if not isinstance(prompt, str) or not prompt.strip()]
    if wrong:
        raise LongCatError(
            f"The training setting '{name}' holds {wrong[0]!r}; expected prompts, none of them empty.",
            f"训练设置“{name}”包含 {wrong[0]!r}，应为非空的提示词。",
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise LongCatError(
            f"The training setting '{name}' is '{value}'. Choose one of: {', '.join(choices)}.",
            f"训练设置“{name}”为“{value}”。请选择：{', '.join(choices)}。",
        )


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not (math.isfinite(value) and least <= value <= most):
        raise LongCatError(
            f"The training setting '{name}' is {value}. Set it between {least} and {most}.",
            f"训练设置“{name}”为 {value}。请设为 {least} 到 {most} 之间。",
        )
