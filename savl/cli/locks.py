"""Locks on outputs, so that several processes share one folder: each file is processed by one of them.

A lock is an advisory lock (flock) on a hidden file beside the output, `.<name>.<checksum>.claim`. The system releases
it when the process ends, however it ends, so a crash blocks nobody. The file is removed with the lock; one that a
killed process has left behind is reused by the next process. Where files cannot be locked (Windows, some network file
systems, a folder that cannot be written), every lock is granted.
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
_ATTEMPTS = 100


@dataclass(frozen=True)
class OutputLock:
    """Result of an attempt to lock an output.

    Attributes:
        acquired: Whether this process may write the output; False if another process holds the lock.
        time_ns: Time of the lock in nanoseconds, by the clock of the file system, which need not be that of this
            machine. None if it is unknown, or known in whole seconds only.
    """

    acquired: bool
    time_ns: int | None = None


@contextlib.contextmanager
def lock_output(output: Path) -> Iterator[OutputLock]:
    """Try to lock an output for the duration of the block.

    The folder of the output is created. If the block leaves it empty, it is removed again.

    Args:
        output: The file that is going to be written.
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
            descriptor = _lock(path, created)
            result = OutputLock(True, _time(descriptor))
        except BlockingIOError:
            result = OutputLock(False)
        except OSError:
            pass  # If something is wrong with the folder, writing the output will report it.
        yield result
    finally:
        if descriptor is not None:
            # The file is removed before the lock is released. A process that locks the removed file afterwards notices
            # it and creates a new one.
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)
        for folder in reversed(created):
            with contextlib.suppress(OSError):
                folder.rmdir()


def lock_path(output: Path) -> Path:
    """Return the file that is locked for an output; all names that lead to the output have the same one."""
    target = Path(os.path.realpath(output))
    # The beginning of the name is for people. The checksum distinguishes long names, which do not fit in whole.
    checksum = zlib.crc32(os.fsencode(target.name))
    return target.with_name(f".{name_beginning(target.name)}.{checksum:08x}{LOCK_SUFFIX}")


def _lock(path: Path, created: list[Path]) -> int:
    """Return a descriptor that holds the lock. Folders that had to be created are added to `created`, outermost first.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The file cannot be locked here.
    """
    for _ in range(_ATTEMPTS):
        try:
            _create_folders(path.parent, created)
            descriptor = _open(path)
        except FileNotFoundError:  # Another process has removed the folder, because it was empty.
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
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # Its holder removed the file in between, so that other processes no longer see it.
    # A file system whose inode numbers change each time: it cannot be known whose lock this is.
    with contextlib.suppress(OSError):
        path.unlink()
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), str(path))


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:  # A file of another user can be locked without write permission.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _time(descriptor: int) -> int | None:
    os.utime(descriptor)
    time = os.fstat(descriptor).st_mtime_ns
    return time if time % 10**9 else None


def _is_at(descriptor: int, path: Path) -> bool:
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
