"""Locks on output files, with which several processes can work on one folder without processing a file twice.

A lock is an advisory lock (`flock`) on a hidden *lock file* beside the output, `.<name>.<checksum>.claim`. The
operating system releases the lock when the process ends, even if it crashes. The lock file is removed with the lock.
A lock file that a killed process has left behind is not locked; the next process uses it again. Where files cannot be
locked (Windows, some network file systems, a folder without write permission), every attempt to lock succeeds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from savl.atomic_write import name_beginning

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_SUFFIX = ".claim"

_BUSY = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)
_MAX_ATTEMPTS = 100
"""Attempts to lock a file that other processes keep removing."""


@dataclass(frozen=True)
class OutputLock:
    """Result of an attempt to lock an output.

    Attributes:
        acquired: Whether this process may write the output; False if another process holds the lock.
        time_ns: Time at which the lock was acquired, in nanoseconds since the epoch. It is read from the clock of the
            file system, which can differ from the clock of this machine. None if the time is unknown, or if the file
            system stores whole seconds.
    """

    acquired: bool
    time_ns: int | None = None


@contextlib.contextmanager
def lock_output(output: Path) -> Iterator[OutputLock]:
    """Try to lock an output file for the duration of the `with` block.

    Missing folders on the path of the output are created. Those that are still empty at the end of the block are
    removed again.

    Args:
        output: The file that is going to be written.

    Yields:
        Whether this process acquired the lock, and when.
    """
    if fcntl is None:
        yield OutputLock(True)
        return
    path = lock_path(output)
    created: list[Path] = []
    descriptor: int | None = None
    result = OutputLock(True)
    try:
        try:
            descriptor = _open_locked(path, created)
            result = OutputLock(True, _touch(descriptor))
        except BlockingIOError:
            result = OutputLock(False)
        except OSError:
            pass  # If something is wrong with the folder, writing the output will report it.
        yield result
    finally:
        if descriptor is not None:
            # The lock file is removed before the lock is released. Another process may already have opened it; that
            # process then locks a removed file, notices this, and creates a new lock file.
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)
        for folder in reversed(created):
            with contextlib.suppress(OSError):
                folder.rmdir()


def lock_path(output: Path) -> Path:
    """Return the path of the lock file of an output. All symbolic links to an output have the same lock file."""
    target = Path(os.path.realpath(output))
    # The lock file's name contains the beginning of the output's name, so that users recognize it. The checksum
    # distinguishes long names that begin alike, because a long name does not fit completely.
    checksum = zlib.crc32(os.fsencode(target.name))
    return target.with_name(f".{name_beginning(target.name)}.{checksum:08x}{LOCK_SUFFIX}")


def _open_locked(path: Path, created: list[Path]) -> int:
    """Open and lock a lock file, and return its descriptor.

    Args:
        path: The lock file.
        created: List to which the folders that had to be created are appended, outermost first.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The file system does not support locks, or the folder cannot be written.
    """
    for _ in range(_MAX_ATTEMPTS):
        try:
            _create_folders(path.parent, created)
            descriptor = _open(path)
        except FileNotFoundError:  # Another process has just removed the folder because it was empty.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _BUSY:
                raise BlockingIOError(error.errno, error.strerror, str(path)) from error
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        if _refers_to(descriptor, path):
            return descriptor
        # The previous holder removed the lock file after it was opened here. Other processes would not see this lock.
        os.close(descriptor)
    # Some file systems return a new inode number on every call, so `_refers_to` never succeeds. There is no lock then.
    with contextlib.suppress(OSError):
        path.unlink()
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), str(path))


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:  # Another user's file can be locked without write permission.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _touch(descriptor: int) -> int | None:
    """Set the modification time of a file to now and return it, or None if it is a whole number of seconds."""
    os.utime(descriptor)
    time = os.fstat(descriptor).st_mtime_ns
    return time if time % 10**9 else None


def _refers_to(descriptor: int, path: Path) -> bool:
    """Return whether an open file is the file that the path names now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _create_folders(folder: Path, created: list[Path]) -> None:
    missing = []
    while not folder.exists() and folder not in missing:
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        with contextlib.suppress(FileExistsError):
            new.mkdir()
            created.append(new)
