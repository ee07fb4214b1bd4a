"""Tiles of an image: their size, their position, their context, and how they are blended into one image.

Each tile has a *core*; the cores partition the image. A tile reads its core and ``pad`` pixels of context around it.
The outer half of the context is discarded, because it is too close to the cut; over the inner half, neighbouring tiles
are blended. The origins are multiples of the attention window, so a tile's windows are windows of the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from savl.inference.limits import available_bytes
from savl.inference.process_settings import keeps_freed_memory
from savl.network import SAVLConfig

CPU_BUDGET = 4 << 30
"""Upper bound of the estimated memory for the features of a default tile on a CPU, in bytes.

With 4 GiB, savl-tiny spends about a fifth of its time on the overlap of tiles, compared with a third with 1 GiB. Larger
tiles would save little more.
"""

PAGED_CPU_BUDGET = 1 << 30
"""The same bound for processes whose C library returns freed memory to the system.

In such a process, every tensor above 32 MiB causes page faults, so that larger tiles are not faster.
"""


@dataclass(frozen=True)
class Span:
    """A half-open interval of pixels along one axis."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of pixels."""
        return self.stop - self.start

    def grown(self, margin: int, within: Span) -> Span:
        """Return the span extended by ``margin`` pixels on both sides, clipped to ``within``."""
        return Span(max(self.start - margin, within.start), min(self.stop + margin, within.stop))

    def aligned(self, multiple: int, within: Span) -> Span:
        """Return the span extended to multiples of ``multiple``, clipped to ``within``."""
        start = self.start // multiple * multiple
        stop = -(-self.stop // multiple) * multiple
        return Span(max(start, within.start), min(stop, within.stop))

    def relative_to(self, origin: Span) -> slice:
        """Return the span as a slice of an array that begins where ``origin`` begins."""
        return slice(self.start - origin.start, self.stop - origin.start)

    def seen_from(self, origin: Span) -> Span:
        """Return the span in the coordinates of an array that begins where ``origin`` begins."""
        return Span(self.start - origin.start, self.stop - origin.start)

    def scaled(self, factor: int) -> Span:
        """Return the span in the pixels of an image ``factor`` times as large."""
        return Span(self.start * factor, self.stop * factor)


@dataclass(frozen=True)
class Region:
    """A rectangle of pixels."""

    rows: Span
    columns: Span

    def grown(self, margin: int, within: Region) -> Region:
        """Return the rectangle extended by ``margin`` pixels on all sides, clipped to ``within``."""
        return Region(self.rows.grown(margin, within.rows), self.columns.grown(margin, within.columns))

    def aligned(self, multiple: int, within: Region) -> Region:
        """Return the rectangle extended to multiples of ``multiple``, clipped to ``within``."""
        return Region(self.rows.aligned(multiple, within.rows), self.columns.aligned(multiple, within.columns))

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self.rows.length * self.columns.length

    def seen_from(self, origin: Region) -> Region:
        """Return the rectangle in the coordinates of an image that begins where ``origin`` begins."""
        return Region(self.rows.seen_from(origin.rows), self.columns.seen_from(origin.columns))

    def scaled(self, factor: int) -> Region:
        """Return the rectangle in the pixels of an image ``factor`` times as large."""
        return Region(self.rows.scaled(factor), self.columns.scaled(factor))

    def crop(self, image: Tensor, origin: Region) -> Tensor:
        """Return a view of this rectangle in ``image`` ``(..., H, W)``, which covers the rectangle ``origin``."""
        return image[..., self.rows.relative_to(origin.rows), self.columns.relative_to(origin.columns)]


def whole(image: Tensor) -> Region:
    """Return the rectangle of all pixels of ``(..., H, W)``."""
    return Region(Span(0, image.shape[-2]), Span(0, image.shape[-1]))


def split(region: Region, side: int) -> list[Region]:
    """Partition a rectangle into cores of at most ``side`` × ``side`` pixels, row by row.

    The origins of the cores are multiples of ``side`` from the origin of the rectangle.
    """
    return [Region(rows, columns) for rows in _steps(region.rows, side) for columns in _steps(region.columns, side)]


def _steps(span: Span, side: int) -> Iterator[Span]:
    for start in range(span.start, span.stop, side):
        yield Span(start, min(start + side, span.stop))


def feather(core: Region, region: Region, margin: int, scale: int) -> Tensor:
    """Compute the weights of a tile in the blend.

    Towards each neighbour, the weight falls linearly from 1 to 0 across the border of the core: from ``margin`` pixels
    inside to ``margin`` pixels outside. The neighbour's weight rises by the same amount, so the weights at each pixel
    sum to 1. The weight does not fall towards the edge of ``region``.

    Args:
        core: The core of the tile, in LR pixels.
        region: The rectangle that the tiles are blended into, in LR pixels.
        margin: Half the width of the transition, in LR pixels. At most half a core's side, so that no more than two
            tiles meet along an axis.
        scale: Upscaling factor.

    Returns:
        ``(rows, columns)`` float32 for the core grown by ``margin`` within ``region``, in output pixels.
    """
    rows = _ramp(core.rows, region.rows, margin, scale)
    columns = _ramp(core.columns, region.columns, margin, scale)
    return rows[:, None] * columns[None, :]


def _ramp(core: Span, region: Span, margin: int, scale: int) -> Tensor:
    grown = core.grown(margin, region).scaled(scale)
    position = torch.arange(grown.start, grown.stop, dtype=torch.float32) + 0.5  # centres of output pixels
    weight = torch.ones_like(position)
    fade = 2.0 * margin * scale
    if margin > 0 and core.start > region.start:
        weight = weight * ((position - (core.start - margin) * scale) / fade).clamp(max=1.0)
    if margin > 0 and core.stop < region.stop:
        weight = weight * (((core.stop + margin) * scale - position) / fade).clamp(max=1.0)
    return weight


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def bytes_per_pixel(config: SAVLConfig) -> int:
    """Return an upper estimate of the eager network's peak activation memory in float32, in bytes per LR pixel.

    It is the larger of two terms, plus a dozen feature maps: OCAB's logits (with their softmax and the sum before it)
    and unfolded keys; or the widest layers of the upsampler.
    """
    keys = config.key_window**2
    unfolded = 3 * 2 * config.channels * keys / config.window**2
    attention = 3 * config.heads * keys + unfolded
    direct = config.upsampler == "pixelshuffledirect"
    upsampler = 12 * config.scale**2 if direct else 3 * config.upsample_features * config.scale**2
    return math.ceil(4 * (max(attention, upsampler) + 12 * config.channels + 4 * config.latent))


def default_tile(bytes_per_pixel: int, multiple: int, device: torch.device, batch: int = 1, *, least: int = 0) -> int:
    """Return the side of the largest square tile, context included, that fits into memory.

    The tiles of a batch may take half of the free memory; on a CPU at most `CPU_BUDGET`, or `PAGED_CPU_BUDGET` unless
    this process keeps freed memory.

    Args:
        bytes_per_pixel: Peak memory of the network's features per LR pixel, estimated.
        multiple: Size multiple of the network in LR pixels.
        device: Device of the network.
        batch: Number of images.
        least: Side in LR pixels below which tiles are not made.

    Returns:
        LR pixels, a multiple of ``multiple``, at least four times it.
    """
    side = int(math.sqrt(memory_budget(device) / batch / bytes_per_pixel))
    return max(side // multiple, 4, -(-least // multiple)) * multiple


def memory_budget(device: torch.device, *, capped: bool = True) -> int:
    """Return how many bytes the features of a tile may take on a device, as `default_tile` says.

    Args:
        device: Device of the network.
        capped: Apply the upper bounds for a CPU. Without them, half of the free memory.
    """
    if device.type == "cuda":
        # Memory that torch has cached but does not use is available, though the driver reports it as used.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + cached) // 2
    most = CPU_BUDGET if keeps_freed_memory() else PAGED_CPU_BUDGET
    half = available_bytes() // 2
    return min(most, half) if capped else half
