"""The upscaler: a network, a device, and images of any size in bounded memory.

Two passes. The first runs the estimator over the image and keeps the per-pixel variance, so that severity is normalised
with the statistics of the whole image. The second runs the network tile by tile, each with its part of that severity
map, and blends the tiles. The degradation field of a tile is exact: the estimator reads a halo as wide as its receptive
field around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from savl import ops
from savl.inference.memory import default_tile, is_out_of_memory
from savl.inference.tiling import Region, feather, split, whole
from savl.network import SAVL, DegradationField
from savl.network.savl import check_image

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Upscaled:
    """What an `Upscaler` returns, on the CPU."""

    sr: Tensor
    """``(B, 3, scale·h, scale·w)`` float32 in [0, 1]."""
    severity: Tensor
    """``(B, h, w)`` float32 in [0, 2]; 1 everywhere for a network without a variational field."""


class Upscaler:
    """Upscale images of any size with one network."""

    def __init__(
        self,
        model: SAVL,
        *,
        tile: int | None = None,
        tile_pad: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Move the network to its device.

        Args:
            model: The network; it is put into evaluation mode.
            tile: Side of the tiles in LR pixels, rounded up to a multiple of the attention window; None chooses by the
                memory of the device, 0 never tiles.
            tile_pad: Context around each tile in LR pixels, likewise rounded up.
            device: Where to compute; None takes CUDA if there is one, else the CPU.
            dtype: torch.float32 (default) or torch.bfloat16, which computes under autocast: faster where the hardware
                has it, within about one 8-bit level of float32.

        Raises:
            ValueError: ``tile`` or ``tile_pad`` is negative, or the dtype is not one of the two. float16 is refused
                because networks of the HAT family overflow in it.
        """
        if tile is not None and tile < 0:
            raise ValueError(f"tile must be >= 0 LR pixels (0: never tile) or None (choose), got {tile}")
        if tile_pad < 0:
            raise ValueError(f"tile_pad must be >= 0 LR pixels, got {tile_pad}")
        dtype = dtype or torch.float32
        if dtype not in DTYPES:
            reason = "; HAT-like networks overflow in float16" if dtype == torch.float16 else ""
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}{reason}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype
        self.model = model.to(self.device, torch.float32).eval()
        self.scale = model.config.scale
        self.tile_pad = _round_up(tile_pad, model.config.window)
        self._tile = tile if not tile else _round_up(tile, model.config.window)
        self._halo = 0 if model.estimator is None else model.config.receptive_field // 2
        self._largest_core: int | None = None  # cores above this side ran out of memory before

    @torch.no_grad()
    def __call__(self, lr: Tensor, *, on_tile: Callable[[int, int], None] | None = None) -> Upscaled:
        """Upscale a batch of images.

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
        self._largest_core = None
        region = whole(lr)
        core = self._core_side(region)
        severity = self._severity_map(lr, core)
        cores = split(region, core)
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            if on_tile is not None:
                on_tile(done, len(cores))

        sr = self._assemble(lr, severity, region, core, count)
        ones = torch.ones(lr.shape[0], *lr.shape[-2:]) if severity is None else severity
        return Upscaled(sr.clamp_(0.0, 1.0), ones)

    def _core_side(self, region: Region) -> int:
        longest = max(region.rows.length, region.columns.length)
        if self._tile == 0:
            return longest
        if self._tile is not None:
            return self._tile
        side = default_tile(self.model.config, self.device)
        if region.area <= side * side:
            return longest
        return max(side - 2 * self.tile_pad, 4 * self.model.config.window)

    def _severity_map(self, lr: Tensor, side: int) -> Tensor | None:
        """Severity of the whole image ``(B, h, w)`` on the CPU, or None for a network without variances."""
        if self.model.config.degradation_code != "variational":
            return None
        variance = torch.empty(lr.shape[0], *lr.shape[-2:])
        image = whole(lr)

        def measure(region: Region) -> None:
            try:
                field = self._field(lr, region)
            except Exception as error:
                parts = split(region, _half(max(region.rows.length, region.columns.length), 1))
                if not is_out_of_memory(error) or len(parts) == 1:
                    raise
            else:
                assert field is not None
                assert field.variance is not None
                region.crop(variance, image).copy_(self._inside(field.variance, region, image))
                return
            for part in parts:  # out of the except block: its traceback would keep the failed tensors alive
                measure(part)

        for region in split(image, side):
            measure(region)
        return ops.normalise_severity(variance, *ops.variance_statistics(variance))

    def _field(self, lr: Tensor, region: Region) -> DegradationField | None:
        """The field of ``region`` and the halo around it, exact inside ``region``."""
        crop = region.grown(self._halo, whole(lr)).crop(lr, whole(lr))
        with self._autocast():
            return self.model.estimate(crop.to(self.device, torch.float32))

    def _inside(self, map_with_halo: Tensor, region: Region, image: Region) -> Tensor:
        return region.crop(map_with_halo, region.grown(self._halo, image))

    def _assemble(
        self, lr: Tensor, severity: Tensor | None, region: Region, side: int, on_tile: Callable[[], None] | None
    ) -> Tensor:
        """Blend the tiles of ``region`` into ``(B, 3, scale·rows, scale·columns)`` float32 on the CPU."""
        cores = split(region, side)
        if len(cores) == 1:
            out = self._render(lr, severity, region, side)
            if on_tile is not None:
                on_tile()
            return out
        margin = min(self.tile_pad, side) // 2
        scale = self.scale
        out = torch.zeros(lr.shape[0], 3, scale * region.rows.length, scale * region.columns.length)
        for core in cores:
            visible = core.grown(margin, region)
            sr = self._render(lr, severity, visible, side)
            sr *= feather(core, region, margin, scale)
            visible.scaled(scale).crop(out, region.scaled(scale)).add_(sr)
            if on_tile is not None:
                on_tile()
        return out

    def _render(self, lr: Tensor, severity: Tensor | None, region: Region, side: int) -> Tensor:
        """Upscale one rectangle with context around it; where memory runs out, by tiles of half the size."""
        if self._largest_core is None or side <= self._largest_core:
            try:
                return self._run_network(lr, severity, region)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                smaller = _half(side, self.model.config.window)
                if smaller >= side:
                    raise RuntimeError(
                        f"out of memory even for a tile of {side} LR pixels; use a smaller --tile-pad or a smaller "
                        f"model, or another device ({error})"
                    ) from error
                self._largest_core = smaller
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._assemble(
            lr, severity, region, min(self._largest_core, _half(side, self.model.config.window)), None
        )

    def _run_network(self, lr: Tensor, severity: Tensor | None, region: Region) -> Tensor:
        image = whole(lr)
        window = self.model.config.window
        # Reaching out to window borders keeps the tile's windows those of the whole image.
        context = region.grown(self.tile_pad - self.tile_pad // 2, image).aligned(window, image)
        field = self._field(lr, context)
        if field is not None:
            mu = self._inside(field.mu, context, image)
            s = None if severity is None else context.crop(severity, image).to(self.device)
            field = DegradationField(mu=mu, severity=s)
        with self._autocast():
            sr = self.model.reconstruct(context.crop(lr, image).to(self.device, torch.float32), field)
        return region.scaled(self.scale).crop(sr, context.scaled(self.scale)).to("cpu", torch.float32).clone()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _half(side: int, multiple: int) -> int:
    """Half of a side, rounded up to a multiple and never below it."""
    return max(_round_up(-(-side // 2), multiple), multiple)
