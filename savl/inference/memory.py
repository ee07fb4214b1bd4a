"""How much memory a tile takes, how much there is, and what running out of it looks like."""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path

import torch

from savl.network import SAVLConfig

CPU_BUDGET = 1 << 30
"""Most bytes of activations a default tile takes on a CPU: larger tiles are no faster there."""


# Allocations that fail inside a library surface under its own words: the CPU allocator's, cuDNN's (which also finds no
# algorithm when it has no room for one), cuBLAS's and Metal's.
_OUT_OF_MEMORY_SIGNS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "status_alloc_failed",
    "unable to find a valid cudnn algorithm",
    "unable to find an engine",
    "invalid buffer size",
)


def bytes_per_pixel(config: SAVLConfig) -> int:
    """Peak activation memory of the eager network in float32 per LR pixel, estimated from above.

    The larger of OCAB's logits (with their softmax and the sum before it) plus unfolded keys, and the upsampler's
    widest layers, beside a dozen feature maps.
    """
    keys = config.key_window**2
    unfolded = 3 * 2 * config.channels * keys / config.window**2
    attention = 3 * config.heads * keys + unfolded
    direct = config.upsampler == "pixelshuffledirect"
    upsampler = 12 * config.scale**2 if direct else 3 * config.upsample_features * config.scale**2
    return math.ceil(4 * (max(attention, upsampler) + 12 * config.channels + 4 * config.latent))


def default_tile(config: SAVLConfig, device: torch.device, batch: int = 1) -> int:
    """Side of the largest square tile, context included, that the machine has room for.

    Half of the free memory, on a CPU at most `CPU_BUDGET`, shared by the images of a batch.

    Returns:
        Pixels, a multiple of the window, at least four windows.
    """
    if device.type == "cuda":
        # What torch holds but does not use is free to it, though the driver does not say so.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = (torch.cuda.mem_get_info(device)[0] + cached) // 2
    else:
        budget = min(CPU_BUDGET, _available_bytes() // 2)
    side = int(math.sqrt(budget / batch / bytes_per_pixel(config)))
    return max(side // config.window, 4) * config.window


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY_SIGNS)


def _available_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: nothing to ask, the budget decides
    return 2 * CPU_BUDGET


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees instead of handing every large block back to the system.

    A network allocates large tensors of the same sizes over and over, and new pages from the system cost more than many
    an operation on them: without this, a third of the time of eager PyTorch on a large image is page faults. The most
    that the process holds stays about the same. Not for a library to do to its users; `savl upscale` does it for
    itself.

    Returns:
        Whether the C library is one that can be told (glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_max, 0))
