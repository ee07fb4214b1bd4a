"""Settings as frozen dataclasses: a value must have the type of its default. And what a bad variable raises."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any


def check_types(settings: Any, prefix: str = "") -> None:
    """Check every field of a dataclass instance against the type of its default.

    An int may stand for a float; a tuple is checked element by element, an empty default standing for names.

    Args:
        settings: Instance of a dataclass whose fields have plain defaults.
        prefix: What to put before the field's name in the message, for example ``"run."``.

    Raises:
        TypeError: A value has another type; the message names the field, what came, and what is accepted.
    """
    for field in fields(settings):
        default = field.default if field.default is not MISSING else None
        value = getattr(settings, field.name)
        if default is not None and not _same_type(value, default):
            raise TypeError(f"{prefix}{field.name} must be {_kind(default)}, got {_kind(value)}: {value!r}")


def _same_type(value: object, like: object) -> bool:
    if isinstance(like, tuple):
        first = like[0] if like else ""
        return isinstance(value, tuple) and all(_same_type(element, first) for element in value)
    if isinstance(like, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(like)


def _kind(value: object) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {' and '.join(sorted({type(element).__name__ for element in value})) or 'str'}"
    return type(value).__name__


class EnvironmentVariableError(ValueError):
    """An environment variable says what savl does not understand; the message names it and what is accepted."""
