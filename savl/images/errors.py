"""What can go wrong with an image file, each with the file's name and the reason in it."""

from __future__ import annotations

import os

from savl.printable import printable


class ImageFileError(OSError):
    """An image file could not be read or written.

    Attributes:
        path: the file, as the caller named it; "<bytes>" for bytes, and the name of a file object.
        reason: one short human sentence, without the file's name.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(printable(f"{os.fspath(path)}: {reason}"))
        self.path = os.fspath(path)
        self.reason = reason


class ImageNotFound(ImageFileError, FileNotFoundError):
    """There is no file of that name."""


class UnreadableImage(ImageFileError):
    """The file is empty, truncated, corrupt, not permitted to be read, or no image at all."""


class UnsupportedImage(ImageFileError):
    """The file is a sound image of a kind savl does not process (animated, float samples, raw camera data…)."""


class UnwritableImage(ImageFileError):
    """The output cannot be written: the disk, the permissions, or a limit of the format."""


class OutputExists(ImageFileError, FileExistsError):
    """The output is already there and overwriting was not asked for."""
