"""Folders of images as plain 8-bit RGB: what training and evaluation read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from savl.images.format import BMP, FORMATS, format_of_suffix
from savl.images.read import read_image

# BMP because well-known data sets are stored so.
_FORMATS = (*FORMATS, BMP)
_TITLES = ", ".join(image_format.title for image_format in _FORMATS)


def find_images(folders: Iterable[str | Path], *, argument: str = "data.hr") -> list[Path]:
    """All image files under the folders, sorted; hidden files and folders are left out.

    What lies in several of the folders, one of them within another, is there once.

    Args:
        folders: Searched recursively.
        argument: What the caller calls them, for the messages.

    Raises:
        ValueError: No folder given, one does not exist, or there is no image.
    """
    roots = [Path(folder) for folder in folders]
    if not roots:
        raise ValueError(f"{argument}: no folder of images was given (savl train --hr FOLDER names one)")
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"{argument}: {root} is not a folder")
    paths = sorted(path for root in roots for path in root.rglob("*") if _is_image(path.relative_to(root), path))
    # By the place of the name, not of the file: links of two names to one file are two images.
    paths = list({path.parent.resolve() / path.name: path for path in reversed(paths)}.values())[::-1]
    if not paths:
        raise ValueError(f"{argument}: no images ({_TITLES}) in {', '.join(str(root) for root in roots)}")
    return paths


def _is_image(below: Path, path: Path) -> bool:
    hidden = any(part.startswith(".") for part in below.parts)  # thumbnails and macOS's companions of real images
    return not hidden and format_of_suffix(path, _FORMATS) is not None and path.is_file()


def decode_rgb(path: Path) -> NDArray[np.uint8]:
    """Decode an image to ``(H, W, 3)`` uint8: upright, gray repeated, transparency dropped.

    Raises:
        ImageFileError: The file cannot be read; the message names it.
    """
    pixels = read_image(path).pixels
    if pixels.dtype == np.uint16:
        pixels = np.rint(pixels / 257).astype(np.uint8)
    colour = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, axis=2)
    return np.ascontiguousarray(colour, dtype=np.uint8)


def read_rgb(path: Path) -> Tensor:
    """Decode an image to ``(3, H, W)`` float32 in [0, 1], as `decode_rgb` does.

    Raises:
        ImageFileError: The file cannot be read; the message names it.
    """
    pixels = np.ascontiguousarray(decode_rgb(path).transpose(2, 0, 1))
    return torch.from_numpy(pixels).float() / 255
