"""Find and read images in folders as 8-bit RGB, for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from savl.images.format import BMP, FORMATS, format_of_suffix
from savl.images.read import read_image

# BMP is included because well-known data sets use it.
_FORMATS = (*FORMATS, BMP)
_TITLES = ", ".join(image_format.title for image_format in _FORMATS)


def find_images(folders: Iterable[str | Path], *, argument: str = "data.hr") -> list[Path]:
    """Return all image files in folders and their subfolders, sorted, without hidden files and folders.

    A file that is found through several of the folders is returned once.

    Args:
        folders: Folders to search.
        argument: The caller's name for `folders`, used in messages.

    Raises:
        ValueError: No folder is given, one does not exist, or there are no images.
    """
    roots = [Path(folder) for folder in folders]
    if not roots:
        raise ValueError(f"{argument}: no folder of images was given (savl train --hr FOLDER names one)")
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"{argument}: {root} is not a folder")
    paths = sorted(path for root in roots for path in root.rglob("*") if _is_image(path.relative_to(root), path))
    # Compare the paths without resolving links: two links to the same file count as two images.
    paths = list({path.parent.resolve() / path.name: path for path in reversed(paths)}.values())[::-1]
    if not paths:
        raise ValueError(f"{argument}: no images ({_TITLES}) in {', '.join(str(root) for root in roots)}")
    return paths


def _is_image(below: Path, path: Path) -> bool:
    hidden = any(part.startswith(".") for part in below.parts)  # thumbnails, and macOS's "._" files beside images
    return not hidden and format_of_suffix(path, _FORMATS) is not None and path.is_file()


def decode_rgb(path: Path) -> NDArray[np.uint8]:
    """Decode an image to ``(H, W, 3)`` uint8, upright. Gray is repeated to three channels, and alpha is dropped.

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
