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


def integer(given: Mapping[str, Any], key: str, default: int = 0) -> int:
    """A whole number, or its text.

    Raises:
        LongCatError: the value is another.
    """
    value = given.get(key, default)
    try:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return int(value)
    except (TypeError, ValueError) as error:
        raise wrong(key, value, "a whole number", "整数") from error


def number(given: Mapping[str, Any], key: str, default: float = 0.0) -> float:
    """A number, or its text.

    Raises:
        LongCatError: the value is another.
    """
    value = given.get(key, default)
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong(key, value, "a number", "数字") from error


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
