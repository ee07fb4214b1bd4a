"""`-` as a file: a picture from standard input, or one to standard output with nothing else in it."""

from __future__ import annotations

import errno
import os
import select
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from savl.cli.sources import UsageMistake
from savl.cli.streams import was_closed
from savl.images.errors import UnwritableImage

STANDARD = "-"


def read_standard_input() -> bytes:
    """Return all of standard input.

    Raises:
        UsageMistake: it is closed, a terminal, from which no picture comes, or cannot be read.
    """
    if sys.stdin is None or was_closed("stdin"):
        raise UsageMistake("- reads a picture from standard input, which is closed")
    if sys.stdin.isatty():
        raise UsageMistake("- reads a picture from standard input, which is a terminal; redirect it: - <photo.jpg")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        reason = (error.strerror or "it is not open for reading").lower()
        raise UsageMistake(f"- reads a picture from standard input, which cannot be read: {reason}") from error


class StandardOutput:
    """Standard output, taken for one picture: while this is entered, whatever else is printed goes to standard error.

    The picture is written to a file first, in a folder of its own for temporary files, so that no half of one reaches
    the reader.
    """

    def __init__(self) -> None:
        """Check that standard output can take a picture.

        Raises:
            UsageMistake: it is closed, or a terminal.
        """
        if was_closed("stdout"):
            raise UsageMistake("-o - writes the picture to standard output, which is closed")
        if os.isatty(1):
            raise UsageMistake(
                "-o - writes the picture to standard output, which is a terminal; redirect it: -o - >large.png"
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

    def file(self, ending: str) -> Path:
        """Return where to write the picture, under a name that ends in `ending`."""
        return Path(self._folder.name, f"standard-output{ending}")

    def send(self, path: Path) -> None:
        """Copy a file to standard output.

        Raises:
            UnwritableImage: it is full, or nobody reads it any more.
        """
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
            except BlockingIOError:  # a pipe that does not block, and is full
                select.select([], [self._descriptor], [])
