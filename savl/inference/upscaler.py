"""The upscaler: a network on a device that upscales images of any size in bounded memory.

It makes two passes over an image. The first runs the estimator and keeps two maps of the whole image: the per-pixel
variance, so that severity is normalised with the statistics of the whole image, and the restoration strength. The
second runs the network tile by tile, each tile with its part of these maps, and blends the tiles. The degradation field
of a tile is exact, because the estimator also reads the pixels around it that lie within its receptive field.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from savl.accelerate import AccelerationReport
from savl.images.pixels import check_range
from savl.inference.automatic_graphs import AutomaticGraphs, has_hooks
from savl.inference.device import best_device, checked_dtype, with_device_index
from savl.inference.enlarge import Strength, check_strength
from savl.inference.graphs import CudaCapture, GraphCache
from savl.inference.measured_memory import measured_bytes_per_pixel
from savl.inference.network import accelerated, as_network, needs_copy, uses_fused_attention
from savl.inference.run import Computation, Parts, Run
from savl.inference.tiling import bytes_per_pixel, default_tile, memory_budget, round_up, split, whole
from savl.network import SAVL
from savl.network.savl import check_image
from savl.network.upscaling import UpscalingNetwork
from savl.ops.scopes import fused_by_default

FLAT_RADIUS = 4
"""A pixel is flat if all pixels at most this far away, horizontally and vertically, have exactly its colour."""


LEAST_MEASURED_TILE = 96
"""Least side in LR pixels of the tiles of a network whose memory must be measured. Images of at most as many pixels are
not tiled, so that nothing is measured for them."""


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
        cuda_graph: bool | None = None,
        strength: Strength = "auto",
    ) -> None:
        """Put the network on its device.

        Args:
            model: The network: a `savl.SAVL`, a model of another architecture (as `savl.load` returns it, or a
                ``spandrel.ImageModelDescriptor``), or another `savl.network.UpscalingNetwork`. It is not modified: a
                network in training mode, on another device or not in float32 is copied first. If it was compiled with
                ``torch.compile(model)`` or ``model.compile()``, its methods ``estimate`` and ``reconstruct``, which an
                upscaler calls, are compiled with the same options at their first call. Tiles have up to nine shapes;
                ``dynamic=True`` compiles once for all of them. `DataParallel`, `DistributedDataParallel` and
                `AveragedModel` are removed, because an upscaler computes on one device.
            tile: Side of the tiles in LR pixels, rounded up to a multiple of the attention window. None chooses it by
                the free memory of the device, 0 does not tile. With None, a network that spandrel discourages from
                tiling computes the whole image at once if its features fit into half of the free memory.
            tile_pad: Context around each tile in LR pixels, rounded up to the same multiple.
            device: Device to compute on; None selects CUDA if available, else MPS, else the CPU.
            dtype: torch.float32 (default) or torch.bfloat16, which computes the network under autocast and is faster on
                hardware that supports it. Some architectures compute in float32 only. The degradation field, severity
                and strength are always computed in float32. Results of savl-tiny were measured to be within one 8-bit
                level of those in float32.
            cuda_graph: Record the network's pass over a tile as a CUDA graph, and replay it for tiles of the same
                shape. Results are bitwise equal, and the CPU no longer launches every kernel.

                None decides automatically: on CUDA, if several tiles of an image share a shape, from the second of
                them on. This takes no additional passes. If the network cannot be recorded, or memory does not suffice
                for graphs, tiles are computed without them; `graphs_report` then has the reason. A compiled network is
                not recorded.

                True records every shape, also of images that are not tiled, and raises an error if that is impossible.
                The first tile of a shape takes three additional passes, so this pays off for many tiles or images. With
                ``tile=None``, the side chosen at the first call is kept for later calls, and a side that ran out of
                memory is not tried again. False never records.

                Graphs for up to `savl.inference.graphs.MAX_GRAPHS` shapes are kept. They share the memory that the
                largest one needs, plus one output tile each, and keep it between calls. Therefore tiles keep their
                different shapes: padding all of them to one shape would save no memory, and would change results at the
                edges of the image.

                Weights changed in place take effect at the next tile. Graphs are recorded anew at the next image after
                a change of the fused kernels or of torch's precision settings, and after the model was moved or given
                other tensors. Threads that share the Upscaler replay one at a time. Python code of the network, such as
                hooks of its modules, does not run during a replay.
            strength: How strongly images are restored, unless a call says otherwise. "auto": the strength that
                the network has learned for each pixel, or 1 if it has learned none. A number from 0 to 1 scales the
                difference from bicubic interpolation: 0 is bicubic interpolation, 1 the network's full restoration.

        Raises:
            TypeError: ``model`` is not such a network, ``tile`` or ``tile_pad`` is not an int, ``cuda_graph`` is
                neither a bool nor None, or ``strength`` is neither a number nor "auto".
            ValueError: ``tile`` or ``tile_pad`` is negative; or the dtype is not one of the two (float16 is refused
                because networks of the HAT family overflow in it), or the architecture does not support bfloat16; or
                ``cuda_graph`` is set without CUDA; or ``strength`` is not in [0, 1]; or ``model`` is a model of
                spandrel for another purpose, such as inpainting.
        """
        unwrapped = as_network(model)
        if unwrapped is None:
            raise TypeError(
                "model must be a savl.SAVL or another network that savl.load gives, also compiled or in DataParallel, "
                f"or a spandrel.ImageModelDescriptor, got {type(model).__name__}"
            )
        for name, pixels in (("tile", 0 if tile is None else tile), ("tile_pad", tile_pad)):
            if not isinstance(pixels, int) or isinstance(pixels, bool):
                raise TypeError(f"{name} must be an int (LR pixels), got {type(pixels).__name__} {pixels!r}")
            if pixels < 0:
                raise ValueError(f"{name} must be >= 0 LR pixels, got {pixels}")
        if not isinstance(cuda_graph, bool | None):
            raise TypeError(f"cuda_graph must be a bool or None, got {type(cuda_graph).__name__} {cuda_graph!r}")
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
        if self.dtype not in network.dtypes:
            accepted = " or ".join(str(each).removeprefix("torch.") for each in network.dtypes)
            raise ValueError(
                f"dtype must be {accepted} for this model, got {str(self.dtype).removeprefix('torch.')}: spandrel "
                "states that its architecture does not support it"
            )
        if needs_copy(network, self.device):
            network = copy.deepcopy(network).to(self.device, torch.float32).eval()
        self.model = network
        self.scale = network.scale
        self.tile_pad = round_up(tile_pad, network.size_multiple)
        self.tile = tile if not tile else round_up(tile, network.size_multiple)
        self.compiled_parts: Parts | None = None
        if unwrapped.compile is not None:
            self.compiled_parts = unwrapped.compile(network.estimate), unwrapped.compile(network.reconstruct)
        self.graphs: GraphCache | None = None
        self.automatic_graphs: AutomaticGraphs | None = None
        if cuda_graph or (cuda_graph is None and self.device.type == "cuda" and self.compiled_parts is None):
            self.graphs = GraphCache(CudaCapture(self.device))
        if cuda_graph is None and self.graphs is not None:
            self.automatic_graphs = AutomaticGraphs(trusted=isinstance(network, SAVL))
        self._accelerated: tuple[UpscalingNetwork, AccelerationReport | None] | None = None
        self._accelerating = threading.Lock()
        self._measured_bytes: int | None = None
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
            lr: ``(B, 3, h, w)`` floating in [0, 1]. A network of gray images processes each channel by itself.
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
        gray = self.model.image_channels == 1 and bool((lr[:, :1] == lr).all())
        image = lr[:, :1] if gray else lr
        with self._current_device(), fused_by_default():
            core = self._core_side(image)
            core = min(core, self._largest_cores.get(lr.shape[0], core))
            run = Run(self._computation(), image, split(whole(lr), core), chosen, on_tile)
            run.measure_maps()
            sr = run.interpolate() if chosen == 0 else run.assemble(whole(lr), core, run.count)
        if self.graphs is not None and self.automatic_graphs is None and run.largest_core is not None:
            self._largest_cores[lr.shape[0]] = run.largest_core
        if self.model.keeps_flat_areas:
            restore_flat_areas(sr, image.to("cpu", torch.float32))
        sr.clamp_(0.0, 1.0)
        if gray:
            sr = sr.expand(-1, 3, -1, -1).contiguous()
        ones = torch.ones(lr.shape[0], *lr.shape[-2:])
        severity, applied = (ones if each is None else each for each in (run.severity, run.strength))
        return Upscaled(sr, severity, applied)

    @property
    def has_field(self) -> bool:
        """Whether the network infers a degradation field. Without one, the severity is 1 everywhere."""
        return self.model.has_field

    @property
    def acceleration(self) -> AccelerationReport | None:
        """Report of `savl.accelerate` on the network, after the first image for which the fused kernels were used.

        None before it, for a `savl.SAVL`, which needs no acceleration, and for a compiled network, which is used as it
        is.
        """
        return None if self._accelerated is None else self._accelerated[1]

    @property
    def graphs_report(self) -> str:
        """One line that says whether tiles are computed by CUDA graphs, and if not, why."""
        if self.graphs is None:
            return "CUDA graphs: not used"
        if self.automatic_graphs is not None and self.automatic_graphs.reason is not None:
            return f"CUDA graphs: not used, {self.automatic_graphs.reason}"
        if self.automatic_graphs is not None and has_hooks(self.model):
            return "CUDA graphs: not used while modules of the network have hooks, which a replay would not call"
        which = "all tiles" if self.automatic_graphs is None else "tiles whose shape occurs several times in an image"
        return f"CUDA graphs: for {which}; {len(self.graphs)} shapes recorded"

    def _computation(self) -> Computation:
        """Return how tiles are computed: by the accelerated network where the fused kernels are used."""
        network = self.model
        if not isinstance(network, SAVL) and self.compiled_parts is None and uses_fused_attention(self.device):
            with self._accelerating:
                if self._accelerated is None:
                    self._accelerated = accelerated(network)
            network = self._accelerated[0]
        parts: Parts = self.compiled_parts or (network.estimate, network.reconstruct)
        return Computation(network, *parts, self.device, self.dtype, self.tile_pad, self.graphs, self.automatic_graphs)

    def _current_device(self) -> AbstractContextManager[object]:
        """Make the device current: some libraries launch kernels there, whatever the device of their tensors."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _core_side(self, lr: Tensor) -> int:
        height, width = lr.shape[-2:]
        if self.tile == 0:
            return max(height, width)
        if self.tile is not None:
            return self.tile
        batch = max(lr.shape[0], 1)
        if not isinstance(self.model, SAVL) and height * width <= LEAST_MEASURED_TILE**2:
            return max(height, width)
        if self.model.prefers_whole_images:
            needed = batch * height * width * self._bytes_per_pixel()
            if needed <= memory_budget(self.device, capped=False):
                return max(height, width)
        side = self._default_tile(batch)
        if height * width <= side * side:
            return max(height, width)
        return max(side - 2 * self.tile_pad, 4 * self.model.size_multiple)

    def _default_tile(self, batch: int) -> int:
        """Return the side of tiles chosen by free memory.

        While there are CUDA graphs the first choice is kept, because graphs take memory themselves and fit one shape
        each.
        """
        least = 0 if isinstance(self.model, SAVL) else LEAST_MEASURED_TILE

        def choose() -> int:
            return default_tile(self._bytes_per_pixel(), self.model.size_multiple, self.device, batch, least=least)

        if self.graphs is None:
            return choose()
        if self.automatic_graphs is not None and len(self.graphs) == 0:
            self._default_tiles.pop(batch, None)
        side = self._default_tiles.get(batch)
        return self._default_tiles.setdefault(batch, choose()) if side is None else side

    def _bytes_per_pixel(self) -> int:
        """Return the estimated memory of the network's features per LR pixel: by its settings, or measured once."""
        if isinstance(self.model, SAVL):
            return bytes_per_pixel(self.model.config)
        if self._measured_bytes is None:
            self._measured_bytes = measured_bytes_per_pixel(self.model)
        return self._measured_bytes


def restore_flat_areas(sr: torch.Tensor, lr: torch.Tensor) -> None:
    """Set flat areas of the upscaled image to their exact colour, in place.

    A network reproduces a flat area only within one or two 8-bit levels, and less exactly at the border of the image,
    where its convolutions see zeros. Overexposed skies and white paper would become slightly gray. A flat area contains
    nothing but its colour, so its pixels are copied from the input; all other pixels keep the network's output.

    Args:
        sr: ``(B, C, scale·h, scale·w)`` contiguous; modified in place.
        lr: ``(B, C, h, w)``, the image that was upscaled.
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
