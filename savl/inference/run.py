"""The state of one call of an upscaler: it computes the maps of an image, then its tiles, and blends them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from savl import ops
from savl.bicubic import bicubic_upscale
from savl.inference.automatic_graphs import LEAST_TILES, AutomaticGraphs, has_hooks
from savl.inference.enlarge import Strength
from savl.inference.graphs import WARM_UPS, GraphCache, launch_state
from savl.inference.process_settings import return_freed_memory
from savl.inference.tiling import Region, feather, round_up, split, whole
from savl.network import DegradationField
from savl.network.estimator import STRENGTH_RADIUS
from savl.network.upscaling import UpscalingNetwork
from savl.out_of_memory import binary_size, is_out_of_memory, require_memory

Parts = tuple[Callable[[Tensor], DegradationField | None], Callable[..., Tensor]]
"""The methods ``estimate`` and ``reconstruct`` of a network, or their compiled versions."""

_LIBRARY_BYTES = 32 * 2**20
"""Memory that must be free for libraries before a tile is started on a CPU, in bytes."""


@dataclass(frozen=True)
class Computation:
    """How the tiles of an image are computed.

    Attributes:
        network: The network, on the device.
        estimate: Its method of this name, or the compiled version.
        reconstruct: Its method of this name, or the compiled version.
        device: Device to compute on.
        dtype: torch.float32, or torch.bfloat16 for autocast.
        tile_pad: Context around each tile in LR pixels.
        graphs: Cache of CUDA graphs, or None.
        automatic: Decision which tiles use them; None for all.
    """

    network: UpscalingNetwork
    estimate: Callable[[Tensor], DegradationField | None]
    reconstruct: Callable[..., Tensor]
    device: torch.device
    dtype: torch.dtype
    tile_pad: int
    graphs: GraphCache | None
    automatic: AutomaticGraphs | None = None


class Run:
    """State of one call of an upscaler: the image, its maps, and the largest tile that fits into memory.

    Attributes:
        severity: ``(B, h, w)`` float32 on the CPU after `measure_maps`; None for a network without a variational field.
        strength: ``(B, h, w)`` float32 on the CPU after `measure_maps`; None for 1, with which the network's output is
            not blended. A number also becomes a map, so that all numbers share CUDA graphs.
        largest_core: Largest side of tiles that is still tried, in LR pixels; None if no tile has run out of memory.
    """

    def __init__(
        self,
        computation: Computation,
        lr: Tensor,
        cores: list[Region],
        strength: Strength,
        on_tile: Callable[[int, int], None] | None,
    ) -> None:
        """Begin a call.

        Args:
            computation: How tiles are computed.
            lr: ``(B, C, h, w)`` floating in [0, 1].
            cores: The tiles, whose number ``on_tile`` receives.
            strength: "auto" or a number from 0 to 1.
            on_tile: Callback, called with (tiles done, number of tiles) after every tile.
        """
        network = computation.network
        self.network = network
        self.scale = network.scale
        self.multiple = network.size_multiple
        self.estimate = computation.estimate
        self.reconstruct = computation.reconstruct
        self.device = computation.device
        self.dtype = computation.dtype
        self.tile_pad = computation.tile_pad
        self.automatic = computation.automatic
        self.graphs = computation.graphs
        if self.automatic is not None and (self.automatic.reason is not None or has_hooks(network)):
            self.graphs = None
        self.repeated: set[Hashable] = set()
        self.computed: set[Hashable] = set()
        self.state = None if self.graphs is None else launch_state(network)
        self.lr = lr
        self.image = whole(lr)
        self.cores = cores
        self.severity: Tensor | None = None
        self.strength: Tensor | None = None
        if isinstance(strength, float) and strength != 1:
            self.strength = torch.full((lr.shape[0], *lr.shape[-2:]), strength)
        self.learned_strength = strength == "auto" and network.learns_strength
        self.halo = network.field_radius + (STRENGTH_RADIUS if self.learned_strength else 0)
        self.largest_core: int | None = None
        self.done = 0
        self.on_tile = on_tile

    def count(self) -> None:
        """Count one more tile of the image as done, and call ``on_tile``."""
        self.done += 1
        if self.on_tile is not None:
            self.on_tile(self.done, len(self.cores))

    def measure_maps(self) -> None:
        """Compute the severity map, and the strength map if the network determines it."""
        size = self.lr.shape[0], *self.lr.shape[-2:]
        variance = torch.empty(size) if self.network.has_severity else None
        strength = torch.empty(size) if self.learned_strength else None
        if variance is None and strength is None:
            return

        def measure(region: Region) -> None:
            try:
                field = self.field(region)
            except Exception as error:
                # Without the memory of automatic graphs, the whole region may fit.
                held = self.automatic is not None and self.graphs is not None and len(self.graphs) > 0
                parts = [region] if held else split(region, _half(max(region.rows.length, region.columns.length), 1))
                if not is_out_of_memory(error) or (len(parts) == 1 and not held):
                    raise
            else:
                assert field is not None
                for kept, measured in ((variance, field.variance), (strength, field.strength)):
                    if kept is not None and measured is not None:
                        region.crop(kept, self.image).copy_(self.inside(measured, region))
                return
            # Outside the except block, whose traceback keeps the tensors of the failed call alive.
            self.release_memory()
            for part in parts:
                measure(part)

        for core in self.cores:
            measure(core)
        if strength is not None:
            self.strength = strength
        if variance is not None:
            self.severity = ops.normalise_severity(variance, *ops.variance_statistics(variance))

    def field(self, region: Region) -> DegradationField | None:
        """Compute the field of ``region`` and the halo around it; it is exact inside ``region``."""
        self.leave_memory()
        crop = region.grown(self.halo, self.image).crop(self.lr, self.image)
        with self.autocast(torch.float32):
            return self.estimate(crop.to(self.device, torch.float32).contiguous())

    def inside(self, map_with_halo: Tensor, region: Region) -> Tensor:
        """Cut ``region`` out of a map that `field` computed for it."""
        return region.crop(map_with_halo, region.grown(self.halo, self.image))

    def interpolate(self) -> Tensor:
        """Return the bicubically upscaled image ``(B, C, scale·h, scale·w)`` float32 on the CPU, for the strength 0."""
        try:
            sr = bicubic_upscale(self.lr.to("cpu", torch.float32), self.scale)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise _no_room((*self.lr.shape[:2], *(self.scale * side for side in self.lr.shape[-2:]))) from error
        self.cores = [self.image]
        self.count()
        return sr

    def assemble(self, region: Region, side: int, on_tile: Callable[[], None] | None) -> Tensor:
        """Upscale ``region`` in tiles and blend them into ``(B, C, scale·rows, scale·columns)`` float32 on the CPU."""
        cores = split(region, side)
        if len(cores) == 1:
            out = self.render(region, side)
            if on_tile is not None:
                on_tile()
            return out
        margin = min(self.tile_pad, side) // 2
        scale = self.scale
        out = _zeros(*self.lr.shape[:2], scale * region.rows.length, scale * region.columns.length)
        tiles = [core.grown(margin, region) for core in cores]
        ready = {index: self.render(tiles[index], side) for index in self.first_tiles(tiles)}
        for index, (core, visible) in enumerate(zip(cores, tiles, strict=True)):
            sr = ready.pop(index) if index in ready else self.render(visible, side)
            sr *= feather(core, region, margin, scale)
            visible.scaled(scale).crop(out, region.scaled(scale)).add_(sr)
            if on_tile is not None:
                on_tile()
        return out

    def first_tiles(self, tiles: list[Region]) -> list[int]:
        """Return the tiles to compute before the others, so that a graph of the largest shape is recorded first.

        The graphs of the other shapes then fit into its memory. This also finds the shapes that occur several times.
        """
        if self.graphs is None:
            return []
        shapes = [self.shape_of(tile) for tile in tiles]
        size = [self.context(tile).pixels for tile in tiles]
        if self.automatic is None:
            return [max(range(len(tiles)), key=size.__getitem__)]
        repeated = {shape for shape, count in Counter(shapes).items() if count >= LEAST_TILES}
        self.repeated |= repeated
        largest = max(
            (index for index, shape in enumerate(shapes) if shape in repeated), key=size.__getitem__, default=-1
        )
        # Two of them: the first is computed without a graph.
        return [index for index, shape in enumerate(shapes) if largest >= 0 and shape == shapes[largest]][:2]

    def shape_of(self, region: Region) -> tuple[Region, Region, Region]:
        """Return what distinguishes the graphs of tiles of one image: the sizes and places of all that is cut out.

        Args:
            region: The tile.

        Returns:
            The halo, and in its pixels the context and ``region``.
        """
        context = self.context(region)
        halo = context.grown(self.halo, self.image)
        return halo.seen_from(halo), context.seen_from(halo), region.seen_from(halo)

    def render(self, region: Region, side: int) -> Tensor:
        """Upscale one rectangle with context around it; if memory runs out, in tiles of half the side."""
        smaller = _half(side, self.multiple)
        if self.largest_core is None or side <= self.largest_core:
            try:
                return self.run_network(region)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if smaller >= side:
                    raise RuntimeError(
                        f"out of memory even for a tile of {side} LR pixels; free some, or use a smaller tile_pad, a "
                        "smaller model or another device"
                    ) from error
                self.largest_core = smaller
            self.release_memory()
        return self.assemble(region, min(self.largest_core, smaller), None)

    def context(self, region: Region) -> Region:
        """Return what the network reads for ``region``, extended to multiples of the network's size multiple."""
        grown = region.grown(self.tile_pad - self.tile_pad // 2, self.image)
        return grown.aligned(self.multiple, self.image)

    def run_network(self, region: Region) -> Tensor:
        """Upscale one rectangle with context around it to ``(B, C, scale·rows, scale·columns)`` on the CPU, untiled."""
        self.leave_memory()
        context = self.context(region)
        halo = context.grown(self.halo, self.image)
        maps = {
            name: context.crop(map_, self.image)
            for name, map_ in (("severity", self.severity), ("strength", self.strength))
            if map_ is not None
        }
        inputs = [halo.crop(self.lr, self.image), *maps.values()]
        local_context, local_region = context.seen_from(halo), region.seen_from(halo)

        def compute(crop: Tensor, *on_device: Tensor) -> Tensor:
            return self.pass_over(crop, dict(zip(maps, on_device, strict=True)), local_context, local_region)

        def compute_now() -> Tensor:
            on_device = [tensor.to(self.device, torch.float32).contiguous() for tensor in inputs]
            return compute(*on_device).to("cpu", torch.float32)

        graphs = self.graphs
        if graphs is None:
            return compute_now()
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        key = (shapes, tuple(maps), local_context, local_region, self.dtype, self.state, id(self.network))

        def replay(warm_ups: int = WARM_UPS) -> Tensor:
            return graphs.run(key, compute, inputs, lambda: launch_state(self.network) == self.state, warm_ups)

        if self.automatic is None:
            return replay()
        repeated = self.shape_of(region) in self.repeated
        return self.automatic.run(
            graphs, key, repeated=repeated, computed=self.computed, compute=compute_now, replay=partial(replay, 0)
        )

    def pass_over(self, crop: Tensor, maps: dict[str, Tensor], context: Region, region: Region) -> Tensor:
        """Run the network on a tile; CUDA graphs record this function.

        Everything that the result depends on, except the values of the tensors, must be in the key of the graph.

        Args:
            crop: ``(B, C, h, w)`` float32 on the device: the context and the halo around it.
            maps: Those of "severity" and "strength" that apply, for the context ``(B, h', w')``.
            context: The context in the pixels of ``crop``.
            region: The part to return, in the pixels of ``crop``.

        Returns:
            ``region`` upscaled. It is contiguous, because a view would keep the whole tile alive.
        """
        origin = whole(crop)
        with self.autocast(torch.float32):  # In bfloat16, the estimator causes most of the largest errors of the image.
            field = self.estimate(crop)
        if field is not None:
            mu = context.crop(field.mu, origin).to(self.dtype)  # here, because autocast would convert it for every DSCA
            field = DegradationField(mu=mu, severity=maps.get("severity"))
        with self.autocast(self.dtype):
            given = {"strength": maps["strength"]} if "strength" in maps else {}
            sr = self.reconstruct(context.crop(crop, origin).contiguous(), field, **given)
        return region.scaled(self.scale).crop(sr, context.scaled(self.scale)).contiguous()

    def autocast(self, dtype: torch.dtype) -> torch.autocast:
        """Return the autocast context for a dtype; for float32 it turns autocast off.

        Autocast's cache of cast weights is off: each weight is used once per pass, and a graph must not read a weight
        that was cast before its capture.
        """
        enabled = dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def leave_memory(self) -> None:
        """Raise MemoryError if oneDNN, which may crash without memory, could not allocate its code and buffers."""
        if self.device.type == "cpu":
            require_memory(_LIBRARY_BYTES, "while a tile is computed")

    def release_memory(self) -> None:
        """Release cached memory blocks and recorded graphs, so that smaller tiles can use their memory."""
        if self.graphs is not None:
            self.graphs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            return_freed_memory()


def _zeros(*shape: int) -> Tensor:
    """Allocate the float32 tensor on the CPU that tiles are blended into. Smaller tiles would not make it smaller."""
    try:
        return torch.zeros(shape)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _no_room(shape) from error


def _no_room(shape: tuple[int, ...]) -> RuntimeError:
    return RuntimeError(
        f"out of memory: the result of {shape[-1]}x{shape[-2]} pixels takes {binary_size(4 * math.prod(shape))} "
        "while it is computed; free some, or upscale parts of the image"
    )


def _half(side: int, multiple: int) -> int:
    """Half of a side, rounded up to a multiple and never below it."""
    return max(round_up(-(-side // 2), multiple), multiple)
