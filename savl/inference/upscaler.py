"""The upscaler: a network, a device, and images of any size in bounded memory.

Two passes. The first runs the estimator over the image and keeps the per-pixel variance, so that severity is normalised
with the statistics of the whole image. The second runs the network tile by tile, each with its part of that severity
map, and blends the tiles. The degradation field of a tile is exact: the estimator reads a halo as wide as its receptive
field around it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from savl import ops
from savl.inference.device import best_device
from savl.inference.flat import keep_flat
from savl.inference.memory import default_tile, is_out_of_memory
from savl.inference.precision import checked_dtype
from savl.inference.tiling import Region, feather, split, whole
from savl.network import SAVL, DegradationField
from savl.network.savl import check_image


@dataclass(frozen=True)
class Upscaled:
    """What an `Upscaler` returns, on the CPU."""

    sr: Tensor
    """``(B, 3, scale·h, scale·w)`` float32 in [0, 1]."""
    severity: Tensor
    """``(B, h, w)`` float32 in [0, 2]; 1 everywhere for a network without a variational field."""


class Upscaler:
    """Upscale images of any size with one network. Calls do not disturb each other, so threads may share one."""

    def __init__(
        self,
        model: SAVL,
        *,
        tile: int | None = None,
        tile_pad: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Put the network on its device.

        Args:
            model: The network. It is left as it is: one that is in training mode, on another device or not float32 is
                copied first.
            tile: Side of the tiles in LR pixels, rounded up to a multiple of the attention window; None chooses by the
                memory of the device, 0 never tiles.
            tile_pad: Context around each tile in LR pixels, likewise rounded up.
            device: Where to compute; None takes the best there is.
            dtype: torch.float32 (default) or torch.bfloat16, which computes under autocast: faster where the hardware
                has it, within about one 8-bit level of float32.

        Raises:
            TypeError: ``model`` is not a network, or ``tile`` or ``tile_pad`` not an int.
            ValueError: ``tile`` or ``tile_pad`` is negative, or the dtype is not one of the two. float16 is refused
                because networks of the HAT family overflow in it.
        """
        if not isinstance(model, SAVL):
            raise TypeError(
                f"model must be a savl.SAVL (savl.load and savl.build give one), got {type(model).__name__}"
            )
        for name, pixels in (("tile", 0 if tile is None else tile), ("tile_pad", tile_pad)):
            if not isinstance(pixels, int) or isinstance(pixels, bool):
                raise TypeError(f"{name} must be an int (LR pixels), got {type(pixels).__name__} {pixels!r}")
            if pixels < 0:
                raise ValueError(f"{name} must be >= 0 LR pixels, got {pixels}")
        self.device = torch.device(device) if device is not None else best_device()
        self.dtype = torch.float32 if dtype is None else checked_dtype(dtype)
        mean = model.rgb_mean
        if model.training or mean.dtype != torch.float32 or mean.device != self.device:
            model = copy.deepcopy(model).to(self.device, torch.float32).eval()
        self.model = model
        self.scale = model.config.scale
        self.tile_pad = _round_up(tile_pad, model.config.window)
        self.tile = tile if not tile else _round_up(tile, model.config.window)

    @torch.no_grad()
    def __call__(self, lr: Tensor, *, on_tile: Callable[[int, int], None] | None = None) -> Upscaled:
        """Upscale a batch of images.

        Where an image is exactly flat its enlargement has exactly its colour (`savl.inference.flat`).

        Args:
            lr: ``(B, 3, h, w)`` floating in [0, 1].
            on_tile: Told (tiles done, tiles in all) after every tile; once for an untiled image.

        Returns:
            The images and their severity maps.

        Raises:
            TypeError: ``lr`` is not a floating tensor.
            ValueError: ``lr`` has another shape.
            RuntimeError: Memory runs out even for the smallest tile.
        """
        check_image("lr", lr)
        core = self._core_side(lr)
        run = _Run(self, lr, split(whole(lr), core), on_tile)
        run.severity = run.measure_severity()
        sr = run.assemble(whole(lr), core, run.count)
        keep_flat(sr, lr.to("cpu", torch.float32))
        severity = torch.ones(lr.shape[0], *lr.shape[-2:]) if run.severity is None else run.severity
        return Upscaled(sr.clamp_(0.0, 1.0), severity)

    def _core_side(self, lr: Tensor) -> int:
        height, width = lr.shape[-2:]
        if self.tile == 0:
            return max(height, width)
        if self.tile is not None:
            return self.tile
        side = default_tile(self.model.config, self.device, max(lr.shape[0], 1))
        if height * width <= side * side:
            return max(height, width)
        return max(side - 2 * self.tile_pad, 4 * self.model.config.window)


class _Run:
    """One call of an upscaler: the image, its severity map, and what was learned about the memory."""

    def __init__(
        self, upscaler: Upscaler, lr: Tensor, cores: list[Region], on_tile: Callable[[int, int], None] | None
    ) -> None:
        self.model = upscaler.model
        self.device = upscaler.device
        self.dtype = upscaler.dtype
        self.tile_pad = upscaler.tile_pad
        self.lr = lr
        self.image = whole(lr)
        self.cores = cores
        self.severity: Tensor | None = None
        self.halo = self.model.config.receptive_field // 2 if self.model.estimator is not None else 0
        self.largest_core: int | None = None  # cores above this side ran out of memory before
        self.done = 0
        self.on_tile = on_tile

    def count(self) -> None:
        """A tile of the whole image is done."""
        self.done += 1
        if self.on_tile is not None:
            self.on_tile(self.done, len(self.cores))

    def measure_severity(self) -> Tensor | None:
        """Severity of the whole image ``(B, h, w)`` on the CPU, or None for a network without variances."""
        if self.model.config.degradation_code != "variational":
            return None
        variance = torch.empty(self.lr.shape[0], *self.lr.shape[-2:])

        def measure(region: Region) -> None:
            try:
                field = self.field(region)
            except Exception as error:
                parts = split(region, _half(max(region.rows.length, region.columns.length), 1))
                if not is_out_of_memory(error) or len(parts) == 1:
                    raise
            else:
                assert field is not None
                assert field.variance is not None
                region.crop(variance, self.image).copy_(self.inside(field.variance, region))
                return
            self.release_memory()
            for part in parts:  # out of the except block: its traceback would keep the failed tensors alive
                measure(part)

        for core in self.cores:
            measure(core)
        return ops.normalise_severity(variance, *ops.variance_statistics(variance))

    def field(self, region: Region) -> DegradationField | None:
        """The field of ``region`` and the halo around it, exact inside ``region``."""
        crop = region.grown(self.halo, self.image).crop(self.lr, self.image)
        with self.autocast():
            return self.model.estimate(crop.to(self.device, torch.float32))

    def inside(self, map_with_halo: Tensor, region: Region) -> Tensor:
        """``region`` cut out of a map that `field` gave for it."""
        return region.crop(map_with_halo, region.grown(self.halo, self.image))

    def assemble(self, region: Region, side: int, on_tile: Callable[[], None] | None) -> Tensor:
        """Blend the tiles of ``region`` into ``(B, 3, scale·rows, scale·columns)`` float32 on the CPU."""
        cores = split(region, side)
        if len(cores) == 1:
            out = self.render(region, side)
            if on_tile is not None:
                on_tile()
            return out
        margin = min(self.tile_pad, side) // 2
        scale = self.model.config.scale
        out = torch.zeros(self.lr.shape[0], 3, scale * region.rows.length, scale * region.columns.length)
        for core in cores:
            visible = core.grown(margin, region)
            sr = self.render(visible, side)
            sr *= feather(core, region, margin, scale)
            visible.scaled(scale).crop(out, region.scaled(scale)).add_(sr)
            if on_tile is not None:
                on_tile()
        return out

    def render(self, region: Region, side: int) -> Tensor:
        """Upscale one rectangle with context around it; where memory runs out, by tiles of half the size."""
        smaller = _half(side, self.model.config.window)
        if self.largest_core is None or side <= self.largest_core:
            try:
                return self.run_network(region)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if smaller >= side:
                    raise RuntimeError(
                        f"out of memory even for a tile of {side} LR pixels; use a smaller tile_pad, a smaller model "
                        f"or another device ({error})"
                    ) from error
                self.largest_core = smaller
            self.release_memory()
        return self.assemble(region, min(self.largest_core, smaller), None)

    def run_network(self, region: Region) -> Tensor:
        """Upscale one rectangle with context around it, in one go."""
        scale = self.model.config.scale
        # Reaching out to window borders keeps the tile's windows those of the whole image.
        context = region.grown(self.tile_pad - self.tile_pad // 2, self.image)
        context = context.aligned(self.model.config.window, self.image)
        field = self.field(context)
        if field is not None:
            severity = None if self.severity is None else context.crop(self.severity, self.image).to(self.device)
            field = DegradationField(mu=self.inside(field.mu, context), severity=severity)
        crop = context.crop(self.lr, self.image).to(self.device, torch.float32)
        with self.autocast():
            sr = self.model.reconstruct(crop, field)
        sr = region.scaled(scale).crop(sr, context.scaled(scale)).to("cpu", torch.float32)
        return sr.clone(memory_format=torch.contiguous_format)  # a view would keep the whole tile alive

    def autocast(self) -> torch.autocast:
        """The precision that was asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def release_memory(self) -> None:
        """Give cached blocks back, so that smaller ones can be cut from them."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _half(side: int, multiple: int) -> int:
    """Half of a side, rounded up to a multiple and never below it."""
    return max(_round_up(-(-side // 2), multiple), multiple)
