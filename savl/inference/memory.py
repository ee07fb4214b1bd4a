"""How much memory a tile takes, how much there is, and what running out of it looks like."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from savl.network import SAVLConfig

CPU_BUDGET = 1 << 30
"""Most bytes of activations a default tile takes on a CPU: larger tiles are no faster there."""


def bytes_per_pixel(config: SAVLConfig, itemsize: int = 4) -> int:
    """Peak activation memory of the eager network per LR pixel, estimated from above.

    The larger of OCAB's logits (with their softmax and the sum before it) plus unfolded keys, and the upsampler's
    widest layers, beside a dozen feature maps.
    """
    keys = config.key_window**2
    unfolded = 3 * 2 * config.channels * keys / config.window**2
    attention = 3 * config.heads * keys + unfolded
    direct = config.upsampler == "pixelshuffledirect"
    upsampler = 12 * config.scale**2 if direct else 3 * config.upsample_features * config.scale**2
    return math.ceil(itemsize * (max(attention, upsampler) + 12 * config.channels + 4 * config.latent))


def default_tile(config: SAVLConfig, device: torch.device, itemsize: int = 4) -> int:
    """Side of the largest square tile, context included, that the machine has room for.

    Half of the free memory, on a CPU at most `CPU_BUDGET`.

    Returns:
        Pixels, a multiple of the window, at least four windows.
    """
    if device.type == "cuda":
        budget = torch.cuda.mem_get_info(device)[0] // 2
    else:
        budget = min(CPU_BUDGET, _available_bytes() // 2)
    side = int(math.sqrt(budget / bytes_per_pixel(config, itemsize)))
    return max(side // config.window, 4) * config.window


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "not enough memory" in text or "can't allocate memory" in text
    )


def _available_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: nothing to ask, the budget decides
    return 2 * CPU_BUDGET
