"""Errors of reading and writing image files. Each names the file and the reason."""

from __future__ import annotations

import os

from savl.printable import printable


class ImageFileError(OSError):
    """An image file could not be read or written.

    Attributes:
        path: The file, as the caller named it; "<bytes>" for bytes, or the name of a file object.
        reason: One short sentence for people, without the name of the file.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(printable(f"{os.fspath(path)}: {reason}"))
        self.path = os.fspath(path)
        self.reason = reason


class ImageNotFound(ImageFileError, FileNotFoundError):
    """The file does not exist."""


class UnreadableImage(ImageFileError):
    """The file is empty, truncated, corrupt or not an image, or there is no permission to read it."""


class UnsupportedImage(ImageFileError):
    """The file is a valid image of a kind that savl does not process (animation, float samples, raw camera data…)."""


class UnwritableImage(ImageFileError):
    """The output cannot be written, because of the disk, permissions, or a limit of the format."""


class OutputExists(ImageFileError, FileExistsError):
    """The output exists already, and overwriting was not requested."""
