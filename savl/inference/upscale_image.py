"""`savl.upscale`: upscale one image and return an array."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from savl.bicubic import bicubic_upscale
from savl.images.pixels import as_pixels
from savl.inference.device import MEASURED_IN_BFLOAT16, checked_device, checked_dtype, is_faster_in_bfloat16
from savl.inference.enlarge import (
    ByBitDepth,
    ImageUpscaler,
    OnTile,
    Strength,
    UpscalerOutput,
    check_scale,
    check_strength,
    enlarge,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import TypeIs

    from savl.images.read import ImageFile, ImageSource

    Picture = ImageSource | Image | NDArray[Any] | torch.Tensor
    Model = str | os.PathLike[str] | torch.nn.Module | ImageUpscaler


def upscale(
    image: Picture,
    *,
    model: Model = "savl-tiny",
    scale: float | None = None,
    strength: Strength | None = None,
    page: int | None = None,
    tile: int | None = None,
    tile_pad: int = 32,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    on_tile: OnTile | None = None,
) -> NDArray[Any]:
    """Upscale one image.

    The fused kernels are used unless `savl.use_fused_kernels`, a setting of the model or ``SAVL_KERNELS`` says
    otherwise.

    Args:
        image: One of the following; alpha is not premultiplied:
            - an image file that `savl upscale` can read: its path, its content as bytes, or a binary file object, which
              is read to its end; EXIF orientation is applied, CMYK is converted to sRGB;
            - a PIL image, of which the current frame is used; EXIF orientation is applied, palettes and transparent
              colours are converted to RGB and alpha;
            - a numpy array (H, W) gray or (H, W, C), with C = 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA, of dtype uint8,
              uint16, or floating in [0, 1];
            - a torch tensor (C, H, W) of such a dtype.
        model: The name of shipped weights ("savl-tiny"), the path of a file that `savl.load` accepts, a loaded model
            (compiled or not; see `savl.Upscaler`), or an `Upscaler`. Pass a loaded model to upscale many images. With
            an `Upscaler`, leave out `tile`, `tile_pad`, `device` and `dtype`, because it has its own settings.
        scale: Output pixels per input pixel, any number above 0; None is that of the network.
        strength: How strongly the image is restored. "auto": the strength that the network has learned for each pixel,
            or 1 if it has learned none. A number from 0 to 1: 0 is bicubic interpolation, 1 the network's full
            restoration. None is "auto", or the strength of the `Upscaler` that is given as ``model``.
        page: Page of a file with several pages, counted from 1; None selects the first. Only for image files.
        tile: Side of the tiles in input pixels; None chooses it by the free memory, 0 does not tile.
        tile_pad: Context around each tile, in input pixels.
        device: "cpu", "cuda", "cuda:1" or "mps"; None or "auto" takes CUDA if available, else MPS, else the CPU.
        dtype: "float32" or "bfloat16", in which the network computes. None selects bfloat16 for an image with 8 bits
            per sample, on a CPU that is faster in it, if the model is the name of shipped weights that were measured to
            stay within one level of float32 ("savl-tiny"), and float32 otherwise.
        on_tile: Callback, called with (tiles done, number of tiles) after every tile.

    Returns:
        Array (round(H * scale), round(W * scale), C) with the dtype and channels of the input, without the last axis
        for a numpy array (H, W). For bfloat16 tensors the dtype is float32.

    Raises:
        TypeError, ValueError: An argument is not accepted; the message names it.
        ImageFileError: The file cannot be read; `savl.images.errors` has the subclasses.
    """
    if scale is not None:
        check_scale(scale)
    if is_image_source(image):
        pixels: NDArray[Any] = read_source(image, page, argument="image").pixels
    elif page is not None:
        raise ValueError(f"page: only image files have pages, the image is a {type(image).__name__}")
    else:
        pixels = as_pixels(image)
    upscaler = as_upscaler(model, strength=strength, tile=tile, tile_pad=tile_pad, device=device, dtype=dtype)
    enlarged = enlarge(pixels, upscaler, scale=scale, on_tile=on_tile).pixels
    return enlarged[:, :, 0] if isinstance(image, np.ndarray) and image.ndim == 2 else enlarged


def is_image_source(image: object) -> TypeIs[ImageSource]:
    """Return whether `image` stands for an image file: a path, bytes, or an object with a ``read`` method."""
    return isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview)) or callable(getattr(image, "read", None))


def read_source(source: ImageSource, page: int | None, *, argument: str) -> ImageFile:
    """Read an image file.

    Args:
        source: Its path, its content, or a binary file object.
        page: Page number, counted from 1; None selects the first page.
        argument: The caller's name for `source`, used in messages.

    Raises:
        TypeError, ValueError: An argument is not accepted; the message names it.
        ImageFileError: The file cannot be read.
    """
    from savl.images.read import read_image

    if isinstance(source, io.TextIOBase):
        raise TypeError(f"{argument}: a file object in text mode; open the file with mode 'rb'")
    if isinstance(source, (str, os.PathLike)) and "\0" in os.fsdecode(source):
        raise ValueError(f"{argument}: the path {os.fsdecode(source)!r} has a NUL character in it")
    return read_image(source, page=page)


def as_upscaler(
    model: Model,
    *,
    strength: Strength | None = None,
    tile: int | None = None,
    tile_pad: int = 32,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> ImageUpscaler:
    """Return the upscaler for the arguments of `upscale`: load weights, and choose device and dtype.

    A number as strength is accepted for any upscaler, because it only blends the result with bicubic interpolation.

    If `dtype` is None, the result is a `ByBitDepth` where bfloat16 is faster and accurate enough for 8 bits. This is
    known for some shipped weights only, so a model that the caller has loaded computes in float32.

    Raises:
        TypeError, ValueError: An argument is not accepted; the message names it.
        OSError: `model` is a path that cannot be read.
    """
    precision = None if dtype is None else checked_dtype(dtype)
    chosen_strength = None if strength is None else check_strength(strength)
    from savl.inference.network import as_network
    from savl.inference.upscaler import Upscaler
    from savl.weights import load
    from savl.weights.files import find_weights, shipped

    if not isinstance(model, (str, os.PathLike)) and as_network(model) is None:
        if not callable(model) or not hasattr(model, "scale"):
            raise TypeError(f"model: {type(model).__name__}; a name, a path, a model or an Upscaler is accepted")
        if (tile, tile_pad, device, dtype) != (None, 32, None, None):
            raise ValueError("tile, tile_pad, device and dtype belong to the Upscaler that was given as model")
        return model if chosen_strength is None else _WithStrength(model, chosen_strength)

    chosen = checked_device("auto" if device is None else str(device))
    measured = False
    if isinstance(model, (str, os.PathLike)):
        path = find_weights(model, "model")
        measured = path in [shipped().get(name) for name in MEASURED_IN_BFLOAT16]
        model = load(path)

    def computing_in(precision: torch.dtype | None) -> Upscaler:
        return Upscaler(
            cast("torch.nn.Module", model),
            tile=tile,
            tile_pad=tile_pad,
            device=chosen,
            dtype=precision,
            strength="auto" if chosen_strength is None else chosen_strength,
        )

    if precision is None and measured and is_faster_in_bfloat16(chosen):
        return ByBitDepth(eight_bit=computing_in(torch.bfloat16), other=computing_in(torch.float32))
    return computing_in(precision)


@dataclass(frozen=True)
class _WithStrength:
    """An upscaler that is called with a given strength."""

    upscaler: ImageUpscaler
    strength: Strength

    @property
    def has_field(self) -> bool:
        return bool(getattr(self.upscaler, "has_field", True))

    @property
    def scale(self) -> int:
        return self.upscaler.scale

    def __call__(self, lr: torch.Tensor, *, on_tile: OnTile | None = None) -> UpscalerOutput:
        from savl.inference.upscaler import Upscaled, Upscaler

        if isinstance(self.upscaler, Upscaler):
            return self.upscaler(lr, strength=self.strength, on_tile=on_tile)
        full = self.upscaler(lr, on_tile=on_tile)
        if self.strength == "auto":
            return full
        sr = torch.lerp(bicubic_upscale(lr, self.scale), full.sr, self.strength).clamp_(0.0, 1.0)
        return Upscaled(sr, full.severity, torch.full_like(full.severity, self.strength))
