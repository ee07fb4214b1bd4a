"""Convert published HAT checkpoints: derive the configuration from tensor shapes, and rename the tensors.

Names and layouts are those of the public HAT release (Chen et al., 2023; XPixelGroup/HAT). Apart from names, three
things differ from `savl.network`: HAT stores two index buffers beside the weights; its CAB computes the gate with 1×1
convolutions instead of linear layers; and the rows of OCAB's bias table have another order (`reorder_overlap_table`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from savl.network import SAVL, SAVLConfig
from savl.ops.relative_position import relative_position_index
from savl.weights.state_dicts import check_fit

# Names of layers in savl → in HAT: outside the blocks, in a HAB, in an OCAB.
_ROOT = {
    "conv_first": "conv_first",
    "norm_first": "patch_embed.norm",
    "norm_last": "norm",
    "conv_last": "conv_after_body",
    "upsampler.reduce.0": "conv_before_upsample.0",
    "upsampler.to_image": "conv_last",
}
_HAB = {
    "norm_attention": "norm1",
    "qkv": "attn.qkv",
    "bias_table": "attn.relative_position_bias_table",
    "proj": "attn.proj",
    "cab.compress": "conv_block.cab.0",
    "cab.expand": "conv_block.cab.2",
    "cab.squeeze": "conv_block.cab.3.attention.1",
    "cab.excite": "conv_block.cab.3.attention.3",
    "norm_mlp": "norm2",
    "mlp.expand": "mlp.fc1",
    "mlp.contract": "mlp.fc2",
}
_OCAB = {
    "norm_attention": "norm1",
    "qkv": "qkv",
    "bias_table": "relative_position_bias_table",
    "proj": "proj",
    "norm_mlp": "norm2",
    "mlp.expand": "mlp.fc1",
    "mlp.contract": "mlp.fc2",
}

_WINDOW_INDEX = "relative_position_index_SA"
_OVERLAP_INDEX = "relative_position_index_OCA"
_PUBLISHED_BLOCK = re.compile(r"layers\.(\d+)\.residual_group\.blocks\.(\d+)\.")
_PUBLISHED_STAGE = re.compile(r"upsample\.\d+\.weight")
_OUR_HAB = re.compile(r"groups\.(\d+)\.habs\.(\d+)\.(.+)")
_OUR_OCAB = re.compile(r"groups\.(\d+)\.ocab\.(.+)")
_OUR_GROUP_CONV = re.compile(r"groups\.(\d+)\.conv\.(.+)")
_OUR_STAGE = re.compile(r"upsampler\.stages\.(.+)")


class HatVariant(ValueError):
    """The tensors of a HAT checkpoint have other names or shapes than those of a `SAVL` without degradation code."""


def hat_config(tensors: Mapping[str, Tensor]) -> SAVLConfig:
    """Derive the configuration from the shapes of the tensors.

    Args:
        tensors: State dict of a HAT checkpoint.

    Returns:
        A configuration with ``degradation_code="none"``. Values that no shape shows are those of every published HAT:
        CAB weight 0.01, the mean colour of DIV2K, shifts of half a window.

    Raises:
        HatVariant: A required tensor is missing, or has a wrong rank or an impossible size.
    """
    try:
        return _derived_config(tensors)
    except ValueError as error:
        raise HatVariant(str(error)) from error


def _derived_config(tensors: Mapping[str, Tensor]) -> SAVLConfig:
    group, block = "layers.0.residual_group.", "layers.0.residual_group.blocks.0."
    channels, colours, *_ = _shape(tensors, "conv_first.weight", 4)
    if colours != 3:
        raise ValueError(f"only RGB checkpoints load, this one's conv_first takes {colours} channels")
    rows, heads = _shape(tensors, block + "attn.relative_position_bias_table", 2)
    window = (_square_root(rows, "rows of the window bias table") + 1) // 2
    rows, _ = _shape(tensors, group + "overlap_attn.relative_position_bias_table", 2)
    key_window = _square_root(rows, "rows of the overlap bias table") + 1 - window

    blocks = {(int(match[1]), int(match[2])) for name in tensors if (match := _PUBLISHED_BLOCK.match(name))}
    groups = sorted({index for index, _ in blocks})
    scale = 1
    for name in filter(_PUBLISHED_STAGE.fullmatch, tensors):
        out_channels, in_channels, *_ = _shape(tensors, name, 4)
        scale *= _square_root(out_channels // in_channels, f"sub-pixels of {name}")
    return SAVLConfig(
        scale=scale,
        channels=channels,
        depths=tuple(sum(index == owner for owner, _ in blocks) for index in groups),
        heads=heads,
        window=window,
        overlap=_ratio(key_window - window, window),
        mlp_ratio=_ratio(_shape(tensors, block + "mlp.fc1.weight", 2)[0], channels),
        cab_compress=channels // _shape(tensors, block + "conv_block.cab.0.weight", 4)[0],
        cab_squeeze=channels // _shape(tensors, block + "conv_block.cab.3.attention.1.weight", 4)[0],
        upsample_features=_shape(tensors, "conv_last.weight", 4)[1],
        degradation_code="none",
    )


def hat_state_dict(tensors: Mapping[str, Tensor], model: SAVL) -> dict[str, Tensor]:
    """Convert a HAT state dict for a network built from its `hat_config`.

    Args:
        tensors: State dict of a HAT checkpoint. The index buffers may be missing, because the windows determine them.
        model: The network, which gives names and shapes. It is not modified.

    Returns:
        A state dict for ``model.load_state_dict``.

    Raises:
        HatVariant: Tensors are missing, unknown or of another shape. The message has their published names.
        ValueError: Tensors are not floating; or an index buffer differs from the published one, so that the rows of the
            bias tables have another meaning.
    """
    window, key_window = model.config.window, model.config.key_window
    ours = model.state_dict()
    expected = {
        published_name(name): (*tensor.shape, 1, 1) if _is_gate_weight(name) else tensor.shape
        for name, tensor in ours.items()
    }
    indices = (_WINDOW_INDEX, _OVERLAP_INDEX)
    weights = {name: tensor for name, tensor in tensors.items() if name not in indices}
    try:
        check_fit(expected, weights)
    except ValueError as error:
        if all(tensor.is_floating_point() for tensor in weights.values()):
            raise HatVariant(str(error)) from error
        raise
    _check_index(tensors, _WINDOW_INDEX, relative_position_index(window, window), (2 * window - 1) ** 2)
    overlap_rows = (window + key_window - 1) ** 2
    _check_index(tensors, _OVERLAP_INDEX, published_overlap_index(window, key_window), overlap_rows)

    renamed = {name: weights[published_name(name)].reshape(tensor.shape) for name, tensor in ours.items()}
    for name in renamed:
        if name.endswith("ocab.bias_table"):
            renamed[name] = reorder_overlap_table(renamed[name], window, key_window)
    return renamed


# Settings of a `SAVLConfig` that a HAT checkpoint does not store. Every published HAT, and every program that opens a
# checkpoint, has these values.
_FIXED: dict[str, Any] = {
    "degradation_code": "none",
    "cab_scale": 0.01,
    "cab_neighbourhood": 0,
    "upsampler": "pixelshuffle",
    "image_residual": False,
    "rgb_mean": (0.4488, 0.4371, 0.4040),
}


def check_expressible(config: SAVLConfig) -> None:
    """Check that the network of a configuration can be stored as a HAT checkpoint.

    Raises:
        ValueError: A setting differs from that of HAT. The message names it, its value and that of HAT.
    """
    other = {name: value for name, value in _FIXED.items() if getattr(config, name) != value}
    if other:
        differences = "; ".join(f"{name} must be {_FIXED[name]!r}, got {getattr(config, name)!r}" for name in other)
        raise ValueError(
            f"model cannot be stored with layout='hat', because HAT differs in its settings: {differences}"
        )


def published_state_dict(model: SAVL) -> dict[str, Tensor]:
    """Return the weights of a network with the names and layouts of a HAT checkpoint. It reverses `hat_state_dict`.

    Args:
        model: A network that `check_expressible` accepts.

    Returns:
        New and shared tensors by name, with HAT's two index buffers.
    """
    window, key_window = model.config.window, model.config.key_window
    published: dict[str, Tensor] = {
        _WINDOW_INDEX: relative_position_index(window, window),
        _OVERLAP_INDEX: published_overlap_index(window, key_window),
    }
    for name, tensor in model.state_dict().items():
        if name.endswith("ocab.bias_table"):
            tensor = reorder_overlap_table(tensor, window, key_window)
        elif _is_gate_weight(name):
            tensor = tensor[:, :, None, None]
        published[published_name(name)] = tensor
    return published


def published_name(name: str) -> str:
    """Return the name that a tensor of a `SAVL` without degradation code has in a HAT checkpoint."""
    if match := _OUR_HAB.fullmatch(name):
        return f"layers.{match[1]}.residual_group.blocks.{match[2]}.{_translate(match[3], _HAB)}"
    if match := _OUR_OCAB.fullmatch(name):
        return f"layers.{match[1]}.residual_group.overlap_attn.{_translate(match[2], _OCAB)}"
    if match := _OUR_GROUP_CONV.fullmatch(name):
        return f"layers.{match[1]}.conv.{match[2]}"
    if match := _OUR_STAGE.fullmatch(name):
        return f"upsample.{match[1]}"
    return _translate(name, _ROOT)


def published_overlap_index(window: int, key_window: int) -> Tensor:
    """Return HAT's OCAB index: the row of its bias table for each (query, key). Negative rows count from the end.

    With the coordinates of queries and keys counted from the first pixel of their own window, and span = w + o − 1,

        HAT's index = (ky − qy + w − o + 1) · span + (kx − qx + w − o + 1)
        our index   = (qy − ky + o − 1) · span + (qx − kx + o − 1)

    so the two add up to w · span + w = w · (w + o).

    Args:
        window: w in pixels.
        key_window: o in pixels.

    Returns:
        ``(w², o²)`` int64, values from −(o − 2)·(w + o) to w·(w + o).
    """
    return window * (window + key_window) - relative_position_index(window, key_window)


def reorder_overlap_table(table: Tensor, window: int, key_window: int) -> Tensor:
    """Reorder the rows of HAT's OCAB bias table as savl has them (`savl.ops.relative_position`), or the reverse.

    Our row r is HAT's row w·(w + o) − r, modulo the number of rows (see `published_overlap_index`): the table is
    reversed, then rotated. Applied twice, this gives the original table.

    Args:
        table: ``((w + o − 1)², heads)`` as published, or as in savl.
        window: w in pixels.
        key_window: o in pixels.
    """
    rows = torch.arange(table.shape[0], device=table.device)
    return table[(window * (window + key_window) - rows) % table.shape[0]]


def _check_index(tensors: Mapping[str, Tensor], name: str, expected: Tensor, rows: int) -> None:
    index = tensors.get(name, expected)
    if index.shape != expected.shape or bool(((index - expected) % rows).any()):
        raise ValueError(
            f"its {name} is not the one that the published HAT has for its windows {tuple(expected.shape)}, "
            f"so the rows of its bias tables mean something else"
        )


def _is_gate_weight(name: str) -> bool:
    return name.endswith((".cab.squeeze.weight", ".cab.excite.weight"))


def _translate(name: str, layers: dict[str, str]) -> str:
    if name in layers:
        return layers[name]
    layer, _, parameter = name.rpartition(".")
    return f"{layers[layer]}.{parameter}"


def _shape(tensors: Mapping[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"it looks like HAT but lacks the tensor {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != rank or 0 in shape:
        raise ValueError(f"its tensor {name} must have {rank} dimensions, none of them empty, got {shape}")
    return shape


def _square_root(value: int, what: str) -> int:
    root = math.isqrt(value)
    if root * root != value:
        raise ValueError(f"the number of {what} must be a square, got {value}")
    return root


def _ratio(part: int, whole: int) -> float:
    """Return a ratio for which ``int(ratio · whole)`` is exactly ``part``, in spite of rounding."""
    ratio = part / whole
    return ratio if int(ratio * whole) == part else math.nextafter(ratio, math.inf)
