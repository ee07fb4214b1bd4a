"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_write(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that becomes `path` only when the block ends well.

    The bytes are on the disk (fsync) before the name changes (one atomic rename), so a reader, a crash or a
    power cut sees the old file or the new one. Whatever ends the block early, Ctrl-C included, removes the
    temporary file; only a kill that cannot be caught leaves it, hidden and named `.<name>.<random>.part` (of a
    long name, the beginning).

    Args:
        path: the file to write. A symbolic link is followed, so that its target is replaced and the link
            stays.
        overwrite: replace an existing file.

    Yields:
        An unbuffered binary file, open for reading and writing, positioned at 0.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
        OSError: `path` is no regular file, its folder cannot be written, or the disk is full.
    """
    target, part, descriptor = _create_part(path, overwrite)
    try:
        with os.fdopen(descriptor, "w+b", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        # Looked at again: minutes of work may lie between the first look and here.
        _check_target(path, target, overwrite)
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    _sync_folder(target.parent)


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Try the first step of `atomic_write`, and leave nothing behind.

    Raises:
        FileExistsError, OSError: as `atomic_write` would.
    """
    _, part, descriptor = _create_part(path, overwrite)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            write_whole(file, bytes(4096))
    finally:
        part.unlink()


def raise_if_full(file: BinaryIO) -> None:
    """Raise what the system says when a file cannot grow; for libraries that say "write error" only.

    Zeros are appended, so this is for a file of `atomic_write` that is given up.

    Args:
        file: unbuffered, open for writing.

    Raises:
        OSError: the disk is full, a quota or a limit on the size of files is reached, or the disk is gone.
    """
    file.seek(0, os.SEEK_END)
    write_whole(file, bytes(2**20))


def write_atomically(path: Path, data: bytes | memoryview, *, overwrite: bool = True) -> None:
    """Write a whole file at once; see `atomic_write`.

    Raises:
        FileExistsError: the file is there and `overwrite` is False.
        OSError: `path` is no regular file, its folder cannot be written, or the disk is full.
    """
    with atomic_write(path, overwrite=overwrite) as file:
        write_whole(file, data)


def write_whole(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all bytes to the unbuffered file of `atomic_write`, of which one write may take only a part.

    Args:
        file: where to, from its position on.
        data: one-dimensional, of bytes.

    Raises:
        OSError: the disk is full.
    """
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def name_beginning(name: str) -> str:
    """Return the beginning of a file name, for the name of a temporary file that goes with it.

    At most 100 bytes, because file systems limit names to 255 or (encrypted ones) 143 bytes; what is no text in the
    encoding of file names, such as an accented letter in the locale C, is dropped.
    """
    return os.fsencode(name)[:100].decode(sys.getfilesystemencoding(), errors="ignore")


def _create_part(path: Path, overwrite: bool) -> tuple[Path, Path, int]:
    """The file that `path` leads to, the temporary file made beside it, and the latter's descriptor."""
    target = Path(os.path.realpath(path))
    _check_target(path, target, overwrite)
    part = target.with_name(f".{name_beginning(target.name)}.{secrets.token_hex(4)}.part")
    try:
        # Plain open() mode bits, so that the user's umask decides who may read the file.
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return target, part, descriptor


def _check_target(path: Path, target: Path, overwrite: bool) -> None:
    if not os.path.exists(target):
        return
    if not os.path.isfile(target):
        raise OSError(errno.EINVAL, "exists and is not a regular file", str(path))
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "exists already", str(path))


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the system lets a folder be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
