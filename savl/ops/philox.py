"""Philox4x32-10: random numbers that depend on a seed and a position, not on a device or a thread count.

The generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): ten rounds of two 32-bit
multiplications turn a 128-bit counter and a 64-bit key into four independent 32-bit words. Written here in int64
tensor arithmetic, so that the same stream exists wherever torch runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox_4x32(counter: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ten Philox rounds.

    Args:
        counter: int64 tensor of any shape, values ≥ 0: the low 64 bits of the counter (the high 64 bits are zero).
        seed: 64-bit key, 0 ≤ seed < 2**64.

    Returns:
        Four int64 tensors of the shape of ``counter`` holding 32-bit words, 0 ... 2**32 − 1.
    """
    words = [counter & _MASK, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    key = [seed & _MASK, seed >> 32 & _MASK]
    for _ in range(10):
        high0, low0 = _multiply(words[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(words[2], _MULTIPLIERS[1])
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = [(k + step) & _MASK for k, step in zip(key, _KEY_STEPS, strict=True)]
    return words[0], words[1], words[2], words[3]


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """32 × 32 → 64 bit product as (high, low) words, by 16-bit halves so that int64 never overflows."""
    low_part = (word & 0xFFFF) * factor  # < 2**48
    high_part = (word >> 16) * factor  # < 2**48, weighs 2**16
    middle = high_part + (low_part >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low_part & 0xFFFF


def standard_normal(
    shape: tuple[int, ...], seed: int, *, offset: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw N(0, 1) noise: element n of the row-major order takes word n mod 4 of counter offset + n div 4 (Box–Muller).

    Args:
        shape: Shape of the result.
        seed: 0 ≤ seed < 2**64; the same seed and position give the same number on every device (up to the last bit,
            where logarithm and cosine of two devices round differently).
        offset: Where in the stream to begin, in counters of four numbers each, 0 ≤ offset < 2**62.
        device: Where the result should live.

    Returns:
        float32 tensor of ``shape``.
    """
    count = math.prod(shape)
    counter = offset + torch.arange((count + 3) // 4, device=device)
    words = philox_4x32(counter, seed)
    # (word + ½) / 2³² lies strictly inside (0, 1): the logarithm is finite. float64 keeps the small tail exact.
    uniform = [(word.double() + 0.5) * 2.0**-32 for word in words]
    normals = []
    for radius_source, angle_source in ((uniform[0], uniform[1]), (uniform[2], uniform[3])):
        radius = torch.sqrt(-2.0 * torch.log(radius_source))
        angle = 2.0 * math.pi * angle_source
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normals, dim=-1).reshape(-1)[:count].reshape(shape).float()
