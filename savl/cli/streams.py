"""Standard streams: messages whose loss does not end the work, and `-` as the name of an input or output file."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from savl.command_line import UsageError, print_error

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STANDARD = "-"
"""The argument that means standard input or standard output."""

_NAMES = ("stdin", "stdout", "stderr")


class _TolerantFile(io.FileIO):
    """File descriptor whose writes raise no error. Output that cannot be written is dropped.

    Attributes:
        lost: The first error of a write, or None.
    """

    lost: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            written = super().write(data)
            # None: the descriptor is non-blocking and its reader is slow. An ordinary descriptor would wait here.
            while written is None:
                select.select([], [self.fileno()], [])
                written = super().write(data)
            return written
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


@contextlib.contextmanager
def tolerant_streams() -> Iterator[None]:
    """Let the block print to standard output and standard error even if they are closed, full or no longer read.

    Output that cannot be written is dropped without an error, in the block and while the interpreter shuts down: the
    streams stay replaced after the block. A descriptor that was closed when the process began is connected to the null
    device. Otherwise the first file that is opened would get its number, and libraries would print into that file.

    Raises:
        SystemExit: 1 instead of 0 if standard output was lost for another reason than that its reader stopped reading,
            such as a full disk, because the answer that was asked for is missing then.
    """
    _reopen_closed()
    stdout = _TolerantFile(1, "wb", closefd=False) if _replaceable(sys.stdout) else None
    if stdout is not None:
        sys.stdout = _text(stdout, sys.stdout)
    if _replaceable(sys.stderr):
        sys.stderr = _text(_TolerantFile(2, "wb", closefd=False), sys.stderr)
    try:
        yield
    except SystemExit as stop:
        _flush(sys.stdout)
        lost = None if stdout is None else stdout.lost
        if stop.code not in (None, 0) or lost is None or lost.errno == errno.EPIPE:
            raise
        print_error(f"standard output cannot be written: {lost.strerror}")
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
    """Return whether a stream is the process's own, and not a replacement such as that of a test or a notebook."""
    if stream is None:
        return False  # It was closed from the beginning: print() and rich drop their output.
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        return False
    # The console of Windows takes text and not bytes.
    return number in (1, 2) and not (os.name == "nt" and stream.isatty())


def _text(raw: _TolerantFile, model: TextIO) -> TextIO:
    _flush(model)
    line_buffering = raw.fileno() == 2 or raw.isatty()
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=model.encoding, errors=model.errors, line_buffering=line_buffering
    )


def _flush(stream: TextIO | None) -> None:
    with contextlib.suppress(OSError, ValueError):
        if stream is not None:
            stream.flush()


def read_standard_input() -> bytes:
    """Read all of standard input.

    Raises:
        UsageError: It is closed, a terminal, which holds no image, or cannot be read.
    """
    if sys.stdin is None or was_closed("stdin"):
        raise UsageError("- reads an image from standard input, which is closed")
    if sys.stdin.isatty():
        raise UsageError("- reads an image from standard input, which is a terminal; redirect it: - <photo.jpg")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        reason = (error.strerror or "it is not open for reading").lower()
        raise UsageError(f"- reads an image from standard input, which cannot be read: {reason}") from error


class StandardOutput:
    """Standard output as the destination of one image; everything else that is printed goes to standard error.

    The image is first written to a file in a temporary folder, so that the reader never gets an incomplete one.
    """

    def __init__(self) -> None:
        """Check that standard output can take an image.

        Raises:
            UsageError: It is closed, or a terminal.
        """
        if was_closed("stdout"):
            raise UsageError("-o - writes the image to standard output, which is closed")
        if os.isatty(1):
            raise UsageError(
                "-o - writes the image to standard output, which is a terminal; redirect it: -o - >large.png"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="savl-", ignore_cleanup_errors=True)

    def __enter__(self) -> StandardOutput:
        sys.stdout.flush()
        self._descriptor = os.dup(1)
        os.dup2(2, 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout.flush()
        os.dup2(self._descriptor, 1)
        os.close(self._descriptor)
        self._folder.cleanup()

    def file(self, suffix: str) -> Path:
        """Return the temporary file to write the image to; its name ends in `suffix`."""
        return Path(self._folder.name, f"standard-output{suffix}")

    def send(self, path: Path) -> None:
        """Copy a file to standard output.

        Raises:
            UnwritableImage: Standard output is full, or nobody reads it any more.
        """
        from savl.images.errors import UnwritableImage

        try:
            with open(path, "rb") as file:
                while chunk := file.read(2**20):
                    self._write(memoryview(chunk))
        except OSError as error:
            reason = (
                "was closed by its reader" if error.errno == errno.EPIPE else f"cannot be written: {error.strerror}"
            )
            raise UnwritableImage("standard output", reason) from error

    def _write(self, chunk: memoryview) -> None:
        while chunk:
            try:
                chunk = chunk[os.write(self._descriptor, chunk) :]
            except BlockingIOError:  # a non-blocking pipe that is full
                select.select([], [self._descriptor], [])
