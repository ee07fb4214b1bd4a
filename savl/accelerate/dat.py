"""Blocks with rectangular windows on two halves of the channels: DAT, RGT and CRAFT.

Their spatial attention divides the channels into two halves. The first has windows of h × w pixels and the second of
w × h, each with the bias that a small network computes from the relative positions. The values are also used
unpartitioned, by a depthwise convolution. Depthwise convolutions are torch's, on channels-last views.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from savl import ops
from savl.accelerate import parts
from savl.accelerate.adapter import Adapter, Arguments, keep, register
from savl.ops import KernelSettings

_KNOWN = {
    nn.Linear, nn.LayerNorm, nn.Conv2d, nn.BatchNorm2d, nn.GELU, nn.ReLU, nn.LeakyReLU, nn.Dropout, nn.Identity,
    nn.Softmax, nn.AdaptiveAvgPool2d, nn.MaxPool2d,
}  # fmt: skip


def _image(x: Tensor) -> Tensor:
    """Return ``(B, H, W, C)`` as ``(B, C, H, W)``: a view, or contiguous with gradients.

    In channels_last, the backward passes of torch's depthwise convolutions and batch norms have errors several times as
    large.
    """
    image = x.permute(0, 3, 1, 2)
    return image.contiguous() if torch.is_grad_enabled() else image


def _features(x: Tensor) -> Tensor:
    """Return ``(B, C, H, W)`` as a view ``(B, H, W, C)``."""
    return x.permute(0, 2, 3, 1)


def _add_product(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return ``x + first · second``; without gradients in the memory of ``x``, which the caller has made."""
    return torch.addcmul(x, first, second) if torch.is_grad_enabled() else x.addcmul_(first, second)


def _product(x: Tensor, factor: Tensor) -> Tensor:
    """Return ``x · factor``; without gradients in the memory of ``x``, which the caller has made."""
    return x * factor if torch.is_grad_enabled() else x.mul_(factor)


def _add_halves(x: Tensor, halves: list[Tensor]) -> Tensor:
    """Add two tensors to the halves of the channels; without gradients in the memory of ``x``."""
    if torch.is_grad_enabled():
        return x + torch.cat(halves, -1)
    for part, half in zip(x.chunk(2, -1), halves, strict=True):
        part += half
    return x


def _branch(x: Tensor, features: Tensor, layer: nn.Linear, drop_path: nn.Module, kernels: KernelSettings) -> Tensor:
    """Return ``x + drop_path(layer(features))``."""
    if parts.fuses_residual(drop_path):
        return parts.layer(features, layer, kernels, residual=x)
    return parts.add(x, parts.layer(features, layer, kernels), drop_path)


# Checks


def _unknown_layer(block: nn.Module) -> str | None:
    """Return which layer inside a block is of an unknown kind: it may compute something else, or be random."""
    for name, module in block.named_modules():
        elsewhere = name.rpartition(".")[2] in ("drop_path", "body")  # what drops paths runs; body is CRAFT's norm
        if not elsewhere and not any(True for _ in module.children()) and type(module) not in _KNOWN:
            return f"its layer {name} is of another kind: {type(module).__name__}"
    return None


def _is_depthwise(layer: object) -> bool:
    """Return whether a layer is a depthwise convolution of the image's size."""
    if type(layer) is not nn.Conv2d or layer.groups != layer.in_channels or layer.out_channels != layer.in_channels:
        return False
    shape = (layer.kernel_size, layer.padding, layer.stride, layer.dilation)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1)) and layer.padding_mode == "zeros"


def _layers(layers: object) -> list[Any]:
    """Return the layers of a `torch.nn.Sequential`, and none of anything else."""
    return list(layers) if type(layers) is nn.Sequential else []


def _is_normed(layers: list[Any], count: int) -> bool:
    """Return whether layers are this many and begin with convolution, batch norm and GELU."""
    kinds = [type(layer) for layer in layers[:2]]
    if len(layers) != count or kinds != [nn.Conv2d, nn.BatchNorm2d]:
        return False
    return parts.activation_of(layers[2]) == {"activation": "gelu"}


def _is_interaction(layers: list[Any]) -> bool:
    """Return whether layers are those of DAT's interactions after the pool: `_is_normed`, then a convolution."""
    if not _is_normed(layers, 4):
        return False
    return all(parts.is_convolution(layers[i]) and layers[i].kernel_size == (1, 1) for i in (0, 3))


def _is_gated_mlp(mlp: object) -> bool:
    """Return whether a module is DAT's SGFN, which is RGT's MLP: the hidden features gate themselves."""
    if not parts.is_mlp(mlp):
        return False
    gate: Any = getattr(mlp, "sg", None)
    if gate is None or not parts.has(gate, "norm", "conv"):
        return False
    return parts.is_norm(gate.norm) and _is_depthwise(gate.conv)


def _are_halves(attns: object) -> bool:
    """Return whether modules are the attention of two halves with a bias."""
    names = ("H_sp", "W_sp", "num_heads", "scale", "pos")
    return isinstance(attns, nn.ModuleList) and len(attns) == 2 and all(parts.has(each, *names) for each in attns)


def _windows_refusal(attns: Any, channels: int, indices: tuple[object, object] | None) -> str | None:
    """Return why the attention of the two halves is of another kind; None if it is not.

    Args:
        attns: The modules of the two halves, which `_are_halves`.
        channels: Channels of both together.
        indices: Indices of relative positions; None if the modules have them.
    """
    first, second = attns
    if (first.H_sp, first.W_sp) != (second.W_sp, second.H_sp) or max(_window(first)) % min(_window(first)) != 0:
        return "its windows are of other sizes"
    for i, each in enumerate(attns):
        if getattr(each, "flash_attn", False):
            return "its attention has no bias"
        if (channels // 2) % each.num_heads != 0 or channels % 2 != 0:
            return "its channels do not divide among the heads"
        head_dim = channels // 2 // each.num_heads
        if abs(each.scale * head_dim**0.5 - 1) > 1e-9:
            return f"its scale is {each.scale:g} instead of 1/sqrt({head_dim})"
        if indices is None and not parts.has(each, "rpe_biases", "relative_position_index"):
            return "its attention has no relative positions"
        index = each.relative_position_index if indices is None else indices[i]
        if (reason := _index_refusal(index, each)) is not None:
            return reason
        if indices is None and each.rpe_biases.shape != (_rows(each), 2):
            return "its relative positions are of another number"
    return None


def _window(attention: Any) -> tuple[int, int]:
    """Return the size of the windows of one half."""
    return attention.H_sp, attention.W_sp


def _rows(attention: Any) -> int:
    """Return the number of relative positions in a window of one half."""
    return (2 * attention.H_sp - 1) * (2 * attention.W_sp - 1)  # type: ignore[no-any-return]


def _index_refusal(index: object, attention: Any) -> str | None:
    """Return why a tensor is not the index of relative positions for one half; None if it is."""
    return parts.index_refusal(index, _window(attention), torch.empty(_rows(attention), 0))


# Spatial attention


def _attend(
    block: nn.Module,
    qkv: Tensor,
    attns: Any,
    positions: tuple[Tensor, Tensor],
    shift: tuple[int, int],
    mask: float,
    kernels: KernelSettings,
) -> list[Tensor]:
    """Compute windowed attention of both halves of the channels.

    Args:
        block: The block, which keeps the bias tables.
        qkv: ``(B, H, W, 3C)``: queries, keys and values.
        attns: The modules of the two halves.
        positions: What the bias is computed from, for each half.
        shift: Shift of the first half; that of the second has the axes exchanged.
        mask: Added to the logits between different sides of the image.
        kernels: Kernels to use.

    Returns:
        ``(B, H, W, C/2)`` for each half.
    """
    height, width = qkv.shape[1:3]
    side = max(_window(attns[0]))
    if height % side != 0 or width % side != 0:
        qkv = F.pad(qkv, (0, 0, 0, -width % side, 0, -height % side))
    q, k, v = (each.chunk(2, -1) for each in qkv.chunk(3, -1))

    def table(i: int) -> Tensor:
        pos, source = attns[i].pos, positions[i]
        return keep(block, f"bias {i}", (*pos.parameters(), source), lambda: pos(source))

    return [
        ops.window_attention(
            q[i],
            table(i),
            k=k[i],
            v=v[i],
            window=_window(attns[i]),
            shift=shift if i == 0 else shift[::-1],
            mask=mask,
            kernels=kernels,
        )[:, :height, :width]
        for i in range(2)
    ]


def _attend_padded(block: nn.Module, qkv: Tensor, attention: Any, kernels: KernelSettings) -> list[Tensor]:
    """Compute the attention of DAT and RGT, which are shifted if they have a mask."""
    attns = attention.attns
    return _attend(block, qkv, attns, (attns[0].rpe_biases, attns[1].rpe_biases), _shift(attention), -100.0, kernels)


def _shift(attention: Any) -> tuple[int, int]:
    """Return the shift of an attention of DAT or RGT: it is derived from the block's number, which its mask shows."""
    down, right = (0, 0) if attention.attn_mask_0 is None else attention.shift_size
    return down, right


def _is_spatial(attention: object) -> bool:
    """Return whether a module is the spatial attention of DAT or RGT."""
    names = ("qkv", "proj", "attns", "split_size", "shift_size", "attn_mask_0", "attn_mask_1", "patches_resolution")
    if not isinstance(attention, nn.Module) or not parts.has(attention, *names):
        return False
    pairs = all(isinstance(each, tuple | list) for each in (attention.split_size, attention.shift_size))
    return pairs and _are_halves(attention.attns)


def _spatial_refusal(attention: Any, channels: int) -> str | None:
    """Return why a spatial attention of DAT or RGT is of another kind; None if it is not."""
    masks = (attention.attn_mask_0, attention.attn_mask_1)
    if (masks[0] is None) != (masks[1] is None):
        return "only one half of it is shifted"
    if (reason := _windows_refusal(attention.attns, channels, None)) is not None:
        return reason
    if tuple(attention.split_size) != _window(attention.attns[0]):
        return "its windows are of other sizes"
    side, shift = attention.patches_resolution, _shift(attention)
    for mask, each, by in zip(masks, attention.attns, (shift, shift[::-1]), strict=True):
        if mask is not None and not parts.is_shift_mask(mask, side, side, _window(each), by):
            return "its mask is unknown"
    return None


# Attention over channels


def _attend_channels(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Compute attention over the channels of each head, whose logits are cosines of channels.

    Queries and keys are multiplied first, and the small product is normalised.

    Args:
        q: ``(B, H, W, C)``.
        k: Like ``q``.
        v: Like ``q``.
        temperature: ``(heads, 1, 1)``.

    Returns:
        ``(B, H, W, C)``.
    """
    heads = temperature.shape[0]
    if q.dtype == torch.float16:  # its range is too small for sums over pixels
        q, k = (F.normalize(each, dim=(1, 2)) for each in (q, k))  # type: ignore[arg-type]
        cosines = _by_head(q, heads).mT @ _by_head(k, heads)
    else:  # the smallest length is that of F.normalize
        lengths = [each.square().sum((1, 2)).clamp_min(1e-24).sqrt().unflatten(-1, (heads, -1)) for each in (q, k)]
        cosines = _by_head(q, heads).mT @ _by_head(k, heads)
        cosines = cosines / (lengths[0].unsqueeze(-1) * lengths[1].unsqueeze(-2))
    weights = (cosines * temperature).softmax(-1)
    return _merge_heads(_by_head(v, heads) @ weights.mT).view(q.shape)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """Return ``(B, H, W, C)`` as ``(B, heads, H·W, C/heads)``."""
    split: Tensor = x.flatten(1, 2).unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    """Return ``(B, heads, N, d)`` as ``(B, N, heads·d)``."""
    return x.transpose(1, 2).flatten(2)


# Layers around the attention


def _folded(block: nn.Module, name: str, layers: Any) -> tuple[Tensor, Tensor] | None:
    """Return weight and bias of a convolution with the batch norm after it; None if the norm uses the batch."""
    convolution, norm = layers[0], layers[1]
    if norm.training or norm.running_mean is None or norm.weight is None:
        return None

    def factor() -> Tensor:
        scaled: Tensor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        return scaled

    def weight() -> Tensor:
        scaled: Tensor = convolution.weight * factor().view(-1, 1, 1, 1)
        return scaled

    def bias() -> Tensor:
        before = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
        shifted: Tensor = before * factor() + norm.bias
        return shifted

    sources = (*convolution.parameters(), norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return keep(block, f"{name} weight", sources, weight), keep(block, f"{name} bias", sources, bias)


def _convolve_values(block: nn.Module, v: Tensor, layers: Any) -> Tensor:
    """Return ``layers(v)`` for depthwise convolution, batch norm and GELU."""
    folded = _folded(block, "dwconv", layers)
    if folded is None:
        return _features(layers(_image(v)))
    return F.gelu(_features(F.conv2d(_image(v), *folded, padding=1, groups=v.shape[-1])))


def _interaction(block: nn.Module, name: str, x: Tensor, layers: Any, kernels: KernelSettings) -> Tensor:
    """Return ``sigmoid(layers(x))`` for an interaction of DAT; one that begins with a pool averages over the pixels."""
    mixer = layers[-4:]
    folded = _folded(block, name, mixer)
    if folded is None:
        return _features(layers(_image(x))).sigmoid()
    if len(layers) == 5:
        x = x.mean((1, 2), keepdim=True)
    hidden = ops.convolution(x, *folded, activation="gelu", kernels=kernels)
    return parts.layer(hidden, mixer[3], kernels).sigmoid()


def _apply_gated_mlp(x: Tensor, mlp: Any, norm: nn.LayerNorm, drop_path: nn.Module, kernels: KernelSettings) -> Tensor:
    """Return ``x + drop_path(mlp(norm(x)))`` for a module that `_is_gated_mlp`."""
    fused = parts.activation_of(mlp.act)
    hidden = parts.layer(x, mlp.fc1, kernels, norm, **fused or {})
    direct, gate = (mlp.act(hidden) if fused is None else hidden).chunk(2, -1)
    gate_norm = mlp.sg.norm
    gate = ops.layer_norm(gate, gate_norm.weight, gate_norm.bias, eps=gate_norm.eps, kernels=kernels)
    gate = _features(mlp.sg.conv(_image(gate)))
    return _branch(x, _product(gate, direct), mlp.fc2, drop_path, kernels)


class _TokenBlock(Adapter):
    """A block that is called as ``block(tokens, (height, width))`` and pads images itself."""

    def why_not(self, block: Any, x: Tensor, x_size: Any) -> str | None:
        """See `Adapter.why_not`."""
        height, width = x_size
        fits = x.dim() == 3 and x.shape[1] == height * width
        return None if fits else "the tokens are not those of the image"


# DAT


class DualAggregationBlock(_TokenBlock):
    """DAT's DATB: ``x + attention(norm1(x))``, then ``x + ffn(norm2(x))``.

    Its attention is over windows or over channels, beside a convolution of the values. Each branch weights the other.
    """

    name = "datb"
    title = "DATB"
    irrelevant = Adapter.irrelevant | {"b_idx", "rg_idx", "idx", "rs_id"}

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        if not parts.has(block, "norm1", "attn", "drop_path", "ffn", "norm2"):
            return False
        names = ("qkv", "proj", "dwconv", "channel_interaction", "spatial_interaction")
        return parts.has(block.attn, *names) and (_is_spatial(block.attn) or hasattr(block.attn, "temperature"))

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        attention = block.attn
        if not (parts.is_norm(block.norm1) and parts.is_norm(block.norm2) and _is_gated_mlp(block.ffn)):
            return "its norms or its MLP are of other kinds"
        if not (parts.is_linear(attention.qkv) and parts.is_linear(attention.proj)):
            return "its projections are no plain linear layers"
        pool, *channel = _layers(attention.channel_interaction) or [None]
        if type(pool) is not nn.AdaptiveAvgPool2d or pool.output_size not in (1, (1, 1)):
            return "its interactions are of other kinds"
        if not (_is_interaction(channel) and _is_interaction(_layers(attention.spatial_interaction))):
            return "its interactions are of other kinds"
        convolution = _layers(attention.dwconv)
        if not (_is_normed(convolution, 3) and _is_depthwise(convolution[0])):
            return "its convolution is of another kind"
        channels = attention.qkv.in_features
        if not _is_spatial(attention):
            heads = attention.temperature.shape[0]
            whole = attention.temperature.shape == (heads, 1, 1) and channels % heads == 0
            return _unknown_layer(block) if whole else "its attention is of another kind"
        return _spatial_refusal(attention, channels) or _unknown_layer(block)

    def label(self, block: Any) -> str:
        """See `Adapter.label`."""
        attention, channels = block.attn, block.attn.qkv.in_features
        if _is_spatial(attention):
            return _halves_label(attention.attns, _shift(attention), channels)
        return f"over channels, {attention.num_heads} heads of {channels // attention.num_heads}"

    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """See `Adapter.example`."""
        side = max(block.attn.split_size) if _is_spatial(block.attn) else 16
        if block.training:
            batch = max(batch, 4)  # norms over a batch of two are ill-conditioned, and of one impossible
        return _example(generator, batch, rows, columns, side, block.attn.qkv.in_features)

    def forward(self, block: Any, kernels: KernelSettings, x: Tensor, x_size: Any) -> Tensor:
        """See `Adapter.forward`."""
        attention = block.attn
        x = x.reshape(x.shape[0], *x_size, x.shape[2])
        qkv = parts.layer(x, attention.qkv, kernels, block.norm1)
        q, k, v = qkv.chunk(3, -1)
        convolved = _convolve_values(block, v, attention.dwconv)
        spatial = _is_spatial(attention)
        if spatial:
            attended = torch.cat(_attend_padded(block, qkv, attention, kernels), -1)
        else:
            attended = _attend_channels(q, k, v, attention.temperature)
        pooled, mapped = (convolved, attended) if spatial else (attended, convolved)
        channel_map = _interaction(block, "channel", pooled, attention.channel_interaction, kernels)
        spatial_map = _interaction(block, "spatial", mapped, attention.spatial_interaction, kernels)
        mixed = _add_product(_product(mapped, channel_map), pooled, spatial_map)
        x = _branch(x, mixed, attention.proj, block.drop_path, kernels)
        return _apply_gated_mlp(x, block.ffn, block.norm2, block.drop_path, kernels).flatten(1, 2)


def _halves_label(attns: Any, shift: tuple[int, int], channels: int) -> str:
    return f"two halves, {parts.sizes_label(_window(attns[0]), shift, 2 * attns[0].num_heads, channels)}"


def _example(generator: torch.Generator, batch: int, rows: int, columns: int, side: int, channels: int) -> Arguments:
    """Draw tokens of an image whose sizes are multiples of half the longer side of the windows."""
    height, width = max(rows * side // 2, 1), max(columns * side // 2, 1)
    return parts.draw(generator, batch, height * width, channels), (height, width)


# RGT


class RecursiveGeneralizationBlock(_TokenBlock):
    """RGT's Block: ``y = x + attention(norm1(x))``, then ``y + mlp(norm2(y)) + gamma · x``.

    Its attention is over windows, or of all pixels to the few pixels of an image that is reduced repeatedly.
    """

    name = "rgt"
    title = "RGT block"
    irrelevant = Adapter.irrelevant | {"b_idx", "rg_idx", "idx", "rs_id"}

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        if not parts.has(block, "norm1", "attn", "drop_path", "mlp", "norm2", "gamma"):
            return False
        names = ("reduction1", "dwconv", "conv", "norm_act", "q", "k", "v", "cpe", "proj", "num_heads", "scale")
        return (_is_spatial(block.attn) and hasattr(block.attn, "get_v")) or parts.has(block.attn, *names)

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        attention = block.attn
        if not (parts.is_norm(block.norm1) and parts.is_norm(block.norm2) and _is_gated_mlp(block.mlp)):
            return "its norms or its MLP are of other kinds"
        channels = block.norm1.normalized_shape[0]
        if block.gamma.shape != (channels,):
            return "its scale of the residual is of another kind"
        if _is_spatial(attention):
            if not (parts.is_linear(attention.qkv) and parts.is_linear(attention.proj)):
                return "its projections are no plain linear layers"
            if not _is_depthwise(attention.get_v):
                return "its convolution is of another kind"
            return _spatial_refusal(attention, channels) or _unknown_layer(block)
        if not all(parts.is_linear(getattr(attention, name)) for name in ("q", "k", "v", "proj")):
            return "its projections are no plain linear layers"
        if not (parts.is_convolution(attention.conv) and attention.q.out_features % attention.num_heads == 0):
            return "its attention is of another kind"
        return _unknown_layer(block)

    def label(self, block: Any) -> str:
        """See `Adapter.label`."""
        attention, channels = block.attn, block.gamma.numel()
        if _is_spatial(attention):
            return _halves_label(attention.attns, _shift(attention), channels)
        return f"to a reduced image, {attention.num_heads} heads of {channels // attention.num_heads}"

    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """See `Adapter.example`."""
        side = max(block.attn.split_size) if _is_spatial(block.attn) else 36
        return _example(generator, batch, rows, columns, side, block.norm1.normalized_shape[0])

    def forward(self, block: Any, kernels: KernelSettings, x: Tensor, x_size: Any) -> Tensor:
        """See `Adapter.forward`."""
        attention = block.attn
        first = x = x.reshape(x.shape[0], *x_size, x.shape[2])
        if _is_spatial(attention):
            qkv = parts.layer(x, attention.qkv, kernels, block.norm1)
            convolved = _features(attention.get_v(_image(qkv.chunk(3, -1)[2])))
            attended = _add_halves(convolved, _attend_padded(block, qkv, attention, kernels))
        else:
            attended = _attend_reduced(x, block.norm1, attention, kernels)
        x = _branch(x, attended, attention.proj, block.drop_path, kernels)
        x = _apply_gated_mlp(x, block.mlp, block.norm2, block.drop_path, kernels)
        return _add_product(x, first, block.gamma).flatten(1, 2)


def _attend_reduced(x: Tensor, norm: nn.LayerNorm, attention: Any, kernels: KernelSettings) -> Tensor:
    """Compute RGT's attention of all pixels to those of a reduced image, before its projection."""
    height, width = x.shape[1:3]
    normed = ops.layer_norm(x, norm.weight, norm.bias, eps=norm.eps, kernels=kernels)
    if attention.training:
        times = max(int(math.log(height // 4, 4)), int(math.log(width // 4, 4)))
    else:
        times = max(int(math.log(height // 16, 4)), int(math.log(width // 16, 4)), 2)
    reduced = _image(normed)
    for _ in range(times):
        reduced = attention.reduction1(reduced)
    small = attention.norm_act(parts.layer(_features(attention.dwconv(reduced)), attention.conv, kernels))
    keys, values = attention.k(small) * attention.scale, attention.v(small)
    values = values + _features(attention.cpe(_image(values)))
    queries = parts.layer(normed, attention.q, kernels)
    q, k, v = (_by_head(each, attention.num_heads) for each in (queries, keys, values))
    return _merge_heads((q @ k.mT).softmax(-1) @ v).view(x.shape)


# CRAFT


class ShiftRectangleBlock(Adapter):
    """CRAFT's SRWAB, called as ``block(tokens, (height, width), positions, masks)``.

    The network has the indices of relative positions, and gives no mask to shifted windows.
    """

    name = "srwab"
    title = "SRWAB"

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        names = ("norm1", "qkv", "proj", "get_v", "attns", "norm2", "mlp", "shift_size")
        return parts.has(block, *names) and _are_halves(block.attns)

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        if not (parts.is_norm(block.norm1) and parts.is_norm(block.norm2) and parts.is_mlp(block.mlp)):
            return "its norms or its MLP are of other kinds"
        if not (parts.is_linear(block.qkv) and parts.is_linear(block.proj) and _is_depthwise(block.get_v)):
            return "its projections or its convolution are of other kinds"
        if not _positions(network):
            return "the network has no relative positions for it"
        positions = _positions(network)
        indices = (positions["rpi_sa_h"], positions["rpi_sa_v"])
        return _windows_refusal(block.attns, block.qkv.in_features, indices) or _unknown_layer(block)

    def label(self, block: Any) -> str:
        """See `Adapter.label`."""
        return _halves_label(block.attns, tuple(block.shift_size), block.qkv.in_features)

    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """See `Adapter.example`."""
        side = 2 * max(_window(block.attns[0]))
        return (
            *_example(generator, batch, rows, columns, side, block.qkv.in_features),
            _positions(network),
            (None, None),
        )

    def why_not(self, block: Any, x: Tensor, x_size: Any, params: Any, attn_mask: Any = None) -> str | None:
        """See `Adapter.why_not`."""
        height, width = x_size
        first, second = (_window(each) for each in block.attns)
        if not (parts.whole_windows(height, width, first) and parts.whole_windows(height, width, second)):
            return "windows do not cover the image"
        for each, letter in zip(block.attns, "hv", strict=True):
            index, positions = params[f"rpi_sa_{letter}"], params[f"biases_{letter}"]
            if not _is_index(block, letter, index, each) or positions.shape[0] != _rows(each):
                return "its relative positions are unknown"
        if any(block.shift_size) and _mask_value(block, height, width, attn_mask) is None:
            return "its mask is unknown"
        return None

    def forward(
        self, block: Any, kernels: KernelSettings, x: Tensor, x_size: Any, params: Any, attn_mask: Any = None
    ) -> Tensor:
        """See `Adapter.forward`."""
        height, width = x_size
        x = x.reshape(x.shape[0], height, width, x.shape[2])
        shift = tuple(block.shift_size)
        mask = _mask_value(block, height, width, attn_mask) if any(shift) else None
        qkv = parts.layer(x, block.qkv, kernels, block.norm1)
        positions = (params["biases_h"], params["biases_v"])
        halves = _attend(block, qkv, block.attns, positions, shift, mask or 0.0, kernels)
        attended = _add_halves(_features(block.get_v(_image(qkv.chunk(3, -1)[2]))), halves)
        x = parts.layer(attended, block.proj, kernels, residual=x)
        return parts.apply_mlp(x, block.mlp, block.norm2, kernels, residual=x).flatten(1, 2)


def _positions(network: nn.Module) -> dict[str, Tensor]:
    """Return the indices and relative positions that CRAFT gives its blocks; nothing if the network has none."""
    buffers = {key.rpartition(".")[2]: value for key, value in network.named_buffers()}
    names = {"rpi_sa": "relative_position_index", "biases": "biases"}
    wanted = {f"{ours}_{letter}": f"{theirs}_{letter}" for ours, theirs in names.items() for letter in "hv"}
    return {ours: buffers[theirs] for ours, theirs in wanted.items() if set(wanted.values()) <= set(buffers)}


def _is_index(block: nn.Module, letter: str, index: Tensor, attention: Any) -> bool:
    """Return whether a tensor is the index of relative positions for one half.

    In evaluation it is compared once. Inside of compiled programs and on GPUs, where reading it would make the CPU
    wait, it is not compared.
    """
    if torch.compiler.is_compiling() or index.device.type != "cpu":
        return True
    same = keep(block, f"index {letter}", (index,), lambda: torch.tensor(_index_refusal(index, attention) is None))
    return bool(same)


def _mask_value(block: Any, height: int, width: int, masks: Any) -> float | None:
    """Return what CRAFT's masks add between different sides of the image; None if they are no such masks."""
    if not isinstance(masks, tuple | list) or len(masks) != 2:
        return None
    if masks[0] is None and masks[1] is None:
        return 0.0
    shift = tuple(block.shift_size)
    for mask, each, by in zip(masks, block.attns, (shift, shift[::-1]), strict=True):
        if not isinstance(mask, Tensor) or not parts.is_shift_mask(mask, height, width, _window(each), by):
            return None
    return -100.0


class HighFrequencyBlock(Adapter):
    """CRAFT's HFERB, called as ``block(image)``: a convolution and a maximum, each of one half of the channels."""

    name = "hferb"
    title = "HFERB"

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        return parts.has(block, "last_fc", "fc", "max_pool", "conv", "act", "mid_dim", "dim")

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        if not all(parts.is_convolution(each) for each in (block.last_fc, block.fc, block.conv)):
            return "its convolutions are of other kinds"
        if parts.activation_of(block.act) is None or block.last_fc.kernel_size != (1, 1):
            return "its layers are of other kinds"
        halves = block.last_fc.in_channels == 2 * block.mid_dim
        return _unknown_layer(block) if halves else "its halves are of other sizes"

    def label(self, block: Any) -> str:
        """See `Adapter.label`."""
        return f"{block.dim} channels"

    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """See `Adapter.example`."""
        return (parts.draw(generator, batch, block.dim, 4 * rows, 4 * columns + 1),)

    def forward(self, block: Any, kernels: KernelSettings, x: Tensor) -> Tensor:
        """See `Adapter.forward`."""
        fused = parts.activation_of(block.act)
        assert fused is not None
        x = _features(x)
        local, high = x.split(block.mid_dim, -1)
        pooled = _features(block.max_pool(_image(high)))
        weight = block.last_fc.weight.split(block.mid_dim, 1)
        local = parts.layer(local, block.conv, kernels, **fused)
        high = parts.layer(pooled, block.fc, kernels, **fused)
        x = ops.convolution(local, weight[0], block.last_fc.bias, residual=x, kernels=kernels)
        return _image(ops.convolution(high, weight[1], residual=x, kernels=kernels))


class HybridFusionBlock(Adapter):
    """CRAFT's HFB, called as ``block(low, high)`` with images: attention over channels, and a gated MLP."""

    name = "hfb"
    title = "HFB"

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        if not parts.has(block, "norm1", "attn", "norm2", "ffn"):
            return False
        names = ("q", "q_dwconv", "kv", "kv_dwconv", "project_out", "temperature")
        return parts.has(block.attn, *names) and parts.has(block.ffn, "project_in", "dwconv", "project_out")

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        attention, mlp = block.attn, block.ffn
        pointwise = (attention.q, attention.kv, attention.project_out, mlp.project_in, mlp.project_out)
        if not all(parts.is_convolution(each) and each.kernel_size == (1, 1) for each in pointwise):
            return "its projections are of other kinds"
        if not all(_is_depthwise(each) for each in (attention.q_dwconv, attention.kv_dwconv, mlp.dwconv)):
            return "its convolutions are of other kinds"
        channels = attention.q.in_channels
        for norm in (block.norm1, block.norm2):
            shapes = {name: tuple(each.shape) for name, each in norm.named_parameters()}
            if shapes != {"body.weight": (channels,), "body.bias": (channels,)}:
                return "its norms are of other kinds"
        heads = attention.temperature.shape[0]
        whole = attention.temperature.shape == (heads, 1, 1) and channels % heads == 0
        return _unknown_layer(block) if whole else "its attention is of another kind"

    def label(self, block: Any) -> str:
        """See `Adapter.label`."""
        heads = block.attn.temperature.shape[0]
        return f"over channels, {heads} heads of {block.attn.q.in_channels // heads}"

    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """See `Adapter.example`."""
        shape = (batch, block.attn.q.in_channels, 4 * rows, 4 * columns + 1)
        return parts.draw(generator, *shape), parts.draw(generator, *shape)

    def forward(self, block: Any, kernels: KernelSettings, low: Tensor, high: Tensor) -> Tensor:
        """See `Adapter.forward`."""
        attention, mlp = block.attn, block.ffn
        x = _features(low)

        def norm(layer: Any) -> dict[str, Any]:  # the class has its eps in its forward
            return {"norm_weight": layer.body.weight, "norm_bias": layer.body.bias, "eps": 1e-5}

        q = _features(attention.q_dwconv(_image(parts.layer(_features(high), attention.q, kernels))))
        kv = parts.layer(x, attention.kv, kernels, **norm(block.norm1))
        k, v = _features(attention.kv_dwconv(_image(kv))).chunk(2, -1)
        attended = _attend_channels(q, k, v, attention.temperature)
        x = parts.layer(attended, attention.project_out, kernels, residual=x)
        hidden = parts.layer(x, mlp.project_in, kernels, **norm(block.norm2))
        direct, gate = _features(mlp.dwconv(_image(hidden))).chunk(2, -1)
        return _image(parts.layer(_product(F.gelu(direct), gate), mlp.project_out, kernels, residual=x))


for _adapter in (
    DualAggregationBlock(),
    RecursiveGeneralizationBlock(),
    ShiftRectangleBlock(),
    HighFrequencyBlock(),
    HybridFusionBlock(),
):
    register(_adapter)
