"""Ctrl-C (SIGINT) ends a command with one line and exit code 130, whenever it comes.

Python's own way, raising `KeyboardInterrupt`, does not suffice: imports of torch and numpy can drop exceptions that are
raised at the wrong moment, and a second Ctrl-C would interrupt the cleaning up after the first.

This module imports nothing slow, because it takes effect before the rest of the command line is loaded.
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

_ONE_PRESS = 1.0  # Seconds within which several signals count as one: shells and `timeout` may each send their own.


class _State:
    """State of the signal handling of this process.

    Attributes:
        active: Whether the handler of this module is installed.
        raises: Whether Ctrl-C raises an exception, because there is something to clean up.
        time: When the first Ctrl-C came, by `time.monotonic`; None before.
        reported: Whether a message about it has been printed.
    """

    active = False
    raises = False
    time: float | None = None
    reported = False


_state = _State()


@contextlib.contextmanager
def exit_on_interrupt(*, until_exit: bool) -> Iterator[None]:
    """Let Ctrl-C end the process at once in the block, except within `raise_on_interrupt`.

    Nothing changes if Ctrl-C is ignored (as in the background of a shell script), if the program has a handler of its
    own, or in threads other than the main one.

    Args:
        until_exit: Keep the handler after the block, while the interpreter shuts down.

    Raises:
        SystemExit: 130 if Ctrl-C came, whatever the block ended with.
    """
    if _state.active or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    try:
        signal.signal(signal.SIGINT, _on_signal)
    except ValueError:  # not the main thread
        yield
        return
    _state.active, _state.raises, _state.time, _state.reported = True, False, None, False
    try:
        yield
    except BaseException:
        if not interrupted():
            raise
    finally:
        stopped = interrupted()
        _state.raises = False
        if not until_exit:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _state.active = False
    if stopped:
        _report()
        raise SystemExit(EXIT_CODE)


@contextlib.contextmanager
def raise_on_interrupt() -> Iterator[None]:
    """Let the first Ctrl-C in the block raise `KeyboardInterrupt`, so that the block can clean up."""
    before, _state.raises = _state.raises, True
    try:
        yield
    finally:
        _state.raises = before


@contextlib.contextmanager
def exit_on_termination() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP of a closed terminal unless nohup ignores it, raise `SystemExit` in the block.

    The program then ends as on Ctrl-C, through every `finally`, so that no partial file is left. This works in the main
    thread only.
    """
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    closed = [] if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN else [hangup]
    previous = {number: signal.signal(number, _terminate) for number in (signal.SIGTERM, *closed)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def interrupted() -> bool:
    """Return whether Ctrl-C has come."""
    return _state.active and _state.time is not None


def raise_if_interrupted() -> None:
    """Raise the exception of Ctrl-C again, which a library may have dropped.

    Raises:
        KeyboardInterrupt: Ctrl-C has come.
    """
    if interrupted():
        raise KeyboardInterrupt


def mark_reported() -> None:
    """Suppress the line "savl: interrupted", because the command has printed a message of its own."""
    _state.reported = True


def _on_signal(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    first, _state.time = _state.time is None, now if _state.time is None else _state.time
    if first and _state.raises:
        raise KeyboardInterrupt
    if first or now - _state.time > _ONE_PRESS:
        _report()
        os._exit(EXIT_CODE)


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _report() -> None:
    if not _state.reported and sys.__stderr__ is not None:
        with contextlib.suppress(OSError):
            os.write(2, b"savl: interrupted\n")
    _state.reported = True
