"""The blocks of HAT: hybrid attention (HAB) and overlapping cross-attention (OCAB)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from savl import ops
from savl.accelerate import parts
from savl.accelerate.adapter import Adapter, Arguments, keep, register
from savl.ops import KernelSettings
from savl.ops.relative_position import relative_position_index


def _is_cab(module: object) -> bool:
    """Return whether a module is conv – GELU – conv – channel attention, as HAT's CAB."""
    cab = getattr(module, "cab", None)
    if not isinstance(cab, nn.Sequential) or len(cab) != 4:
        return False
    compress, act, expand, last = cab
    gate = getattr(last, "attention", None)
    if not (parts.is_convolution(compress) and parts.is_convolution(expand) and type(act) is nn.GELU):
        return False
    kinds = [nn.AdaptiveAvgPool2d, nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Sigmoid]
    if act.approximate != "none" or not isinstance(gate, nn.Sequential) or [type(each) for each in gate] != kinds:
        return False
    return parts.is_convolution(gate[1]) and gate[1].kernel_size == (1, 1) and gate[3].kernel_size == (1, 1)


def _apply_cab(
    x: Tensor, cab: nn.Sequential, norm: nn.LayerNorm | None, scale: float, residual: Tensor, kernels: KernelSettings
) -> Tensor:
    """Return ``residual + scale · cab(norm(x))``. The gate is known before the second convolution is computed."""
    compress, _, expand, last = cab
    gate: Any = last.attention
    hidden = parts.layer(x, compress, kernels, norm, activation="gelu")  # type: ignore[arg-type]
    factors = ops.channel_gate(
        hidden,
        expand.weight,  # type: ignore[arg-type]
        expand.bias,  # type: ignore[arg-type]
        gate[1].weight.flatten(1),
        gate[1].bias,
        gate[3].weight.flatten(1),
        gate[3].bias,
        rows=1,
        columns=1,
        neighbourhood=1,
        scale=scale,
        kernels=kernels,
    )
    return parts.layer(hidden, expand, kernels, residual=residual, gate=factors)  # type: ignore[arg-type]


def _standard_attention_refusal(block: Any, attention: Any) -> str | None:
    """Return why layers of a block are of other kinds than those of HAT; None if they are not."""
    if not (parts.is_norm(block.norm1) and parts.is_norm(block.norm2) and parts.is_mlp(block.mlp)):
        return "its norms or its MLP are of other kinds"
    if not (parts.is_linear(attention.qkv) and parts.is_linear(attention.proj)):
        return "its projections are no plain linear layers"
    head_dim = attention.qkv.in_features // attention.num_heads
    if abs(attention.scale * head_dim**0.5 - 1) > 1e-9:
        return f"its scale is {attention.scale:g} instead of 1/sqrt({head_dim})"
    return None


def _buffer(network: nn.Module, name: str, size: int) -> Tensor | None:
    """Return the buffer of a network with this name and number of elements."""
    return next((value for key, value in network.named_buffers() if key.endswith(name) and value.numel() == size), None)


class HybridAttentionBlock(Adapter):
    """HAT's HAB: ``x + attention(n) + conv_scale · cab(n)`` with ``n = norm1(x)``, then ``x + mlp(norm2(x))``.

    It is called as ``block(tokens, (height, width), index, mask)``.
    """

    name = "hab"
    title = "HAB"

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        names = ("norm1", "attn", "norm2", "mlp", "window_size", "shift_size", "conv_block", "conv_scale")
        if not parts.has(block, *names):
            return False
        return parts.has(block.attn, "qkv", "proj", "relative_position_bias_table", "num_heads", "scale")

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        if not _is_cab(block.conv_block):
            return "its channel attention block is of another kind"
        index = _buffer(network, "relative_position_index_SA", block.window_size**4)
        if index is None:
            return "the network has no index of relative positions for it"
        table = block.attn.relative_position_bias_table
        return _standard_attention_refusal(block, block.attn) or parts.index_refusal(index, block.window_size, table)

    def label(self, block: Any) -> str:
        """See `Adapter.label`."""
        window, shift = (block.window_size,) * 2, (block.shift_size,) * 2
        return parts.sizes_label(window, shift, block.attn.num_heads, block.attn.qkv.in_features)

    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """See `Adapter.example`."""
        window, shift = (block.window_size,) * 2, (block.shift_size,) * 2
        height, width = rows * window[0], columns * window[1]
        index = _buffer(network, "relative_position_index_SA", block.window_size**4)
        mask = parts.swin_mask(height, width, window, shift)
        return parts.draw(generator, batch, height * width, block.attn.qkv.in_features), (height, width), index, mask

    def why_not(self, block: Any, x: Tensor, x_size: Any, rpi_sa: Tensor, attn_mask: Tensor | None) -> str | None:
        """See `Adapter.why_not`."""
        height, width = x_size
        window, shift = (block.window_size,) * 2, (block.shift_size,) * 2
        if not parts.whole_windows(height, width, window):
            return "windows do not cover the image"
        if block.shift_size > 0 and (
            attn_mask is None or not parts.is_shift_mask(attn_mask, height, width, window, shift)
        ):
            return "its mask is unknown"
        return None

    def forward(
        self, block: Any, kernels: KernelSettings, x: Tensor, x_size: Any, rpi_sa: Tensor, attn_mask: Tensor | None
    ) -> Tensor:
        """See `Adapter.forward`."""
        attention, cab, drop_path = block.attn, block.conv_block.cab, block.drop_path
        height, width = x_size
        x = x.reshape(x.shape[0], height, width, x.shape[2])
        normed, norm = parts.normalised_once(x, block.norm1, kernels)
        attended = ops.window_attention(
            parts.layer(normed, attention.qkv, kernels, norm),
            attention.relative_position_bias_table,
            window=block.window_size,
            shift=block.shift_size,
            mask=-100.0,
            kernels=kernels,
        )
        if parts.fuses_residual(drop_path):
            x = parts.layer(attended, attention.proj, kernels, residual=x)
            x = _apply_cab(normed, cab, norm, block.conv_scale, x, kernels)
            x = parts.apply_mlp(x, block.mlp, block.norm2, kernels, residual=x)
        else:
            x = parts.add(x, parts.layer(attended, attention.proj, kernels), drop_path)
            x = _apply_cab(normed, cab, norm, block.conv_scale, x, kernels)
            x = parts.add(x, parts.apply_mlp(x, block.mlp, block.norm2, kernels, None), drop_path)
        return x.flatten(1, 2)


class OverlappingBlock(Adapter):
    """HAT's OCAB, called as ``block(tokens, (height, width), index)``."""

    name = "ocab"
    title = "OCAB"

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        names = ("norm1", "qkv", "unfold", "relative_position_bias_table", "proj", "norm2", "mlp", "overlap_win_size")
        return parts.has(block, *names, "window_size", "num_heads", "scale")

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        window, key_window = block.window_size, block.overlap_win_size
        unfold = block.unfold
        if (unfold.kernel_size, unfold.stride, unfold.padding) != (
            (key_window, key_window),
            window,
            (key_window - window) // 2,
        ) or (key_window - window) % 2 != 0:
            return "its key windows are not centred around its windows"
        index = _buffer(network, "relative_position_index_OCA", window**2 * key_window**2)
        if index is None:
            return "the network has no index of relative positions for it"
        if not _is_permuted(index, window, key_window):
            return "its index of relative positions has another order"
        return _standard_attention_refusal(block, block)

    def label(self, block: Any) -> str:
        """See `Adapter.label`."""
        heads = f"{block.num_heads} heads of {block.dim // block.num_heads}"
        return f"window {block.window_size} in {block.overlap_win_size}, {heads}"

    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """See `Adapter.example`."""
        height, width = rows * block.window_size, columns * block.window_size
        index = _buffer(network, "relative_position_index_OCA", block.window_size**2 * block.overlap_win_size**2)
        return parts.draw(generator, batch, height * width, block.qkv.in_features), (height, width), index

    def why_not(self, block: Any, x: Tensor, x_size: Any, rpi: Tensor) -> str | None:
        """See `Adapter.why_not`."""
        height, width = x_size
        whole = parts.whole_windows(height, width, (block.window_size,) * 2)
        return None if whole else "windows do not cover the image"

    def forward(self, block: Any, kernels: KernelSettings, x: Tensor, x_size: Any, rpi: Tensor) -> Tensor:
        """See `Adapter.forward`."""
        height, width = x_size
        channels = x.shape[2]
        window, key_window = block.window_size, block.overlap_win_size
        x = x.reshape(x.shape[0], height, width, channels)
        q, kv = parts.layer(x, block.qkv, kernels, block.norm1).split((channels, 2 * channels), dim=-1)
        table = block.relative_position_bias_table

        def reordered() -> Tensor:
            rows: Tensor = table[_permutation(rpi.to(table.device), window, key_window)]
            return rows

        attended = ops.overlapping_window_attention(
            q,
            kv,
            keep(block, "table", (table, rpi), reordered),
            window=window,
            key_window=key_window,
            kernels=kernels,
        )
        x = parts.layer(attended, block.proj, kernels, residual=x)
        x = parts.apply_mlp(x, block.mlp, block.norm2, kernels, residual=x)
        return x.flatten(1, 2)


def _permutation(index: Tensor, window: int, key_window: int) -> Tensor:
    """Return which row of a block's bias table is each row of savl's, −1 where the index names none.

    The index of published HATs runs from −880 to 640 for windows of 16 in 24, where negative rows count from the end.

    Args:
        index: ``(w², o²)``: the row of the block's table for each query and key.
        window: Side w of the windows.
        key_window: Side o of the key windows.
    """
    ours = relative_position_index(window, key_window, index.device).flatten()
    rows = (window + key_window - 1) ** 2
    return torch.full((rows,), -1, device=index.device).scatter(0, ours, index.detach().flatten().long() % rows)


def _is_permuted(index: Tensor, window: int, key_window: int) -> bool:
    """Return whether an index differs from savl's by the order of the table's rows only."""
    order = _permutation(index.cpu(), window, key_window)
    ours = relative_position_index(window, key_window).flatten()
    theirs = index.detach().cpu().flatten().long() % len(order)
    return bool((order >= 0).all()) and torch.equal(order[ours], theirs)


register(HybridAttentionBlock())
register(OverlappingBlock())
