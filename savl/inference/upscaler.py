"""The upscaler: a network on a device that upscales images of any size in bounded memory.

It makes two passes over an image. The first runs the estimator and keeps two maps of the whole image: the per-pixel
variance, so that severity is normalised with the statistics of the whole image, and the restoration strength. The
second runs the network tile by tile, each tile with its part of these maps, and blends the tiles. The degradation field
of a tile is exact, because the estimator also reads the pixels around it that lie within its receptive field.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from savl import ops
from savl.bicubic import bicubic_upscale
from savl.images.pixels import check_range
from savl.inference.device import best_device, checked_dtype, with_device_index
from savl.inference.enlarge import Strength, check_strength
from savl.inference.graphs import CudaCapture, GraphCache, launch_state
from savl.inference.process_settings import return_freed_memory
from savl.inference.tiling import Region, default_tile, feather, split, whole
from savl.network import DegradationField
from savl.network.estimator import STRENGTH_RADIUS
from savl.network.savl import check_image
from savl.network.unwrap import unwrap
from savl.ops.scopes import fused_by_default
from savl.out_of_memory import binary_size, is_out_of_memory, require_memory

_Parts = tuple[Callable[[Tensor], DegradationField | None], Callable[..., Tensor]]
"""`SAVL.estimate` and `SAVL.reconstruct`, or their compiled versions."""

_LIBRARY_BYTES = 32 * 2**20
"""Memory that must be free for libraries before a tile is started on a CPU, in bytes."""


FLAT_RADIUS = 4
"""A pixel is flat if all pixels at most this far away, horizontally and vertically, have exactly its colour."""


@dataclass(frozen=True)
class Upscaled:
    """Result of an `Upscaler`, on the CPU."""

    sr: Tensor
    """``(B, 3, scale·h, scale·w)`` float32 in [0, 1]."""
    severity: Tensor
    """``(B, h, w)`` float32 in [0, 2]; 1 everywhere for a network without a variational field."""
    strength: Tensor
    """``(B, h, w)`` float32 in [0, 1]: how strongly each pixel was restored. With the strength "auto", it is 1
    everywhere for a network that has learned no strength."""


class Upscaler:
    """Upscale images of any size with one network. Several threads may share an upscaler."""

    def __init__(
        self,
        model: nn.Module,
        *,
        tile: int | None = None,
        tile_pad: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cuda_graph: bool = False,
        strength: Strength = "auto",
    ) -> None:
        """Put the network on its device.

        Args:
            model: The network, a `savl.SAVL`. It is not modified: a network in training mode, on another device or not
                in float32 is copied first. If it was compiled with ``torch.compile(model)`` or ``model.compile()``,
                `SAVL.estimate` and `SAVL.reconstruct`, which an upscaler calls, are compiled with the same options at
                their first call. Tiles have up to nine shapes; ``dynamic=True`` compiles once for all of them.
                `DataParallel`, `DistributedDataParallel` and `AveragedModel` are removed, because an upscaler computes
                on one device.
            tile: Side of the tiles in LR pixels, rounded up to a multiple of the attention window. None chooses it by
                the free memory of the device, 0 does not tile.
            tile_pad: Context around each tile in LR pixels, rounded up to the same multiple.
            device: Device to compute on; None selects CUDA if available, else MPS, else the CPU.
            dtype: torch.float32 (default) or torch.bfloat16, which computes the network under autocast and is faster on
                hardware that supports it. The degradation field, severity and strength are always computed in
                float32. Results of savl-tiny were measured to be within one 8-bit level of those in float32.
            cuda_graph: Record the network's pass over a tile as a CUDA graph, and replay it for every tile of the same
                shape. Results are bitwise equal, and the CPU no longer launches every kernel. The first tile of a shape
                takes three additional passes, so this pays off for many tiles or images.

                Graphs for up to `savl.inference.graphs.MAX_GRAPHS` shapes are kept. They share the memory that the
                largest one needs, plus one output tile each, and keep it between calls. Therefore tiles keep their
                different shapes: padding all of them to one shape would save no memory, and would change results at the
                edges of the image. With ``tile=None``, the side chosen at the first call is kept for later calls, and a
                side that ran out of memory is not tried again.

                Weights changed in place take effect at the next tile. Graphs are recorded anew at the next image after
                a change of the fused kernels or of torch's precision settings, and after the model was moved or given
                other tensors. Threads that share the Upscaler run the network one at a time.
            strength: How strongly images are restored, unless a call says otherwise. "auto": the strength that
                the network has learned for each pixel, or 1 if it has learned none. A number from 0 to 1 scales the
                difference from bicubic interpolation: 0 is bicubic interpolation, 1 the network's full restoration.

        Raises:
            TypeError: ``model`` is not a network of savl, ``tile`` or ``tile_pad`` is not an int, ``cuda_graph`` is
                not a bool, or ``strength`` is neither a number nor "auto".
            ValueError: ``tile`` or ``tile_pad`` is negative; or the dtype is not one of the two (float16 is refused
                because networks of the HAT family overflow in it); or ``cuda_graph`` is set without CUDA; or
                ``strength`` is not in [0, 1].
        """
        unwrapped = unwrap(model)
        if unwrapped is None:
            raise TypeError(
                "model must be a savl.SAVL (savl.load and savl.build give one), also compiled or in DataParallel, got "
                f"{type(model).__name__}"
            )
        for name, pixels in (("tile", 0 if tile is None else tile), ("tile_pad", tile_pad)):
            if not isinstance(pixels, int) or isinstance(pixels, bool):
                raise TypeError(f"{name} must be an int (LR pixels), got {type(pixels).__name__} {pixels!r}")
            if pixels < 0:
                raise ValueError(f"{name} must be >= 0 LR pixels, got {pixels}")
        if not isinstance(cuda_graph, bool):
            raise TypeError(f"cuda_graph must be a bool, got {type(cuda_graph).__name__} {cuda_graph!r}")
        self.device = with_device_index(torch.device(device) if device is not None else best_device())
        if cuda_graph and self.device.type != "cuda":
            raise ValueError(
                f"cuda_graph=True needs a CUDA device ('cuda', 'cuda:<number>'), got device {str(self.device)!r}; "
                "every other device takes cuda_graph=False"
            )
        if cuda_graph and not torch.cuda.is_available():
            raise ValueError(
                f"cuda_graph=True needs a CUDA device, torch {torch.__version__} finds none; use cuda_graph=False"
            )
        self.dtype = torch.float32 if dtype is None else checked_dtype(dtype)
        self.strength = check_strength(strength)
        network = unwrapped.model
        mean = network.rgb_mean
        if network.training or mean.dtype != torch.float32 or mean.device != self.device:
            network = copy.deepcopy(network).to(self.device, torch.float32).eval()
        self.model = network
        self.compiled_parts: _Parts | None = None
        if unwrapped.compile is not None:
            self.compiled_parts = unwrapped.compile(network.estimate), unwrapped.compile(network.reconstruct)
        self.scale = network.config.scale
        self.tile_pad = _round_up(tile_pad, network.config.window)
        self.tile = tile if not tile else _round_up(tile, network.config.window)
        self.graphs = GraphCache(CudaCapture(self.device)) if cuda_graph else None
        # With CUDA graphs only, by batch size: the default tile, and the largest side that did not run out of memory.
        self._default_tiles: dict[int, int] = {}
        self._largest_cores: dict[int, int] = {}

    @torch.no_grad()
    def __call__(
        self,
        lr: Tensor,
        *,
        strength: Strength | None = None,
        on_tile: Callable[[int, int], None] | None = None,
    ) -> Upscaled:
        """Upscale a batch of images.

        Areas of exactly one colour keep exactly that colour (`restore_flat_areas`).

        The fused kernels are used unless `savl.use_fused_kernels`, a setting of the model or ``SAVL_KERNELS`` says
        otherwise. They agree with the eager reference within twice the rounding error of the reference.

        Args:
            lr: ``(B, 3, h, w)`` floating in [0, 1].
            strength: "auto" or a number from 0 to 1, instead of that of the upscaler; None for that of the upscaler.
            on_tile: Callback, called with (tiles done, number of tiles) after every tile; once for an untiled image.

        Returns:
            The images, and the maps of severity and strength.

        Raises:
            TypeError: ``lr`` is not a floating tensor, or ``strength`` is neither a number nor "auto".
            ValueError: ``lr`` has another shape, or values outside [0, 1] by more than rounding errors; or ``strength``
                is not in [0, 1].
            RuntimeError: Memory is not sufficient even for the smallest tile.
        """
        check_image("lr", lr)
        chosen = self.strength if strength is None else check_strength(strength)
        if lr.numel() > 0:
            low, high = lr.aminmax()
            check_range("lr", low.item(), high.item())
        with self._current_device(), fused_by_default():
            core = self._core_side(lr)
            core = min(core, self._largest_cores.get(lr.shape[0], core))
            run = _Run(self, lr, split(whole(lr), core), chosen, on_tile)
            run.measure_maps()
            sr = run.interpolate() if chosen == 0 else run.assemble(whole(lr), core, run.count)
        if self.graphs is not None and run.largest_core is not None:
            self._largest_cores[lr.shape[0]] = run.largest_core
        restore_flat_areas(sr, lr.to("cpu", torch.float32))
        ones = torch.ones(lr.shape[0], *lr.shape[-2:])
        severity, applied = (ones if each is None else each for each in (run.severity, run.strength))
        return Upscaled(sr.clamp_(0.0, 1.0), severity, applied)

    def _current_device(self) -> AbstractContextManager[object]:
        """Make the device current: some libraries launch kernels there, whatever the device of their tensors."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _core_side(self, lr: Tensor) -> int:
        height, width = lr.shape[-2:]
        if self.tile == 0:
            return max(height, width)
        if self.tile is not None:
            return self.tile
        side = self._default_tile(max(lr.shape[0], 1))
        if height * width <= side * side:
            return max(height, width)
        return max(side - 2 * self.tile_pad, 4 * self.model.config.window)

    def _default_tile(self, batch: int) -> int:
        """Return the side of tiles chosen by free memory.

        With CUDA graphs the first choice is kept, because graphs take memory themselves and fit one shape each.
        """
        if self.graphs is None:
            return default_tile(self.model.config, self.device, batch)
        if batch not in self._default_tiles:
            self._default_tiles.setdefault(batch, default_tile(self.model.config, self.device, batch))
        return self._default_tiles[batch]


class _Run:
    """State of one call of an upscaler: the image, its maps, and the largest tile that fits into memory."""

    def __init__(
        self,
        upscaler: Upscaler,
        lr: Tensor,
        cores: list[Region],
        strength: Strength,
        on_tile: Callable[[int, int], None] | None,
    ) -> None:
        self.model = upscaler.model
        parts: _Parts = upscaler.compiled_parts or (self.model.estimate, self.model.reconstruct)
        self.estimate, self.reconstruct = parts
        self.device = upscaler.device
        self.dtype = upscaler.dtype
        self.tile_pad = upscaler.tile_pad
        self.graphs = upscaler.graphs
        self.state = None if self.graphs is None else launch_state(self.model)
        self.lr = lr
        self.image = whole(lr)
        self.cores = cores
        self.severity: Tensor | None = None  # (B, h, w) on the CPU; None for a network without a variational field
        # (B, h, w) on the CPU; None for 1, with which the network's output is not blended. A number also becomes a map,
        # so that all numbers share CUDA graphs.
        self.strength: Tensor | None = None
        if isinstance(strength, float) and strength != 1:
            self.strength = torch.full((lr.shape[0], *lr.shape[-2:]), strength)
        self.learned_strength = strength == "auto" and self.model.strength is not None
        self.halo = self.model.config.receptive_field // 2 if self.model.estimator is not None else 0
        if self.learned_strength:
            self.halo += STRENGTH_RADIUS
        self.largest_core: int | None = None  # larger cores have run out of memory; None if none has
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
        variance = torch.empty(size) if self.model.config.degradation_code == "variational" else None
        strength = torch.empty(size) if self.learned_strength else None
        if variance is None and strength is None:
            return

        def measure(region: Region) -> None:
            try:
                field = self.field(region)
            except Exception as error:
                parts = split(region, _half(max(region.rows.length, region.columns.length), 1))
                if not is_out_of_memory(error) or len(parts) == 1:
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
        """Return the bicubically upscaled image ``(B, 3, scale·h, scale·w)`` float32 on the CPU, for the strength 0."""
        scale = self.model.config.scale
        try:
            sr = bicubic_upscale(self.lr.to("cpu", torch.float32), scale)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise _no_room((*self.lr.shape[:2], *(scale * side for side in self.lr.shape[-2:]))) from error
        self.cores = [self.image]
        self.count()
        return sr

    def assemble(self, region: Region, side: int, on_tile: Callable[[], None] | None) -> Tensor:
        """Upscale ``region`` in tiles and blend them into ``(B, 3, scale·rows, scale·columns)`` float32 on the CPU."""
        cores = split(region, side)
        if len(cores) == 1:
            out = self.render(region, side)
            if on_tile is not None:
                on_tile()
            return out
        margin = min(self.tile_pad, side) // 2
        scale = self.model.config.scale
        out = _zeros(self.lr.shape[0], 3, scale * region.rows.length, scale * region.columns.length)
        tiles = [core.grown(margin, region) for core in cores]
        ready: dict[int, Tensor] = {}
        if self.graphs is not None:  # the largest tile first: the graphs of the others then fit into its memory
            largest = max(range(len(tiles)), key=lambda index: self.context(tiles[index]).pixels)
            ready[largest] = self.render(tiles[largest], side)
        for index, (core, visible) in enumerate(zip(cores, tiles, strict=True)):
            sr = ready.pop(index) if index in ready else self.render(visible, side)
            sr *= feather(core, region, margin, scale)
            visible.scaled(scale).crop(out, region.scaled(scale)).add_(sr)
            if on_tile is not None:
                on_tile()
        return out

    def render(self, region: Region, side: int) -> Tensor:
        """Upscale one rectangle with context around it; if memory runs out, in tiles of half the side."""
        smaller = _half(side, self.model.config.window)
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
        """Return what the network reads for ``region``, extended to borders of the image's attention windows."""
        grown = region.grown(self.tile_pad - self.tile_pad // 2, self.image)
        return grown.aligned(self.model.config.window, self.image)

    def run_network(self, region: Region) -> Tensor:
        """Upscale one rectangle with context around it to ``(B, 3, scale·rows, scale·columns)`` on the CPU, untiled."""
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

        if self.graphs is None:
            on_device = [tensor.to(self.device, torch.float32).contiguous() for tensor in inputs]
            return compute(*on_device).to("cpu", torch.float32)
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        key = (shapes, tuple(maps), local_context, local_region, self.dtype, self.state)
        return self.graphs.run(key, compute, inputs, lambda: launch_state(self.model) == self.state)

    def pass_over(self, crop: Tensor, maps: dict[str, Tensor], context: Region, region: Region) -> Tensor:
        """Run the network on a tile; CUDA graphs record this function.

        Everything that the result depends on, except the values of the tensors, must be in the key of the graph.

        Args:
            crop: ``(B, 3, h, w)`` float32 on the device: the context and the halo around it.
            maps: Those of "severity" and "strength" that apply, for the context ``(B, h', w')``.
            context: The context in the pixels of ``crop``.
            region: The part to return, in the pixels of ``crop``.

        Returns:
            ``region`` upscaled. It is contiguous, because a view would keep the whole tile alive.
        """
        scale = self.model.config.scale
        origin = whole(crop)
        with self.autocast(torch.float32):  # In bfloat16, the estimator causes most of the largest errors of the image.
            field = self.estimate(crop)
        if field is not None:
            mu = context.crop(field.mu, origin).to(self.dtype)  # here, because autocast would convert it for every DSCA
            field = DegradationField(mu=mu, severity=maps.get("severity"))
        with self.autocast(self.dtype):
            given = {"strength": maps["strength"]} if "strength" in maps else {}
            sr = self.reconstruct(context.crop(crop, origin).contiguous(), field, **given)
        return region.scaled(scale).crop(sr, context.scaled(scale)).contiguous()

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


def restore_flat_areas(sr: torch.Tensor, lr: torch.Tensor) -> None:
    """Set flat areas of the upscaled image to their exact colour, in place.

    A network reproduces a flat area only within one or two 8-bit levels, and less exactly at the border of the image,
    where its convolutions see zeros. Overexposed skies and white paper would become slightly gray. A flat area contains
    nothing but its colour, so its pixels are copied from the input; all other pixels keep the network's output.

    Args:
        sr: ``(B, 3, scale·h, scale·w)`` contiguous; modified in place.
        lr: ``(B, 3, h, w)``, the image that was upscaled.
    """
    flat = (_highest_around(lr) == -_highest_around(-lr)).all(dim=1, keepdim=True)
    if not bool(flat.any()):
        return
    batch, channels, height, width = lr.shape
    scale = sr.shape[-1] // width
    blocks = sr.view(batch, channels, height, scale, width, scale)
    for row in range(scale):
        for column in range(scale):
            subpixels = blocks[:, :, :, row, :, column]
            subpixels.copy_(torch.where(flat, lr, subpixels))


def _highest_around(image: Tensor) -> Tensor:
    """Return the maximum of each channel over the square of 2·FLAT_RADIUS + 1 pixels around each pixel.

    It is computed along columns and then along rows, which needs fewer comparisons than all pixels of the square.
    """
    side = 2 * FLAT_RADIUS + 1
    # max_pool2d pads with minus infinity.
    columns = F.max_pool2d(image, (side, 1), stride=1, padding=(FLAT_RADIUS, 0))
    return F.max_pool2d(columns, (1, side), stride=1, padding=(0, FLAT_RADIUS))


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


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _half(side: int, multiple: int) -> int:
    """Half of a side, rounded up to a multiple and never below it."""
    return max(_round_up(-(-side // 2), multiple), multiple)
