"""Atomic writing of files: after an error or a crash there is the complete new file, or the old one."""

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
    """Open a temporary file beside `path` that replaces `path` if the block ends without an error.

    The data is on the disk (fsync) before the file is renamed, which is atomic. A reader, a crash or a power failure
    therefore finds the old file or the new one. If the block ends with an exception, Ctrl-C included, the temporary
    file is removed. Only a signal that cannot be caught leaves it; it is hidden and called `.<name>.<random>.part`,
    where a long name is shortened.

    Args:
        path: The file to write. A symbolic link is followed, so that its target is replaced and the link stays.
        overwrite: Replace an existing file.

    Yields:
        An unbuffered binary file, open for reading and writing, positioned at 0.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
        OSError: `path` is not a regular file, its folder cannot be written, or the disk is full.
    """
    target, part, descriptor = _create_part(path, overwrite)
    try:
        with os.fdopen(descriptor, "w+b", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        # Checked again, because minutes of work may lie between the first check and here.
        _check_target(path, target, overwrite)
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    _sync_folder(target.parent)


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Try the first step of `atomic_write`, and remove the temporary file again.

    Raises:
        FileExistsError, OSError: As for `atomic_write`.
    """
    _, part, descriptor = _create_part(path, overwrite)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            write_whole(file, bytes(4096))
    finally:
        part.unlink()


def raise_if_full(file: BinaryIO) -> None:
    """Raise the system's error if a file cannot grow, for libraries that only report "write error".

    This appends zeros, so the file must be one of `atomic_write` that is going to be discarded.

    Args:
        file: Unbuffered file, open for writing.

    Raises:
        OSError: The disk is full, a quota or a limit on the size of files is reached, or the disk is gone.
    """
    file.seek(0, os.SEEK_END)
    write_whole(file, bytes(2**20))


def write_atomically(path: Path, data: bytes | memoryview, *, overwrite: bool = True) -> None:
    """Write a file with the given content; see `atomic_write`.

    Raises:
        FileExistsError: The file exists and `overwrite` is False.
        OSError: `path` is not a regular file, its folder cannot be written, or the disk is full.
    """
    with atomic_write(path, overwrite=overwrite) as file:
        write_whole(file, data)


def write_whole(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all bytes to the unbuffered file of `atomic_write`, for which a single write may be incomplete.

    Args:
        file: The file, which is written from its current position.
        data: One-dimensional, of bytes.

    Raises:
        OSError: The disk is full.
    """
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def name_beginning(name: str) -> str:
    """Return the beginning of a file name, for the name of a temporary file that belongs to it.

    It has at most 100 bytes, because file systems limit names to 255 or (if encrypted) 143 bytes. Bytes that are not
    text in the encoding of file names, such as an accented letter in the locale C, are dropped.
    """
    return os.fsencode(name)[:100].decode(sys.getfilesystemencoding(), errors="ignore")


def _create_part(path: Path, overwrite: bool) -> tuple[Path, Path, int]:
    """Create the temporary file; return the file that `path` leads to, the temporary file, and its descriptor."""
    target = Path(os.path.realpath(path))
    _check_target(path, target, overwrite)
    part = target.with_name(f".{name_beginning(target.name)}.{secrets.token_hex(4)}.part")
    try:
        # The mode bits of open(), so that the user's umask decides who may read the file.
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
    """Make the rename durable, if the system can open folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
