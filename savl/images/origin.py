"""What tells the source of a result: a short digest that the result's mark carries.

Whoever finds a file in the place of a result can tell whether it was made of the picture at hand or of another one.
"""

from __future__ import annotations

import os
import stat
import zlib
from pathlib import Path

_PART = 2**16  # bytes at the beginning and at the end: a folder of large files is compared without reading all of it


def digest_origin(source: str | os.PathLike[str] | bytes, page: int | None = None) -> str | None:
    """Return a digest of a picture's bytes and page, or None where they cannot be read.

    It follows from the file's size, its first and last 64 KiB, and the page; not from its name, which stays private,
    nor from its place, so files can be moved together with their results.

    Args:
        source: the file, or its content. Only regular files are read: what a pipe gives cannot be had twice.
        page: page of a file of several, counted from 1; None is the first.

    Returns:
        Eight hexadecimal digits, or None.
    """
    if isinstance(source, bytes):
        size, first, last = len(source), source[:_PART], source[-_PART:]
    else:
        try:
            if not stat.S_ISREG(os.stat(source).st_mode):
                return None
            with Path(source).open("rb") as file:
                first = file.read(_PART)
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _PART))
                last = file.read(_PART)
        except (OSError, ValueError):
            return None
    checksum = zlib.crc32(last, zlib.crc32(first, zlib.crc32(f"{size} {page or 1}".encode())))
    return f"{checksum:08x}"
