"""What running out of memory looks like, on any device and in any library, and how it is told to people.

Allocations that fail surface under each library's own words, many of them not as MemoryError. This module knows those
words and imports none of the libraries, so that whoever reads, computes or writes can ask it.
"""

from __future__ import annotations

import errno
import mmap
import re

_SIGNS = (
    # the allocators of torch, of CUDA and of Metal
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "invalid buffer size",
    # C++, as torch passes it on
    "std::bad_alloc",
    "bad allocation",
    # cuBLAS, and cuDNN, which also finds no algorithm when it has no room for one
    "status_alloc_failed",
    "unable to find a valid cudnn algorithm",
    "unable to find an engine",
    # oneDNN, which does not say why, and whose shapes the networks here keep within what it supports
    "could not create a primitive",
    "could not create a memory",
    "could not execute a primitive",
    # the decoders behind libvips
    "insufficient memory",
    "failed to allocate",
    # threads, whose stacks are memory; the limits of users and containers on threads look the same
    "can't start new thread",
    "error creating thread",
    "resource temporarily unavailable",
    # the loader of libraries
    "failed to map segment",
    "cannot map zero-fill pages",
)
_SIZES = (
    re.compile(r"tried to allocate (\d+) (bytes)", re.IGNORECASE),
    re.compile(r"(?:tried|unable) to allocate ([\d.]+) ([kmgt]i?b)", re.IGNORECASE),
)


def says_out_of_memory(text: str) -> bool:
    """Return whether a library's message says that memory, or a thread, could not be had."""
    lowered = text.lower()
    return any(sign in lowered for sign in _SIGNS)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that an allocation failed, on any device.

    Errors about files are judged by their number alone, since their text holds names that people chose.
    """
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
        return error.errno == errno.ENOMEM
    # torch raises RuntimeError, pyvips an Exception of its own, and an import that fails ImportError.
    unlikely = isinstance(error, ValueError | TypeError | LookupError | AttributeError)
    return not unlikely and says_out_of_memory(str(error))


def out_of_memory_in_short(error: BaseException, advice: str = "free some") -> str:
    """Return one line for people about an error of which `is_out_of_memory` is true.

    Args:
        error: The error. A message of savl's own is taken as it is; of a library's, the size that it names is kept.
        advice: What to do, as the second half of the sentence.

    Returns:
        For example "out of memory: 36 MiB could not be allocated; free some".
    """
    text = " ".join(str(error).split())
    if text.startswith("out of memory") and ";" in text:
        return text
    for pattern in _SIZES:
        if match := pattern.search(text):
            amount = binary_size(int(match[1])) if match[2] == "bytes" else f"{match[1]} {match[2]}"
            return f"out of memory: {amount} could not be allocated; {advice}"
    if "thread" in text or "temporarily unavailable" in text:
        return f"out of memory: a thread could not be started; {advice}"
    return f"out of memory; {advice}"


def can_allocate(count: int) -> bool:
    """Return whether the system gives this process ``count`` more bytes at the moment. They are given back at once."""
    try:
        mmap.mmap(-1, max(count, 1)).close()
    except (OSError, ValueError, OverflowError, MemoryError):
        return False
    return True


def require_memory(count: int, doing: str) -> None:
    """Refuse to begin what would be ended halfway, where the system does not give this process ``count`` more bytes.

    For calls of libraries, such as GLib under libvips, that end the process when they get no memory.

    Args:
        count: Bytes that the work takes, roughly.
        doing: What the work is, as a clause that begins with "while".

    Raises:
        MemoryError: There is less.
    """
    if not can_allocate(count):
        raise MemoryError(f"out of memory {doing}, which takes about {binary_size(count)}; free some")


def binary_size(count: int) -> str:
    """Return a number of bytes in the largest unit of which it has at least one, for example "1.4 GiB"."""
    amount = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
