"""Super-resolution and restoration models of other architectures, which the package spandrel builds from their weights.

spandrel (https://github.com/chaiNNer-org/spandrel) recognises more than forty architectures by the names and shapes of
their tensors. This module hands it tensors that savl has read, so that no code in a file is ever run, and wraps the
result as an `UpscalingNetwork`. spandrel is imported only when such a model is loaded or passed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from savl.bicubic import bicubic_upscale
from savl.network.estimator import DegradationField
from savl.network.layers import reflect_pad_to_size
from savl.network.savl import check_strength
from savl.network.upscaling import UpscalingNetwork, scale_difference

if TYPE_CHECKING:
    from types import ModuleType

INSTALL = 'pip install "savl[models]"'
"""The command that installs spandrel."""

PURPOSES = ("SR", "Restoration")
"""The purposes of models, in spandrel's words, that savl runs on images."""

# Attributes in which spandrel's networks store the sides of their attention windows.
_WINDOW_ATTRIBUTES = ("window_size", "split_size", "stripe_size", "ws")
# Networks whose inner levels have windows on reduced features, and the factor of the deepest level.
_REDUCTION_AT_WINDOWS = {"SCUNet": 8}
_LARGEST_MULTIPLE = 128
_SMALLEST_MULTIPLE = 8


class SpandrelUnavailable(ValueError):
    """spandrel is needed to load a file, and is not installed or does not import."""


class UnknownArchitecture(ValueError):
    """spandrel does not recognise the tensors of a file."""


@dataclass(frozen=True)
class ModelTraits:
    """What spandrel states about a model.

    Attributes:
        architecture: Name of the architecture, such as "ESRGAN" or "SwinIR".
        purpose: "SR" or "Restoration".
        tags: Size and settings in spandrel's words, such as "64nf".
        scale: Upscaling factor.
        channels: Channels of the images: 3 for RGB, 1 for gray.
        minimum_size: Minimum height and width of an image in pixels.
        multiple_of: Height and width must be multiples of this.
        square: Whether images must be square.
        tiling: "supported"; "discouraged" if tiles change the result; "internal" if the model makes tiles itself.
        supports_bfloat16: Whether the model computes correctly in bfloat16.
    """

    architecture: str
    purpose: str
    tags: tuple[str, ...]
    scale: int
    channels: int
    minimum_size: int
    multiple_of: int
    square: bool
    tiling: str
    supports_bfloat16: bool

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the smallest size of at least ``height`` × ``width`` pixels that satisfies the requirements."""
        at_least: Callable[..., Any] = torch.sym_max  # sizes are symbols in a program that `torch.export` makes
        multiple = self.multiple_of
        # Not -(-side // multiple): the division of ONNX rounds towards zero.
        sides = [(at_least(side, self.minimum_size) + multiple - 1) // multiple * multiple for side in (height, width)]
        return (at_least(*sides), at_least(*sides)) if self.square else (sides[0], sides[1])


class SpandrelModel(UpscalingNetwork):
    """A model of another architecture, with the interface of a network of savl.

    It pads images to the sizes that the model requires and crops the result. The result is in [0, 1]. A model of gray
    images processes each colour channel by itself.

    Attributes:
        model: The network of spandrel, an `nn.Module`.
        traits: What spandrel states about it.
    """

    def __init__(self, descriptor: Any) -> None:
        """Wrap a model.

        Args:
            descriptor: A ``spandrel.ImageModelDescriptor``. Its network is used, not copied, and is put into evaluation
                mode.

        Raises:
            ValueError: The model is none for super-resolution or restoration, or does not map RGB images to RGB images
                or gray images to gray images.
        """
        super().__init__()
        self.traits = _traits(descriptor)
        self.model: nn.Module = descriptor.model
        self._call: Callable[[nn.Module, Tensor], Tensor] = descriptor._call_fn
        self._window_multiple = _window_multiple(self.model, self.traits)
        self.eval()

    @property
    def scale(self) -> int:
        """Upscaling factor."""
        return self.traits.scale

    @property
    def size_multiple(self) -> int:
        """Least common multiple of the required multiple of sizes and the sides of the attention windows."""
        return self._window_multiple

    @property
    def image_channels(self) -> int:
        """3 for a model of RGB images, 1 for a model of gray images."""
        return self.traits.channels

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes in which the model may compute."""
        return (torch.float32, torch.bfloat16) if self.traits.supports_bfloat16 else (torch.float32,)

    @property
    def prefers_whole_images(self) -> bool:
        """Whether spandrel discourages tiles, or says that the model makes tiles itself."""
        return self.traits.tiling != "supported"

    @property
    def keeps_flat_areas(self) -> bool:
        """True for super-resolution. A restoration model may change colours, for example brighten a dark image."""
        return self.traits.purpose == "SR"

    @overload
    def forward(
        self, lr: Tensor, return_field: Literal[False] = False, strength: float | Tensor | None = None
    ) -> Tensor: ...

    @overload
    def forward(
        self, lr: Tensor, return_field: Literal[True], strength: float | Tensor | None = None
    ) -> tuple[Tensor, None]: ...

    def forward(
        self, lr: Tensor, return_field: bool = False, strength: float | Tensor | None = None
    ) -> Tensor | tuple[Tensor, None]:
        """Upscale a batch of images.

        Args:
            lr: ``(B, 3, h, w)`` in [0, 1], dtype of the network, any h and w from 1 pixel up. A model of gray images
                also accepts ``(B, 1, h, w)``.
            return_field: Return a pair, as `savl.SAVL` does, whose second element is None: there is no field.
            strength: Factor on the difference from bicubic interpolation, as for `reconstruct`.

        Returns:
            ``(B, C, scale·h, scale·w)`` in [0, 1], C as in ``lr``.

        Raises:
            TypeError: ``lr`` is not a floating tensor, or ``strength`` is of another type.
            ValueError: ``lr`` has another shape, or ``strength`` is out of range.
        """
        sr = self.reconstruct(lr, None, strength)
        return (sr, None) if return_field else sr

    def reconstruct(
        self, lr: Tensor, field: DegradationField | None = None, strength: float | Tensor | None = None
    ) -> Tensor:
        """Upscale a batch of images, as `forward` does.

        Args:
            lr: As for `forward`.
            field: None, because the model has no degradation field.
            strength: A number in [0, 1] or a floating tensor ``(B, h, w)``: the factor on the difference from bicubic
                interpolation. None is 1.
        """
        self._check(lr)
        if field is not None:
            raise ValueError(f"field must be None, because {self.traits.architecture} has no degradation field")
        if strength is not None:
            check_strength(lr, strength)
        batch, channels, height, width = lr.shape
        images = lr.reshape(-1, 1, height, width) if self.traits.channels == 1 else lr
        if torch.compiler.is_exporting():
            sr = self._run(images)  # the number of images is free, so that they cannot be separated
        else:
            # spandrel promises the result for batches of one image only.
            sr = torch.cat([self._run(image) for image in images.split(1)]) if batch else self._empty(images)
        sr = sr.reshape(batch, channels, self.scale * height, self.scale * width)
        if strength is None or (not isinstance(strength, Tensor) and strength == 1):
            return sr
        bicubic = bicubic_upscale(lr, self.scale)
        return scale_difference(bicubic, sr - bicubic, strength)

    def _check(self, lr: object) -> None:
        accepted = (1, 3) if self.traits.channels == 1 else (3,)
        shape = f"(B, {' or '.join(map(str, accepted))}, h, w)"
        if not isinstance(lr, Tensor) or not lr.is_floating_point():
            came = lr.dtype if isinstance(lr, Tensor) else type(lr).__name__
            raise TypeError(f"lr must be a floating torch.Tensor {shape} in [0, 1], got {came}")
        if lr.dim() != 4 or lr.shape[1] not in accepted or 0 in lr.shape[2:]:
            raise ValueError(f"lr must have shape {shape} with h and w at least 1 pixel, got {tuple(lr.shape)}")

    def _run(self, image: Tensor) -> Tensor:
        """Upscale one image ``(1, channels, h, w)``: pad it, run the model, and crop the result."""
        height, width = (self.scale * side for side in image.shape[-2:])
        padded = reflect_pad_to_size(image, *self.traits.padded_size(*image.shape[-2:])).contiguous()
        sr = self._call(self.model, padded)
        if not isinstance(sr, Tensor) or sr.dim() != 4 or sr.shape[-2] < height or sr.shape[-1] < width:
            came = tuple(sr.shape) if isinstance(sr, Tensor) else type(sr).__name__
            raise RuntimeError(
                f"{self.traits.architecture} must return an image of at least {height}x{width} pixels for "
                f"{image.shape[-2]}x{image.shape[-1]}, got {came}"
            )
        return sr[..., :height, :width].clamp(0.0, 1.0)

    def _empty(self, images: Tensor) -> Tensor:
        height, width = (self.scale * side for side in images.shape[-2:])
        return images.new_empty(0, images.shape[1], height, width)

    def extra_repr(self) -> str:
        """Describe the model in ``repr``."""
        return f"{self.traits.architecture}, x{self.traits.scale}, {', '.join(self.traits.tags)}"


def import_spandrel() -> ModuleType:
    """Import spandrel.

    Raises:
        SpandrelUnavailable: spandrel or a package that it needs is not installed, or does not import. The message says
            what to do.
    """
    try:
        module = _import_with_operators()
    except ModuleNotFoundError as error:
        raise SpandrelUnavailable(f"models of other architectures need {error.name}: {INSTALL}") from error
    except Exception as error:  # a torchvision that does not match torch fails with RuntimeError, OSError and others
        reason = str(error).strip().partition("\n")[0]
        hint = f"; install the torchvision that belongs to torch {torch.__version__}" if "torchvision" in reason else ""
        raise SpandrelUnavailable(
            f"models of other architectures need spandrel, which does not import here "
            f"({type(error).__name__}: {reason}){hint}"
        ) from error
    return module


def _import_with_operators() -> ModuleType:
    """Import spandrel, also beside a torchvision whose compiled library does not load.

    Such a torchvision was made for another build of torch, for example one with CUDA. Its Python code, of which the
    models for upscaling need little, then fails to import because two operators are not declared. They are declared
    here, without kernels, and the import is repeated.
    """
    try:
        return import_module("spandrel")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "spandrel")]:
        del sys.modules[name]  # imported in part
    return import_module("spandrel")


def wrap_descriptor(model: object) -> SpandrelModel | None:
    """Return a model of spandrel as a network that `savl.Upscaler` can run.

    Args:
        model: Any object.

    Returns:
        None if ``model`` is no descriptor of spandrel.

    Raises:
        ValueError: It is a descriptor of a model that savl cannot run; see `SpandrelModel`.
    """
    spandrel = sys.modules.get("spandrel")  # without it, no object can be one of its descriptors
    if spandrel is None or not isinstance(model, getattr(spandrel, "ModelBase", ())):
        return None
    return SpandrelModel(model)


def load_with_spandrel(state_dicts: Iterable[Mapping[str, Tensor]]) -> SpandrelModel:
    """Build a model of another architecture from its weights.

    Args:
        state_dicts: State dicts of a file. The first one that spandrel recognises is used.

    Returns:
        The model in evaluation mode, float32, on the CPU.

    Raises:
        SpandrelUnavailable: spandrel is not installed.
        UnknownArchitecture: spandrel recognises none of the state dicts.
        ValueError: It recognises one, but cannot load it; or the model is of a kind that savl does not run.
    """
    spandrel = import_spandrel()
    for tensors in state_dicts:
        for names in _spellings(tensors):
            for support in spandrel.MAIN_REGISTRY.architectures("detection"):
                architecture = support.architecture
                if _is_detected(support, names):
                    return SpandrelModel(_build(architecture, names).float())
    raise UnknownArchitecture("spandrel does not recognise its tensors")


def _is_detected(support: Any, tensors: dict[str, Tensor]) -> bool:
    try:
        return bool(support.detect(tensors))
    except Exception:  # the tensors are of another network, and may have any shape
        return False


def _build(architecture: Any, tensors: dict[str, Tensor]) -> Any:
    try:
        # A copy, because some architectures add and remove entries.
        return architecture.load(dict(tensors))
    except Exception as error:  # shapes and names that do not fit raise errors of every kind
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 200 else f"{reason[:200]} ..."
        raise ValueError(
            f"has tensors of the architecture {architecture.name}, but they do not fit it "
            f"({type(error).__name__}{': ' if reason else ''}{reason})"
        ) from error


def _spellings(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield a state dict as it is, then without the prefixes that all its names share, one more component each time."""
    names = dict(tensors)
    while names:
        yield names
        first = {name.partition(".")[0] for name in names}
        if len(first) > 1 or not all("." in name for name in names):
            return
        names = {name.partition(".")[2]: tensor for name, tensor in names.items()}


def _traits(descriptor: Any) -> ModelTraits:
    """Return what spandrel states about a model.

    Raises:
        ValueError: savl cannot run the model.
    """
    architecture = str(descriptor.architecture.name)
    accepted = "savl runs models for super-resolution and restoration with 3 (RGB) or 1 (gray) channels"
    if descriptor.purpose not in PURPOSES or not hasattr(descriptor, "_call_fn"):
        raise ValueError(f"is a model of the architecture {architecture} for {descriptor.purpose}; {accepted}")
    channels = (descriptor.input_channels, descriptor.output_channels)
    if channels not in ((3, 3), (1, 1)):
        raise ValueError(
            f"is a model of the architecture {architecture} with {channels[0]} input channels and {channels[1]} "
            f"output channels; {accepted}"
        )
    scale = descriptor.scale
    if int(scale) != scale or scale < 1:
        raise ValueError(f"is a model of the architecture {architecture} with scale {scale}; a whole number is needed")
    sizes = descriptor.size_requirements
    return ModelTraits(
        architecture=architecture,
        purpose=str(descriptor.purpose),
        tags=tuple(map(str, descriptor.tags)),
        scale=int(scale),
        channels=int(channels[0]),
        minimum_size=max(int(sizes.minimum), 1),
        multiple_of=int(sizes.multiple_of),
        square=bool(sizes.square),
        tiling=str(descriptor.tiling.name).lower(),
        supports_bfloat16=bool(descriptor.supports_bfloat16),
    )


def _window_multiple(model: nn.Module, traits: ModelTraits) -> int:
    """Return the multiple at which tiles begin, from the required multiple and the windows in the network.

    With windows whose common multiple is above 128 pixels, such as the stripes of GRL, it is that of the required
    multiple and the largest window up to 128: such a network has no position that is the same for all of its windows.
    """
    factor = _REDUCTION_AT_WINDOWS.get(traits.architecture, 1) * _whole_number(getattr(model, "start_unshuffle", 1))
    windows = {factor * side for side in _window_sides(model)}
    base = math.lcm(_SMALLEST_MULTIPLE, traits.multiple_of)
    multiple = math.lcm(base, *windows)
    if multiple <= _LARGEST_MULTIPLE:
        return multiple
    return max([base, *(each for side in windows if (each := math.lcm(base, side)) <= _LARGEST_MULTIPLE)])


def _window_sides(model: nn.Module) -> Iterator[int]:
    for module in model.modules():
        for name in _WINDOW_ATTRIBUTES:
            value = vars(module).get(name)
            sides = value if isinstance(value, list | tuple) else [value]
            yield from (side for side in sides if isinstance(side, int) and not isinstance(side, bool) and side > 0)


def _whole_number(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 1
