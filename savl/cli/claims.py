"""Claims on outputs, so that several processes share one folder: who claims a file does it, and others go on.

A claim is a lock on a hidden file beside the output, `.<name>.<checksum>.claim`. The system releases it when the
process ends, however it ends, so a crash blocks nobody; the file itself is removed with the claim, and one that a kill
left behind is taken over by the next process. Where files cannot be locked (Windows, some network file systems, a
folder that cannot be written) every claim is granted.
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

CLAIM_SUFFIX = ".claim"

_BUSY = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)
_ATTEMPTS = 100


@dataclass(frozen=True)
class Claim:
    """What became of a claim.

    Attributes:
        granted: whether the output is this process's to write; False where another one has claimed it.
        time_ns: when that was by the clock of the file system, which need not be this machine's, in nanoseconds; None
            where it is not known, or only in whole seconds.
    """

    granted: bool
    time_ns: int | None = None


@contextlib.contextmanager
def claim(output: Path) -> Iterator[Claim]:
    """Claim an output for as long as the block lasts.

    The folder of the output is made; where the block leaves it empty it is removed again.

    Args:
        output: the file that is going to be written.
    """
    if fcntl is None:
        yield Claim(True)
        return
    path = claim_path(output)
    made: list[Path] = []
    descriptor: int | None = None
    result = Claim(True)
    try:
        try:
            descriptor = _lock(path, made)
            result = Claim(True, _time(descriptor))
        except BlockingIOError:
            result = Claim(False)
        except OSError:
            pass  # The work itself says what is wrong with the folder, if anything is.
        yield result
    finally:
        if descriptor is not None:
            # Removed before it is released: who locks it afterwards notices and makes a new one.
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def claim_path(output: Path) -> Path:
    """Return the file that is locked to claim an output, the same for all names that lead to the output."""
    target = Path(os.path.realpath(output))
    # The beginning is for people; the checksum tells long names apart, whose ends do not fit.
    checksum = zlib.crc32(os.fsencode(target.name))
    return target.with_name(f".{name_beginning(target.name)}.{checksum:08x}{CLAIM_SUFFIX}")


def _lock(path: Path, made: list[Path]) -> int:
    """Return a descriptor that holds the lock; folders that had to be made are added to `made`, outermost first.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be locked here.
    """
    for _ in range(_ATTEMPTS):
        try:
            _make_folders(path.parent, made)
            descriptor = _open(path)
        except FileNotFoundError:  # another process removed the folder, empty as it was
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
        os.close(descriptor)  # its holder removed it in between: it is no longer what others see
    # A file system that numbers its files anew each time: whose lock this is cannot be told.
    with contextlib.suppress(OSError):
        path.unlink()
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), str(path))


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:  # another user's: it can be locked all the same
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


def _make_folders(folder: Path, made: list[Path]) -> None:
    missing = []
    while not folder.exists() and folder not in missing:
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        with contextlib.suppress(FileExistsError):
            new.mkdir()
            made.append(new)
