"""What OmniSR and FDAT have beside savl's ops: attention between channels and depthwise convolutions, both by torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def over_channels_last(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a module for ``(B, C, H, W)`` to features ``(B, H, W, C)``, without a copy.

    PyTorch's depthwise convolution is several times faster with channels-last inputs than with contiguous ones, and
    returns its result in the same layout.
    """
    out: Tensor = module(x.permute(0, 3, 1, 2))
    return out.permute(0, 2, 3, 1)


def channel_attention(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute attention over channels, and apply a linear layer.

    The logits are the cosine similarities of the channels of ``q`` and ``k``, computed over the pixels. The linear
    layer is multiplied into the attention matrix, so that ``v`` is read only once.

    Args:
        q: ``(n, heads, pixels, d)``.
        k: ``(n, heads, pixels, d)``.
        v: ``(n, pixels, C)`` with C = heads × d.
        temperature: Factor of the cosines, ``(heads, 1, 1)``.
        weight: ``(O, C)``, weight of the layer.
        bias: ``(O,)``, its bias.

    Returns:
        ``(n, pixels, O)``.
    """
    if q.dtype == torch.float16:  # its range is too small for sums over pixels
        cosines = F.normalize(q, dim=-2).mT @ F.normalize(k, dim=-2)
    else:  # torch is slow at norms over rows; the smallest norm is that of F.normalize
        inverse_q, inverse_k = (each.square().sum(-2).clamp_min(1e-24).rsqrt() for each in (q, k))
        cosines = q.mT @ k * inverse_q[..., :, None] * inverse_k[..., None, :]
    attention = (cosines * temperature).softmax(dim=-1)
    folded = torch.einsum("nhde,ohd->nheo", attention, weight.unflatten(1, q.shape[1::2])).flatten(1, 2)
    return v @ folded if bias is None else torch.baddbmm(bias, v, folded)
