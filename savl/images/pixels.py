"""Convert the images that `savl.upscale` accepts (PIL images, numpy arrays, torch tensors) to one layout."""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray

from savl.images.errors import UnreadableImage

_ACCEPTED = (
    "a path, the bytes of an image file or a binary file object, a PIL image, a numpy array (H, W) or (H, W, 1 to 4 "
    "channels) of uint8, uint16 or floats in [0, 1], or a torch tensor (1 to 4 channels, H, W) of uint8, uint16 or "
    "floats in [0, 1]"
)
_PIL_DIRECT = ("L", "LA", "RGB", "RGBA")
# Lossless conversions by Pillow: mode → mode that represents the same image.
_PIL_CONVERTED = {"1": "L", "PA": "RGBA", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB", "YCbCr": "RGB"}
_TENSOR_DTYPES = (torch.uint8, torch.uint16, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PIL_HINTS = {
    "CMYK": "give the file by its path, which applies its colour profile, or convert it to RGB",
    "LAB": "give the file by its path, which becomes sRGB",
    "I": "32-bit integers do not say their white; give np.asarray(image) as uint8 or uint16",
    "F": "floats do not say their white; give np.asarray(image) scaled to [0, 1]",
}
_ORIENTATION_TAG = 0x0112
# Bicubic resizing and conversions of floats produce values this far outside [0, 1]; they are clamped, not refused.
_SLACK = 1e-3


def as_pixels(image: object) -> NDArray[Any]:
    """Convert a PIL image, numpy array or torch tensor to samples (H, W, C), C from 1 to 4.

    C is 1 for gray, 2 for gray and alpha, 3 for RGB, 4 for RGBA. Colour is not premultiplied. For a PIL image, the
    current frame is used and its EXIF orientation is applied; a palette and a transparent colour become RGB and alpha.

    Raises:
        TypeError: `image` has another type, or a dtype or PIL mode that is not accepted.
        ValueError: The shape is not accepted, float values are outside [0, 1], or a PIL image is closed.
        UnreadableImage: The file of a PIL image cannot be decoded.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, torch.Tensor):
        return _from_tensor(image)
    # If Pillow is not loaded, the image cannot be one of its images.
    pil = sys.modules.get("PIL.Image")
    if pil is not None and isinstance(image, pil.Image):
        return _from_pil(image)
    raise TypeError(f"image: {type(image).__name__}; accepted is {_ACCEPTED}")


def _from_array(array: NDArray[Any]) -> NDArray[Any]:
    shape = array.shape
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4):
        hint = "; move the channels last" if array.ndim == 3 and array.shape[0] in (1, 2, 3, 4) else ""
        raise ValueError(f"image: array of shape {shape}{hint}; accepted is {_ACCEPTED}")
    if 0 in shape:
        raise ValueError(f"image: array of shape {shape} has no pixels")
    kind, bytes_each = array.dtype.kind, array.dtype.itemsize
    if kind == "f":
        check_range("image", float(np.min(array)), float(np.max(array)))
    elif kind != "u" or bytes_each > 2:
        raise TypeError(f"image: dtype {array.dtype}; accepted is {_ACCEPTED}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _from_tensor(tensor: torch.Tensor) -> NDArray[Any]:
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "meta tensor, which holds no values" if tensor.is_meta else f"tensor of layout {tensor.layout}"
        raise TypeError(f"image: {kind}; accepted is {_ACCEPTED}")
    shape = tuple(tensor.shape)
    if tensor.ndim != 3 or shape[0] not in (1, 2, 3, 4):
        hint = "; for batches call the model itself" if tensor.ndim == 4 else ""
        if tensor.ndim == 3 and shape[2] in (1, 2, 3, 4):
            hint = "; move the channels first"
        raise ValueError(f"image: tensor of shape {shape}{hint}; accepted is {_ACCEPTED}")
    if tensor.dtype not in _TENSOR_DTYPES:
        raise TypeError(f"image: dtype {str(tensor.dtype).removeprefix('torch.')}; accepted is {_ACCEPTED}")
    tensor = tensor.detach().cpu().permute(1, 2, 0)
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()  # numpy has no bfloat16
    return _from_array(tensor.numpy())


def _from_pil(image: Any) -> NDArray[Any]:
    """Return the samples of the current frame, upright."""
    coding = _png_coding(image)
    image = _upright(_loaded(image))
    mode, transparency = image.mode, image.info.get("transparency")
    if mode == "P":
        return _from_array(_palette_colours(image)[np.asarray(image)])
    if mode.startswith("I;16"):
        gray = np.asarray(image)
        if isinstance(transparency, int):  # one gray value that is fully transparent
            gray = np.stack([gray, np.where(gray == transparency, 0, 65535).astype(gray.dtype)], axis=2)
        return _from_array(gray)
    if mode == "L" and isinstance(transparency, int):
        gray = np.asarray(image)
        key = _scaled_transparent_value(transparency, gray, coding)
        return _from_array(np.stack([gray, np.where(gray == key, 0, 255).astype(np.uint8)], axis=2))
    if mode == "1" and isinstance(transparency, int):
        image = image.convert("LA")
    elif mode == "RGB" and _is_colour(transparency):
        rgb = np.asarray(image)
        # Pillow keeps only the upper bytes of 16-bit samples, but both bytes of the transparent colour.
        deep = coding == "RGB;16B" or (coding == "" and max(transparency) > 255)
        is_key = (rgb == [part >> 8 if deep else part for part in transparency]).all(axis=2, keepdims=True)
        return _from_array(np.concatenate([rgb, np.where(is_key, 0, 255).astype(np.uint8)], axis=2))
    elif mode in _PIL_CONVERTED:
        image = image.convert(_PIL_CONVERTED[mode])
    elif mode not in _PIL_DIRECT:
        accepted = ", ".join([*_PIL_DIRECT, "P", *_PIL_CONVERTED, "I;16"])
        hint = _PIL_HINTS.get(mode, "convert it to RGB")
        raise TypeError(f"image: PIL mode {mode}; accepted modes are {accepted}. For {mode}: {hint}")
    return _from_array(np.asarray(image))


def _is_colour(value: object) -> TypeGuard[tuple[int, int, int]]:
    return isinstance(value, tuple) and len(value) == 3 and all(isinstance(part, int) for part in value)


def _png_coding(image: Any) -> str | None:
    """Return Pillow's name for the sample type of a PNG file; "" if it was loaded before, None for other images."""
    if image.format != "PNG":
        return None
    tiles = getattr(image, "tile", None)
    coding = tiles[0][-1] if tiles else ""
    return coding if isinstance(coding, str) else ""


def _scaled_transparent_value(key: int, gray: NDArray[Any], coding: str | None) -> int:
    """Scale the transparent gray value to 8 bits, because Pillow scales samples of 2 or 4 bits but not this value."""
    factor = {"L;2": 85, "L;4": 17}.get(coding or "", 1)
    if coding == "" and 0 < key < 16 and not (gray == key).any():
        # Decide by the samples: an 8-bit value that no sample has would make nothing transparent.
        steps = (step for step in (85, 17) if key * step <= 255 and not (gray % step).any())
        factor = next(steps, 1)
    return key * factor


def _palette_colours(image: Any) -> NDArray[np.uint8]:
    """Return the colours of a palette image, (256, 3), or (256, 4) if some may be transparent.

    Pillow's conversion fails if the transparent index is beyond the palette, as in many GIF files.
    """
    transparency = image.info.get("transparency")
    colours = np.full((256, 4), (0, 0, 0, 255), np.uint8)
    given = np.array(image.getpalette("RGBA") or [], np.uint8).reshape(-1, 4)[:256]
    colours[: len(given)] = given
    if isinstance(transparency, bytes):
        alphas = np.frombuffer(transparency[:256], np.uint8)
        colours[: len(alphas), 3] = alphas
    elif isinstance(transparency, int) and 0 <= transparency < 256:
        colours[transparency, 3] = 0
    elif not image.palette.mode.endswith("A"):
        return colours[:, :3]
    return colours


def _loaded(image: Any) -> Any:
    """Return the decoded image: Pillow opens files without reading their samples."""
    filename = getattr(image, "filename", "")
    try:
        if image.format == "TIFF" and filename:
            # Pillow maps uncompressed samples of a named file into memory, with the sides of the rotated image.
            image.filename = ""
        image.load()
    except OSError as error:
        raise UnreadableImage(filename or "<PIL image>", str(error)) from error
    except (ValueError, AssertionError, AttributeError) as error:  # raised for a closed file
        raise ValueError(f"image: the PIL image is closed, its samples cannot be read ({error})") from error
    finally:
        if filename:
            image.filename = filename
    return image


def _upright(image: Any) -> Any:
    """Return the image with its EXIF orientation applied, as it is for files read by path."""
    from PIL import ImageOps

    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block can fail in any way; it is then ignored
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def check_range(name: str, low: float, high: float) -> None:
    """Check that the floats of an image are in [0, 1], with a tolerance for resizing and rounding.

    Args:
        name: The caller's name for the image, used in the message.
        low: Lowest value; NaN if any value is NaN.
        high: Highest value; NaN if any value is NaN.

    Raises:
        ValueError: They are not; the message names the argument and the values.
    """
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # written so that NaN is refused, too
        raise ValueError(
            f"{name}: float values from {low:g} to {high:g}; floats must lie in [0, 1] "
            "(divide 8-bit values by 255, or pass them as uint8)"
        )
