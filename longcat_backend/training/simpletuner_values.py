"""One value of SimpleTuner's config: its interface writes numbers and booleans as text too, and each is checked."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import LongCatError

_FLAGS = {"true": True, "false": False}


def flag(given: Mapping[str, Any], key: str) -> bool:
    """Whether something is on; false if the key is not there.

    Raises:
        LongCatError: the value is neither true nor false, nor the text of one.
    """
    value = given.get(key, False)
    known = value if isinstance(value, bool) else _FLAGS.get(str(value).strip().lower())
    if known is None:
        raise wrong(key, value, "true or false", "true 或 false")
    return known


def choice(given: Mapping[str, Any], key: str, table: Mapping[str, str], default: str) -> str:
    """Our name for one of SimpleTuner's choices.

    Raises:
        LongCatError: this trainer does not have it.
    """
    value = given.get(key, default)
    if not isinstance(value, str) or value not in table:
        raise unsupported(key, value, table)
    return table[value]


def require(given: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is set and not allowed.

    Raises:
        LongCatError: it is.
    """
    if given.get(key, allowed[0]) not in allowed:
        raise unsupported(key, given[key], allowed)


def unsupported(key: str, value: Any, allowed: Iterable[Any]) -> LongCatError:
    """The error for a value that SimpleTuner knows and this trainer does not."""
    choices = ", ".join(map(str, allowed))
    return LongCatError(
        f"'{key}' of the SimpleTuner config is {value!r}, which this trainer does not do. It does: {choices}.",
        f"SimpleTuner 配置的“{key}”为 {value!r}，本训练器不支持。支持：{choices}。",
    )


def wrong(key: str, value: Any, en: str, zh: str) -> LongCatError:
    """The error for a value of another kind than it must be; the kind in both languages."""
    return LongCatError(
        f"'{key}' of the SimpleTuner config is {value!r}; expected {en}.",
        f"SimpleTuner 配置的“{key}”为 {value!r}，应为{zh}。",
    )
