"""How many threads a command computes with, and how they wait for work: see docs/threads.md.

For the command line, which owns its process. `savl.Upscaler` and `savl.upscale` change no setting of a process.
"""

from __future__ import annotations

import math
import os
import sys
import threading

from savl.inference.control_group import processor_quota

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
