"""Whether a run that has saved states can go on as it is asked to, and what is new when it does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import LongCatError
from . import state
from .settings import TrainSettings, differences
from .state import State

# Parts of a run's identity beside its settings, by the names that a user knows them by.
_PARTS = {"data": "the dataset", "model": "the base model", "scheduler": "the scheduler config"}


def find(folder: Path, settings: TrainSettings, parts: Mapping[str, Any] | None = None) -> State | None:
    """The state that a run goes on from, or None where it begins.

    Args:
        parts: data, model and scheduler, as the run will save them; left out before they are known, so that other
            settings are refused before pictures are encoded and a model is loaded.

    Raises:
        LongCatError: the run was begun with other settings or parts, or has done more steps than are asked for; or
            see :func:`state.latest`.
    """
    found = state.latest(folder)
    if found is None:
        return None
    told = differences(found.values["settings"], settings.to_json())
    for part, new in (parts or {}).items():
        old = found.values[part]
        if old != new:
            told.append(f"{_PARTS[part]}: {_short(old)} -> {_short(new)}")
    if told:
        raise LongCatError(
            f"The run in '{folder}' cannot go on, as it was begun with something else ({'; '.join(told)}). Set that "
            "back, or choose another name for the run to start anew.",
            f"“{folder}”中的训练无法继续，因为开始时的内容不同（{'；'.join(told)}）。请改回，或换一个运行名称重新开始。",
        )
    if settings.steps < found.step:
        raise LongCatError(
            f"The run in '{folder}' has done {found.step} steps already, and {settings.steps} are asked for. Set steps "
            f"to {found.step} or more, or choose another name for the run to start anew.",
            f"“{folder}”中的训练已完成 {found.step} 步，而要求的是 {settings.steps} 步。"
            f"请把步数设为 {found.step} 或更多，或换一个运行名称重新开始。",
        )
    return found


def new_length(found: State, settings: TrainSettings) -> str:
    """What to tell, in both languages, of a learning rate that changes with the number of steps; mostly nothing."""
    before = found.values["settings"]["steps"]
    if settings.schedule == "constant" or settings.steps in (before, found.step):
        return ""
    return (
        f"The learning rate ({settings.schedule}) follows the new length, {settings.steps} steps in place of {before}: "
        "the result is not that of so many steps from the start. "
        f"学习率（{settings.schedule}）按新的总步数 {settings.steps}（原为 {before}）变化，"
        "结果与一开始就训练这么多步不同。"
    )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
