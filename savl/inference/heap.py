"""How the C library of this process keeps and returns memory. For programs that own their process, such as `savl`."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_MMAP_MAX = -4
_ARENA_MAX = -8


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees instead of handing every large block back to the system.

    A network allocates large tensors of the same sizes over and over, and new pages from the system cost more than many
    an operation on them: without this, a third of the time of eager PyTorch on a large image is page faults. The most
    that the process holds stays about the same. Not for a library to do to its users; `savl upscale` does it for
    itself. Nothing is kept where `save_address_space` has work to do.

    Returns:
        Whether freed memory is kept from now on; the C library must be glibc for it.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is None or _address_space_is_limited():
        return False
    return bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(_MMAP_MAX, 0))


def save_address_space() -> bool:
    """Reserve and keep no memory that is not in use, where ``ulimit -v`` or ``ulimit -d`` limits this process.

    Each thread that allocates would reserve 64 MiB for itself, and what large tensors leave behind in the heap can hold
    neither the stack of a thread nor the code that oneDNN compiles. Of that code oneDNN keeps what about one shape of
    tiles needs, where it would keep several megabytes for each shape. To be called before torch is loaded and before
    there are threads.

    Returns:
        Whether there is such a limit, and a C library that can be told (glibc).
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is None or not _address_space_is_limited():
        return False
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, which reserves 32 MiB for each and ends the process
    return bool(mallopt(_ARENA_MAX, 1)) and bool(mallopt(_MMAP_THRESHOLD, 2**18))


def return_freed_memory() -> None:
    """Hand the memory that this process has freed back to the system, where the C library can (glibc)."""
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def is_limited(name: str) -> bool:
    """Return whether ``ulimit`` limits this process in a resource, such as "RLIMIT_AS"."""
    try:
        import resource
    except ImportError:  # Windows
        return False
    kind = getattr(resource, name, None)
    return kind is not None and resource.getrlimit(kind)[0] != resource.RLIM_INFINITY


def _address_space_is_limited() -> bool:
    return is_limited("RLIMIT_AS") or is_limited("RLIMIT_DATA")


def _of_glibc(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # musl has none of these
        return None
    return function
