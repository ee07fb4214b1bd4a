"""Recognise errors that mean lack of memory, on any device and in any library, and describe them in one line.

Libraries report failed allocations in different words, and many of them not as MemoryError. This module knows those
words and imports none of the libraries, so that every other module can use it.
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
    # C++ exceptions, as torch passes them on
    "std::bad_alloc",
    "bad allocation",
    # cuBLAS, and cuDNN, which finds no algorithm if there is no memory for one
    "status_alloc_failed",
    "unable to find a valid cudnn algorithm",
    "unable to find an engine",
    # oneDNN, which does not give the reason; the shapes of the networks here are all supported
    "could not create a primitive",
    "could not create a memory",
    "could not execute a primitive",
    # the decoders that libvips uses
    "insufficient memory",
    "failed to allocate",
    # threads, whose stacks need memory; limits on the number of threads give the same messages
    "can't start new thread",
    "error creating thread",
    "resource temporarily unavailable",
    # the loader of shared libraries
    "failed to map segment",
    "cannot map zero-fill pages",
)
_SIZES = (
    re.compile(r"tried to allocate (\d+) (bytes)", re.IGNORECASE),
    re.compile(r"(?:tried|unable) to allocate ([\d.]+) ([kmgt]i?b)", re.IGNORECASE),
)


def says_out_of_memory(text: str) -> bool:
    """Return whether a library's message says that memory could not be allocated or a thread not be started."""
    lowered = text.lower()
    return any(sign in lowered for sign in _SIGNS)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that an allocation failed, on any device.

    Of errors about files only the error number counts, since their text contains names of files.
    """
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
        return error.errno == errno.ENOMEM
    # torch raises RuntimeError, pyvips an Exception of its own, and an import that fails ImportError.
    unlikely = isinstance(error, ValueError | TypeError | LookupError | AttributeError)
    return not unlikely and says_out_of_memory(str(error))


def out_of_memory_in_short(error: BaseException, advice: str = "free some") -> str:
    """Describe an error for which `is_out_of_memory` is true in one line.

    Args:
        error: The error. A message of savl's own is returned unchanged; of a library's message, the size is kept.
        advice: Advice to the user, as the second half of the sentence.

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
    """Return whether the system gives this process ``count`` more bytes at present; they are freed at once."""
    try:
        mmap.mmap(-1, max(count, 1)).close()
    except (OSError, ValueError, OverflowError, MemoryError):
        return False
    return True


def require_memory(count: int, doing: str) -> None:
    """Raise an error before some work if the system does not give this process ``count`` more bytes.

    This is for calls of libraries that end the process if they get no memory, such as GLib in libvips.

    Args:
        count: Approximate number of bytes that the work needs.
        doing: Name of the work, as a clause that begins with "while".

    Raises:
        MemoryError: There is less memory.
    """
    if not can_allocate(count):
        raise MemoryError(f"out of memory {doing}, which takes about {binary_size(count)}; free some")


def binary_size(count: int) -> str:
    """Format a number of bytes in the largest unit of which it is at least 1, for example "1.4 GiB"."""
    amount = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
