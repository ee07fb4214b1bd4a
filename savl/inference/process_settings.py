"""Settings of the whole process for programs that own it, such as `savl`: memory of the C library, and threads.

`savl.Upscaler` and `savl.upscale` change no setting of a process. Threads are explained in docs/threads.md.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from collections.abc import Callable

from savl.inference.limits import is_limited, processor_quota

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_MMAP_MAX = -4
_ARENA_MAX = -8


def keep_freed_memory() -> bool:
    """Keep freed memory in this process instead of returning every large block to the system.

    A network allocates large tensors of the same sizes again and again, and getting new pages from the system takes
    longer than many operations on them: otherwise page faults take a third of the time of eager PyTorch on a large
    image. Peak memory stays about the same. Libraries should not change this setting for their users; the commands of
    savl do it for their own processes. Nothing is changed under a limit on address space (see `reduce_address_space`).

    Call this before threads that allocate are started. They then share one heap, because glibc returns the memory of
    further heaps in spite of the setting.

    Returns:
        Whether freed memory is kept from now on. This needs glibc as the C library.
    """
    global _keeps_freed_memory
    mallopt = _of_glibc("mallopt")
    if mallopt is None or _address_space_is_limited():
        return False
    settings = ((_TRIM_THRESHOLD, 2**31 - 1), (_MMAP_MAX, 0), (_ARENA_MAX, 1))
    _keeps_freed_memory = all(mallopt(name, value) for name, value in settings)
    return _keeps_freed_memory


_keeps_freed_memory = False


def keeps_freed_memory() -> bool:
    """Return whether `keep_freed_memory` has succeeded in this process."""
    return _keeps_freed_memory


def reduce_address_space() -> bool:
    """Avoid reserving unused address space if ``ulimit -v`` or ``ulimit -d`` limits this process.

    By default glibc reserves 64 MiB for each thread that allocates, and keeps the space of freed large tensors in the
    heap, where neither thread stacks nor code compiled by oneDNN can use it. oneDNN's cache of compiled code is reduced
    to about the code for one tile shape; by default it keeps several megabytes for each shape. Call this before torch
    is loaded and before threads are started.

    Returns:
        Whether there is such a limit and the C library (glibc) has these settings.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is None or not _address_space_is_limited():
        return False
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    # numpy's OpenBLAS reserves 32 MiB for each thread, and ends the process if it cannot.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    return bool(mallopt(_ARENA_MAX, 1)) and bool(mallopt(_MMAP_THRESHOLD, 2**18))


def return_freed_memory() -> None:
    """Return the memory that this process has freed to the system, if the C library can (glibc)."""
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _address_space_is_limited() -> bool:
    return is_limited("RLIMIT_AS") or is_limited("RLIMIT_DATA")


def _of_glibc(name: str) -> Callable[..., int] | None:
    """Return a function of glibc by name, or None if the C library does not have it."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # musl has none of these
        return None
    return function


SPIN_COUNT = 500
"""Iterations that an idle thread of GNU's OpenMP spins: about 50 to 100 microseconds. The default is 300,000."""

MAX_THREADS = max(1024, 4 * (os.cpu_count() or 1))
"""Upper bound of the number of threads. More only wait for each other, and OpenMP runtimes abort at some number."""

_MAX_VIPS_THREADS = 1024  # libvips' own limit, beyond which it warns

# Variables that set how OpenMP's idle threads wait: that of the standard, GNU's, and that of LLVM and Intel.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def limit_spinning() -> None:
    """Let idle OpenMP threads sleep after about 0.1 ms, so that other processes can use their processors.

    A forward pass runs thousands of parallel loops. Between two loops, idle OpenMP threads spin for up to tens of
    milliseconds by default, which wastes processor time that other processes may need. About 0.1 ms is longer than most
    gaps within a forward pass, so the pass itself does not become slower.

    The OpenMP runtime reads the environment when torch is loaded, so this has no effect afterwards. It changes nothing
    if the user has set ``OMP_WAIT_POLICY``, ``GOMP_SPINCOUNT`` or ``KMP_BLOCKTIME``.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _WAITING):
        return
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    # For builds of torch with LLVM's runtime: milliseconds; 1 is the smallest value above 0.
    os.environ["KMP_BLOCKTIME"] = "1"


def use_threads(count: int | None = None) -> int:
    """Set the number of threads of torch and libvips, and start those of torch.

    The threads are started at once, because an OpenMP runtime that cannot start a thread later ends the process. If the
    system refuses some of them, because of a limit on memory or threads, fewer are used.

    Args:
        count: At least 1; values above `MAX_THREADS` are reduced to it. If None, the value of ``OMP_NUM_THREADS`` is
            used. If that is not set, the number is one per processor that this process may use, but at most the
            processor time that its container allows (``docker run --cpus``), rounded up.

    Returns:
        The number of threads that torch uses.
    """
    import torch

    chosen = torch.get_num_threads() if count is None else count
    quota = processor_quota()
    if count is None and "OMP_NUM_THREADS" not in os.environ and quota is not None:
        chosen = max(1, min(chosen, math.ceil(quota)))
    startable = _startable(min(chosen, MAX_THREADS))
    if startable != torch.get_num_threads():
        torch.set_num_threads(startable)
    if count is not None or startable < chosen or quota is not None:
        _use_vips_threads(startable)
    torch.ones(1 << 16)  # large enough to be computed in parallel, so the runtime starts its threads
    return startable


def _startable(count: int) -> int:
    """Return how many of ``count`` threads the system lets this process have, the current one included."""
    enough = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count - 1):
            thread = threading.Thread(target=enough.wait, name="savl-probe")
            thread.start()
            started.append(thread)
    except (RuntimeError, MemoryError):
        pass  # the system refuses more threads
    finally:
        enough.set()
        for thread in started:
            thread.join()
    return len(started) + 1


def _use_vips_threads(count: int) -> None:
    count = min(count, _MAX_VIPS_THREADS)
    if "pyvips" in sys.modules:
        sys.modules["pyvips"].vips_lib.vips_concurrency_set(count)
    elif "VIPS_CONCURRENCY" not in os.environ:
        os.environ["VIPS_CONCURRENCY"] = str(count)
