"""Settings that choose the kernels of each op, and their form in the environment variable SAVL_KERNELS."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from savl.ops.library import EAGER
from savl.ops.op import OPS
from savl.settings import EnvironmentVariableError

VARIABLE = "SAVL_KERNELS"

Choice = bool | str
"""For one op: True for the fastest backend that can serve, False or ``"eager"`` for the reference, or a backend's name,
which then must serve or raise `KernelUnavailable`."""


class KernelSettings:
    """A `Choice` for each op, as attributes named after the ops. Immutable and hashable.

    ``KernelSettings(window_attention="cpp")`` leaves the other ops to the reference, ``KernelSettings.of(True)`` lets
    the fused kernels serve all of them.
    """

    def __init__(self, **choices: Choice) -> None:
        for op in choices:
            if op not in OPS:
                raise ValueError(f"no such op: {op!r}; there are {', '.join(OPS)}")
        for op, record in OPS.items():
            choice = choices.get(op, False)
            if not isinstance(choice, bool | str):
                raise TypeError(f"{op} must be True, False or a backend's name, got {choice!r}")
            if isinstance(choice, str) and choice != EAGER and choice not in record.backends:
                raise ValueError(f"{op} has no backend {choice!r}; it has {', '.join((EAGER, *record.backends))}")
            object.__setattr__(self, op, choice)

    @classmethod
    def of(cls, choice: Choice, **others: Choice) -> KernelSettings:
        """Return settings with the same choice for every op but those in ``others``."""
        return cls(**{**dict.fromkeys(OPS, choice), **others})

    if TYPE_CHECKING:

        def __getattr__(self, op: str) -> Choice: ...

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"KernelSettings is immutable; cannot set {name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KernelSettings) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).items()))

    def __repr__(self) -> str:
        return f"KernelSettings({', '.join(f'{op}={choice!r}' for op, choice in vars(self).items())})"


def parse_settings(text: str) -> KernelSettings:
    """Read the value of ``SAVL_KERNELS``.

    Args:
        text: ``fused`` (also 1, on, true, auto), ``eager`` (also 0, off, false, or nothing), or a list such as
            ``window_attention=cpp,channel_modulation=eager``; ops not in the list are fused.

    Raises:
        EnvironmentVariableError: The text is none of these.
    """
    word = text.strip().lower()
    if word in ("fused", "1", "on", "true", "auto"):
        return KernelSettings.of(True)
    if word in ("", EAGER, "0", "off", "false"):
        return KernelSettings.of(False)
    choices: dict[str, Choice] = {}
    try:
        for part in word.split(","):
            op, equals, choice = (piece.strip() for piece in part.partition("="))
            if not equals:
                raise ValueError(f"{part.strip()!r} is not a setting")
            choices[op] = {"fused": True, "auto": True}.get(choice, choice)
        return KernelSettings.of(True, **choices)
    except ValueError as error:
        raise EnvironmentVariableError(
            f"{VARIABLE} must be 'fused', 'eager' or a list like 'window_attention=cpp,channel_modulation=eager', "
            f"got {text!r}: {error}"
        ) from None


def settings_of_environment() -> KernelSettings | None:
    """Return the settings in ``SAVL_KERNELS``; None if it is not set or empty."""
    text = os.environ.get(VARIABLE, "").strip()
    return parse_settings(text) if text else None
