"""How much memory a tile takes, and how much there is."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from savl.inference.control_group import control_group_folders
from savl.inference.heap import is_limited
from savl.network import SAVLConfig

CPU_BUDGET = 1 << 30
"""Most bytes of activations a default tile takes on a CPU: larger tiles are no faster there."""


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
        budget = min(CPU_BUDGET, available_bytes() // 2)
    side = int(math.sqrt(budget / batch / bytes_per_pixel(config)))
    return max(side // config.window, 4) * config.window


def available_bytes() -> int:
    """Return how many bytes this process can still allocate on the CPU, as far as the system says.

    The least of the machine's free memory, of what the process's control group (a container, a job of a cluster) has
    left, and of what ``ulimit`` leaves it.
    """
    limits = [free for free in (_free_on_machine(), _free_in_control_group(), _free_below_limits()) if free is not None]
    return max(0, min(limits, default=2 * CPU_BUDGET))  # nothing to ask: the budget decides


def _free_on_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass  # not Linux
    return None


def _free_in_control_group() -> int | None:
    """The least that any of the groups around this process has left; files in the page cache count as free."""
    least = None
    for folder in control_group_folders("memory"):
        try:
            version2 = (folder / "memory.max").exists()
            limit = int((folder / ("memory.max" if version2 else "memory.limit_in_bytes")).read_text())
            used = int((folder / ("memory.current" if version2 else "memory.usage_in_bytes")).read_text())
            counts = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # no limit is the word max; the root has no files
        cached = int(counts.get("inactive_file" if version2 else "total_inactive_file", 0))
        free = limit - used + cached
        least = free if least is None else min(least, free)
    return least


def _free_below_limits() -> int | None:
    """What ``ulimit -v`` and ``ulimit -d`` leave."""
    try:
        import resource

        pages = [int(count) for count in Path("/proc/self/statm").read_text().split()]
        left = [
            resource.getrlimit(getattr(resource, name))[0] - used * resource.getpagesize()
            for name, used in (("RLIMIT_AS", pages[0]), ("RLIMIT_DATA", pages[5]))
            if is_limited(name)
        ]
    except (ImportError, OSError, ValueError):
        return None  # not Linux
    return min(left, default=None)
