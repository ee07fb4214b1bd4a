"""Settings as frozen dataclasses: a value must have the type of its default. And what a bad variable raises."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


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


def from_table(cls: type[T], name: str, values: object, base: T | None = None) -> T:
    """Build a dataclass of settings from a table as TOML gives it; fields that are dataclasses are tables within it.

    Args:
        cls: The dataclass; every field has a default.
        name: What the table is called, for the messages.
        values: The table.
        base: What settings are where the table does not name them; None for the defaults.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: ``values`` is no table, a setting is unknown, or a value is out of range.
    """
    values = checked_table(name, values)
    start = cls() if base is None else base
    settings = {field.name: getattr(start, field.name) for field in fields(start)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(settings)):
        raise ValueError(f"[{name}] has unknown settings {unknown}; it accepts {sorted(settings)}")
    for key, value in values.items():
        if is_dataclass(settings[key]):
            settings[key] = from_table(type(settings[key]), f"{name}.{key}", value, settings[key])
        else:
            settings[key] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**settings)
    except (TypeError, ValueError) as error:
        # Of several tables of a kind, which; others say it themselves.
        raise type(error)(f"[{name}]: {error}" if "." in name else str(error)) from error


def checked_table(name: str, values: object) -> dict[str, Any]:
    """A copy of a table.

    Raises:
        ValueError: It is no table.
    """
    if not isinstance(values, dict):
        raise ValueError(f"[{name}] must be a table of settings, got {values!r}")
    return dict(values)


class EnvironmentVariableError(ValueError):
    """An environment variable says what savl does not understand; the message names it and what is accepted."""
