"""The blocks of SCUNet: a Swin block over features, and the block that runs it beside two convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from savl import ops
from savl.accelerate import parts
from savl.accelerate.adapter import Adapter, Arguments, register
from savl.ops import KernelSettings


class FeaturesBlock(Adapter):
    """``x + msa(ln1(x))``, then ``x + mlp(ln2(x))``, over ``(B, H, W, C)``.

    The bias of the attention is a parameter ``(heads, 2w − 1, 2w − 1)``. Blocks of type ``"SW"`` shift their windows by
    half of their size, and the mask between the sides of the image is −∞.
    """

    name = "scunet_swin"
    title = "SCUNet Swin block"

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        if not parts.has(block, "ln1", "msa", "ln2", "mlp", "drop_path"):
            return False
        names = ("embedding_layer", "linear", "relative_position_params", "window_size", "type", "scale")
        return parts.has(block.msa, *names) and isinstance(block.msa.relative_position_params, Tensor)

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        attention = block.msa
        if not (parts.is_norm(block.ln1) and parts.is_norm(block.ln2) and _is_mlp(block.mlp)):
            return "its norms or its MLP are of other kinds"
        if not (parts.is_linear(attention.embedding_layer) and parts.is_linear(attention.linear)):
            return "its projections are no plain linear layers"
        bias, channels = attention.relative_position_params, attention.embedding_layer.in_features
        heads, side = bias.shape[0], 2 * attention.window_size - 1
        if bias.shape != (heads, side, side) or channels % heads != 0:
            return "its relative position bias has another shape"
        if attention.embedding_layer.out_features != 3 * channels or attention.type not in ("W", "SW"):
            return "its attention is of another kind"
        if abs(attention.scale * (channels // heads) ** 0.5 - 1) > 1e-9:
            return f"its scale is {attention.scale:g} instead of 1/sqrt({channels // heads})"
        return None

    def label(self, block: Any) -> str:
        """See `Adapter.label`."""
        attention = block.msa
        heads, shift = attention.relative_position_params.shape[0], _shift(attention)
        channels = attention.embedding_layer.in_features
        return parts.sizes_label((attention.window_size,) * 2, (shift, shift), heads, channels)

    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """See `Adapter.example`."""
        window, channels = block.msa.window_size, block.msa.embedding_layer.in_features
        return (parts.draw(generator, batch, rows * window, columns * window, channels),)

    def why_not(self, block: Any, x: Tensor) -> str | None:
        """See `Adapter.why_not`."""
        whole = parts.whole_windows(x.shape[1], x.shape[2], (block.msa.window_size,) * 2)
        return None if whole else "windows do not cover the image"

    def forward(self, block: Any, kernels: KernelSettings, x: Tensor) -> Tensor:
        """See `Adapter.forward`."""
        attention, mlp, drop_path = block.msa, block.mlp, block.drop_path
        attended = ops.window_attention(
            parts.layer(x, attention.embedding_layer, kernels, block.ln1),
            attention.relative_position_params.flatten(1).t(),
            window=attention.window_size,
            shift=_shift(attention),
            kernels=kernels,
        )
        if parts.fuses_residual(drop_path):
            x = parts.layer(attended, attention.linear, kernels, residual=x)
            hidden = parts.layer(x, mlp[0], kernels, block.ln2, activation="gelu")
            return parts.layer(hidden, mlp[2], kernels, residual=x)
        x = parts.add(x, parts.layer(attended, attention.linear, kernels), drop_path)
        hidden = parts.layer(x, mlp[0], kernels, block.ln2, activation="gelu")
        return parts.add(x, parts.layer(hidden, mlp[2], kernels), drop_path)


FEATURES_BLOCK = FeaturesBlock()


class ConvolutionBlock(Adapter):
    """``x + conv1_2([u + conv_block(u), trans_block(v)])``, where ``[u, v]`` are the channels of ``conv1_1(x)``.

    Features stay in the channels-last layout, so the result is a channels-last view.
    """

    name = "scunet"
    title = "SCUNet block"

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        if not parts.has(block, "conv1_1", "conv1_2", "conv_block", "trans_block", "conv_dim", "trans_dim"):
            return False
        pair = block.conv_block
        if not isinstance(pair, nn.Sequential) or [type(each) for each in pair] != [nn.Conv2d, nn.ReLU, nn.Conv2d]:
            return False
        return FEATURES_BLOCK.matches(block.trans_block)

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        convolutions = (block.conv1_1, block.conv1_2, block.conv_block[0], block.conv_block[2])
        if not all(parts.is_convolution(each) for each in convolutions):
            return "its convolutions are of another kind"
        return FEATURES_BLOCK.refusal(block.trans_block, network)

    def label(self, block: Any) -> str:
        """See `Adapter.label`."""
        return FEATURES_BLOCK.label(block.trans_block)

    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """See `Adapter.example`."""
        window = block.trans_block.msa.window_size
        return (parts.draw(generator, batch, block.conv1_1.in_channels, rows * window, columns * window),)

    def why_not(self, block: Any, x: Tensor) -> str | None:
        """See `Adapter.why_not`."""
        return FEATURES_BLOCK.why_not(block.trans_block, x.permute(0, 2, 3, 1))

    def forward(self, block: Any, kernels: KernelSettings, x: Tensor) -> Tensor:
        """See `Adapter.forward`."""
        features = x.permute(0, 2, 3, 1).contiguous()
        squeeze, _, expand = block.conv_block
        split = parts.layer(features, block.conv1_1, kernels)
        u, v = split.split((block.conv_dim, block.trans_dim), dim=-1)
        hidden = parts.layer(u, squeeze, kernels, activation="leaky_relu", slope=0.0)
        u = parts.layer(hidden, expand, kernels, residual=u)
        v = FEATURES_BLOCK.forward(block.trans_block, kernels, v)
        joined = torch.cat((u, v), dim=-1)
        return parts.layer(joined, block.conv1_2, kernels, residual=features).permute(0, 3, 1, 2)


def _is_mlp(mlp: object) -> bool:
    """Return whether a module is linear layer – GELU – linear layer."""
    if not isinstance(mlp, nn.Sequential) or len(mlp) != 3:
        return False
    return parts.is_linear(mlp[0]) and parts.activation_of(mlp[1]) == {"activation": "gelu"} and parts.is_linear(mlp[2])


def _shift(attention: Any) -> int:
    """Return the shift of the windows of a SCUNet attention."""
    return 0 if attention.type == "W" else int(attention.window_size // 2)


register(ConvolutionBlock())
register(FEATURES_BLOCK)
