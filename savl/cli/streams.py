"""Standard streams whose loss does not end the work: the pictures count, and the log about them does not."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_NAMES = ("stdin", "stdout", "stderr")


class _Steady(io.FileIO):
    """A descriptor that text can always be written to, whether anything reads it or not.

    Attributes:
        lost: the first error that writing met, or None.
    """

    lost: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            written = super().write(data)
            # None: the descriptor does not block and its reader is slow. An ordinary one would wait here.
            while written is None:
                select.select([], [self.fileno()], [])
                written = super().write(data)
            return written
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


@contextlib.contextmanager
def steady_streams() -> Iterator[None]:
    """Let the block print to standard output and standard error even where they are closed, full or no longer read.

    What cannot be printed is dropped and raises nothing, neither in the block nor when the interpreter ends: the
    streams are replaced for good. A
    descriptor that was closed when the process began leads to the null device instead, or the first file opened would
    take its number, and with it whatever libraries print.

    Raises:
        SystemExit: 1 in place of 0 where standard output was lost for another reason than that its reader had
            enough, such as a full disk: then the answer that was asked for is not where it should be.
    """
    _reopen_closed()
    steady = _Steady(1, "wb", closefd=False) if _replaceable(sys.stdout) else None
    if steady is not None:
        sys.stdout = _text(steady, sys.stdout)
    if _replaceable(sys.stderr):
        sys.stderr = _text(_Steady(2, "wb", closefd=False), sys.stderr)
    try:
        yield
    except SystemExit as stop:
        _flush(sys.stdout)
        lost = None if steady is None else steady.lost
        if stop.code not in (None, 0) or lost is None or lost.errno == errno.EPIPE:
            raise
        print(f"savl: standard output cannot be written: {lost.strerror}", file=sys.stderr)
        raise SystemExit(1) from None


def was_closed(name: str) -> bool:
    """Return whether a standard stream was closed when the process began.

    Args:
        name: "stdin", "stdout" or "stderr".
    """
    return getattr(sys, f"__{name}__") is None


def _reopen_closed() -> None:
    for number, name in enumerate(_NAMES):
        if not was_closed(name):
            continue
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)


def _replaceable(stream: TextIO | None) -> bool:
    """Whether a stream is the process's own, and no stand-in such as a test's or a notebook's."""
    if stream is None:
        return False  # closed from the beginning: print() and rich drop what is meant for it
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        return False
    # The console of Windows takes text and not bytes.
    return number in (1, 2) and not (os.name == "nt" and stream.isatty())


def _text(raw: _Steady, model: TextIO) -> TextIO:
    _flush(model)
    line_buffering = raw.fileno() == 2 or raw.isatty()
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=model.encoding, errors=model.errors, line_buffering=line_buffering
    )


def _flush(stream: TextIO | None) -> None:
    with contextlib.suppress(OSError, ValueError):
        if stream is not None:
            stream.flush()
