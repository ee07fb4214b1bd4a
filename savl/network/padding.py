"""Reflect padding that survives images smaller than the padding."""

from __future__ import annotations

import torch
from torch import Tensor


def reflect_pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Extend an image to the right and downwards by mirror images of itself.

    Where `torch.nn.functional.pad` would refuse because the padding reaches past the image, the reflection goes back
    and forth; a side of one pixel is repeated.

    Args:
        image: ``(..., H, W)``, H and W at least 1.
        multiple: In pixels, at least 1.

    Returns:
        ``(..., H', W')`` with H' and W' the next multiples; the image itself where nothing is missing.

    Raises:
        ValueError: ``image`` has no pixel, or ``multiple`` < 1.
    """
    if image.dim() < 2 or 0 in image.shape[-2:]:
        raise ValueError(f"image must have shape (..., H, W) with H and W at least 1, got {tuple(image.shape)}")
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1 pixel, got {multiple}")
    for dim in (-2, -1):
        length = image.shape[dim]
        target = -(-length // multiple) * multiple
        if target != length:
            image = image.index_select(dim, _reflected_index(length, target, image.device))
    return image


def _reflected_index(length: int, target: int, device: torch.device) -> Tensor:
    position = torch.arange(target, device=device)
    if length == 1:
        return torch.zeros_like(position)
    period = 2 * (length - 1)
    position = position % period
    return torch.minimum(position, period - position)
