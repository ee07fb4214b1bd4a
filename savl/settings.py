"""Settings as frozen dataclasses: types checked against defaults, tables of TOML files, and renamed settings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


class EnvironmentVariableError(ValueError):
    """An environment variable has a value that savl does not accept; the message names both and what is accepted."""


def check_types(settings: Any, prefix: str = "") -> None:
    """Check every field of a dataclass instance against the type of its default, and against its Literal annotation.

    An int is accepted where the default is a float. Tuples are checked element by element; an empty default stands for
    a tuple of str.

    Args:
        settings: Instance of a dataclass whose fields have plain defaults.
        prefix: Text before the field's name in the message, for example ``"run."``.

    Raises:
        TypeError: A value has another type; the message names the field, the type of its value, and the accepted types.
        ValueError: A value is not one of those in the field's ``Literal`` annotation.
    """
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        default = field.default if field.default is not MISSING else None
        value = getattr(settings, field.name)
        if default is not None and not _same_type(value, default):
            raise TypeError(f"{prefix}{field.name} must be {_kind(default)}, got {_kind(value)}: {value!r}")
        if get_origin(hints[field.name]) is Literal and value not in get_args(hints[field.name]):
            raise ValueError(f"{prefix}{field.name} must be one of {get_args(hints[field.name])}, got {value!r}")


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


def check_at_least(low: float, table: str, settings: object, *names: str) -> None:
    """Check that settings are not below a limit.

    Args:
        low: The limit.
        table: Name of their table in messages.
        settings: The dataclass.
        *names: Names of its fields.

    Raises:
        ValueError: One of them is below the limit, or NaN.
    """
    for name in names:
        if not getattr(settings, name) >= low:
            raise ValueError(f"{table}.{name} must be at least {low:g}, got {getattr(settings, name)!r}")


def check_positive(table: str, settings: object, *names: str) -> None:
    """Check that settings are above 0 and finite; the arguments are those of `check_at_least`.

    Raises:
        ValueError: One of them is not.
    """
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"{table}.{name} must be above 0 and finite, got {getattr(settings, name)!r}")


def from_table(cls: type[T], name: str, values: object, base: T | None = None) -> T:
    """Build a dataclass of settings from a table of a TOML file; fields that are dataclasses are tables within it.

    Args:
        cls: The dataclass; every field has a default.
        name: Name of the table in messages.
        values: The table. Former names of settings are accepted with a warning (see `renamed`).
        base: Settings that the table changes; None for the defaults.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: ``values`` is not a table, a setting is unknown or given twice, or a value is out of range.
    """
    values = current_names(cls, name, checked_table(name, values))
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
        # The messages of a nested table do not say which of several tables of its kind it is.
        raise type(error)(f"[{name}]: {error}" if "." in name else str(error)) from error


def checked_table(name: str, values: object) -> dict[str, Any]:
    """Return a copy of a table.

    Raises:
        ValueError: ``values`` is not a table.
    """
    if not isinstance(values, dict):
        raise ValueError(f"[{name}] must be a table of settings, got {values!r}")
    return dict(values)


def renamed(table: str, **names: str) -> Callable[[type[T]], type[T]]:
    """Let a dataclass of settings accept former names of its fields, each with a FutureWarning.

    The constructor and `from_table` accept a former name, and instances can be read by it.

    Args:
        table: Name of the table in messages.
        **names: Current names by former names: ``renamed("data", alike="images_per_recipe")``.
    """

    def decorate(cls: type[T]) -> type[T]:
        cls.FORMER_NAMES = names  # type: ignore[attr-defined]
        construct: Callable[..., None] = cls.__init__

        @wraps(construct)
        def init(self: T, *args: Any, **settings: Any) -> None:
            construct(self, *args, **current_names(cls, table, settings))

        cls.__init__ = init  # type: ignore[method-assign, assignment]
        for old, new in names.items():
            setattr(cls, old, property(_reader(table, old, new)))
        return cls

    return decorate


def _reader(table: str, old: str, new: str) -> Callable[[Any], Any]:
    def read(settings: Any) -> Any:
        warnings.warn(_renaming(table, old, new), FutureWarning, stacklevel=2)
        return getattr(settings, new)

    return read


def current_names(cls: type[Any], table: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return settings by the current names of a dataclass's fields, warning about each former name.

    Args:
        cls: The dataclass; tables for fields that are dataclasses are converted too.
        table: Name of the table in messages.
        values: Settings by current or former names.

    Raises:
        ValueError: A setting is given under both names.
    """
    former = getattr(cls, "FORMER_NAMES", {})
    nested = {field.name: type(field.default) for field in fields(cls) if is_dataclass(field.default)}
    current = {}
    for name, value in values.items():
        new = former.get(name, name)
        if new != name:
            if new in values:
                raise ValueError(f"{_renaming(table, name, new)}: both were given, keep {new} alone")
            warnings.warn(_renaming(table, name, new), FutureWarning, stacklevel=3)
        if new in nested and isinstance(value, dict):
            value = current_names(nested[new], f"{table}.{new}", value)
        current[new] = value
    return current


def _renaming(table: str, old: str, new: str) -> str:
    return f"{table}.{old} is now called {table}.{new}"
