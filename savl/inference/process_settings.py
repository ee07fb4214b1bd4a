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


SPIN_COUNT = 500
"""Turns of a loop for which a thread of GNU's OpenMP waits awake, about 50 to 100 microseconds; its own is 300,000."""

MOST_THREADS = max(1024, 4 * (os.cpu_count() or 1))
"""More than these are a mistake: they only wait for each other, and the runtimes of OpenMP break off on some number."""

_MOST_VIPS_THREADS = 1024  # libvips' own limit, beyond which it warns

# What tells an OpenMP runtime how its threads wait: the standard's variable, GNU's, and that of LLVM and Intel.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def limit_spinning() -> None:
    """Let threads that have nothing to do sleep soon, so that others can have their processors.

    A pass of a network is thousands of parallel loops. Between them, and at the end of each until the last is done,
    the threads of OpenMP wait in a loop of their own for up to tens of milliseconds. On a processor that somebody else
    needs, that is time during which nobody gets anything done. With what is set here they wait so for about a tenth of
    a millisecond, which is longer than most of the gaps within a pass.

    The runtime reads the environment when torch is loaded, so this does nothing afterwards. It does nothing either
    where the user has chosen: ``OMP_WAIT_POLICY``, ``GOMP_SPINCOUNT`` or ``KMP_BLOCKTIME`` is set.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _WAITING):
        return
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    os.environ["KMP_BLOCKTIME"] = (
        "1"  # milliseconds, the least there is beside none; builds of torch with LLVM's runtime
    )


def use_threads(count: int | None = None) -> int:
    """Compute with ``count`` threads from now on, in torch and in libvips, and start torch's.

    They are started at once because a runtime of OpenMP that cannot start a thread ends the process. Where the system
    refuses some of them now, because of a limit on memory or on threads, fewer are used.

    Args:
        count: At least 1, and more than `MOST_THREADS` count as so many. None is what ``OMP_NUM_THREADS`` says, else
            one per processor that this process may use; where a container may only take the time of fewer
            (``docker run --cpus``), as many as that.

    Returns:
        How many threads torch uses.
    """
    import torch

    chosen = torch.get_num_threads() if count is None else count
    quota = processor_quota()
    if count is None and "OMP_NUM_THREADS" not in os.environ and quota is not None:
        chosen = max(1, min(chosen, math.ceil(quota)))
    startable = _startable(min(chosen, MOST_THREADS))
    if startable != torch.get_num_threads():
        torch.set_num_threads(startable)
    if count is not None or startable < chosen or quota is not None:
        _use_vips_threads(startable)
    torch.ones(1 << 16)  # more than one thread's share: the runtime starts its threads
    return startable


def _startable(count: int) -> int:
    """How many of ``count`` threads, this one among them, the system lets this process have."""
    enough = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count - 1):
            thread = threading.Thread(target=enough.wait, name="savl-probe")
            thread.start()
            started.append(thread)
    except (RuntimeError, MemoryError):
        pass  # no more than these
    finally:
        enough.set()
        for thread in started:
            thread.join()
    return len(started) + 1


def _use_vips_threads(count: int) -> None:
    count = min(count, _MOST_VIPS_THREADS)
    if "pyvips" in sys.modules:
        sys.modules["pyvips"].vips_lib.vips_concurrency_set(count)
    elif "VIPS_CONCURRENCY" not in os.environ:
        os.environ["VIPS_CONCURRENCY"] = str(count)
