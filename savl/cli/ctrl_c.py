"""What Ctrl-C does to a command: it ends it with one line and exit code 130, whenever it comes.

Python's own way, an exception, does for neither the beginning nor the end. Imports of torch and numpy drop exceptions
that come at the wrong moment, and a second one would interrupt the cleaning up after the first.

This module imports nothing that takes time: it is in force before the rest of the command line is loaded.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 130

_ONE_PRESS = 1.0  # seconds within which several signals count as one: shells and `timeout` may each send theirs


class _State:
    """What is known of this process.

    Attributes:
        handles: whether Ctrl-C comes here at all.
        cleans_up: whether there is something to clean up, so that it raises an exception.
        came: when the first one came, by `time.monotonic`; None before.
        told: whether the user has read so.
    """

    handles = False
    cleans_up = False
    came: float | None = None
    told = False


_state = _State()


@contextlib.contextmanager
def handled(*, until_exit: bool) -> Iterator[None]:
    """Have Ctrl-C end the process at once in the block, but where `cleaning_up` is entered.

    Nothing is changed where Ctrl-C is ignored, as in the background of a shell script, where the program has a handler
    of its own, and in other threads than the main one.

    Args:
        until_exit: keep that after the block, while the interpreter ends.

    Raises:
        SystemExit: 130, whatever the block ended with, if Ctrl-C came.
    """
    if _state.handles or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    try:
        signal.signal(signal.SIGINT, _on_signal)
    except ValueError:  # not the main thread
        yield
        return
    _state.handles, _state.cleans_up, _state.came, _state.told = True, False, None, False
    try:
        yield
    except BaseException:
        if not came():
            raise
    finally:
        interrupted = came()
        _state.cleans_up = False
        if not until_exit:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _state.handles = False
    if interrupted:
        _tell()
        raise SystemExit(EXIT_CODE)


@contextlib.contextmanager
def cleaning_up() -> Iterator[None]:
    """Have Ctrl-C raise `KeyboardInterrupt` in the block, once, so that it leaves nothing unfinished behind."""
    before, _state.cleans_up = _state.cleans_up, True
    try:
        yield
    finally:
        _state.cleans_up = before


def came() -> bool:
    """Return whether Ctrl-C has come."""
    return _state.handles and _state.came is not None


def check() -> None:
    """Raise again what a library may have dropped.

    Raises:
        KeyboardInterrupt: Ctrl-C has come.
    """
    if came():
        raise KeyboardInterrupt


def told() -> None:
    """Say that the user has been told, in words that say more."""
    _state.told = True


def _on_signal(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    first, _state.came = _state.came is None, now if _state.came is None else _state.came
    if first and _state.cleans_up:
        raise KeyboardInterrupt
    if first or now - _state.came > _ONE_PRESS:
        _tell()
        os._exit(EXIT_CODE)


def _tell() -> None:
    if not _state.told and sys.__stderr__ is not None:
        with contextlib.suppress(OSError):
            os.write(2, b"savl: interrupted\n")
    _state.told = True
