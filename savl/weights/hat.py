"""Published HAT checkpoints: read the architecture off the tensors, and rename the tensors to ours.

Names and layouts are those of the public HAT release (Chen et al., 2023). Two things differ besides names: its
``relative_position_index`` buffers are derived here, and its OCAB bias table is addressed by an index that runs negative
and wraps around, so its rows are a cyclic permutation of ours.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from savl.network import SAVLConfig

_ROOT = {
    "conv_first": "conv_first",
    "patch_embed.norm": "norm_first",
    "norm": "norm_last",
    "conv_after_body": "conv_last",
    "conv_before_upsample.0": "upsampler.reduce.0",
    "conv_last": "upsampler.to_image",
}
_HAB = {
    "norm1": "norm_attention",
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "attn.relative_position_bias_table": "bias_table",
    "conv_block.cab.0": "cab.compress",
    "conv_block.cab.2": "cab.expand",
    "conv_block.cab.3.attention.1": "cab.squeeze",
    "conv_block.cab.3.attention.3": "cab.excite",
    "norm2": "norm_mlp",
    "mlp.fc1": "mlp.expand",
    "mlp.fc2": "mlp.contract",
}
_OCAB = {
    "norm1": "norm_attention",
    "qkv": "qkv",
    "proj": "proj",
    "relative_position_bias_table": "bias_table",
    "norm2": "norm_mlp",
    "mlp.fc1": "mlp.expand",
    "mlp.fc2": "mlp.contract",
}
_DERIVED = re.compile(r"(^|\.)(relative_position_index(_SA|_OCA)?|attn_mask|mean)$")
_HAB_KEY = re.compile(r"layers\.(\d+)\.residual_group\.blocks\.(\d+)\.(.+)")
_OCAB_KEY = re.compile(r"layers\.(\d+)\.residual_group\.overlap_attn\.(.+)")
_GROUP_KEY = re.compile(r"layers\.(\d+)\.conv\.(weight|bias)")
_STAGE_KEY = re.compile(r"upsample\.(\d+)\.(weight|bias)")


def is_hat(tensors: dict[str, Tensor]) -> bool:
    """Whether a state dict has the marks of a HAT checkpoint."""
    return "conv_first.weight" in tensors and any("residual_group.overlap_attn" in name for name in tensors)


def hat_config(tensors: dict[str, Tensor]) -> SAVLConfig:
    """Read the hyper-parameters off the tensors.

    Args:
        tensors: State dict of a HAT checkpoint.

    Returns:
        A configuration without degradation code. The ones no tensor shows (CAB weight 0.01) are HAT's.

    Raises:
        ValueError: A tensor that should be there is missing, or shapes contradict each other.
    """
    try:
        channels = tensors["conv_first.weight"].shape[0]
        depths: dict[int, int] = {}
        for name in tensors:
            if match := _HAB_KEY.fullmatch(name):
                group, block = int(match[1]), int(match[2])
                depths[group] = max(depths.get(group, 0), block + 1)
        block0 = "layers.0.residual_group.blocks.0."
        table = tensors[block0 + "attn.relative_position_bias_table"]
        window = (_square_root(table.shape[0]) + 1) // 2
        overlap_table = tensors["layers.0.residual_group.overlap_attn.relative_position_bias_table"]
        key_window = _square_root(overlap_table.shape[0]) + 1 - window
        stages = {int(m[1]): tensors[name] for name in tensors if (m := _STAGE_KEY.fullmatch(name)) and m[2] == "weight"}
        scale = 1
        for weight in stages.values():
            scale *= _square_root(weight.shape[0] // weight.shape[1])
        config = SAVLConfig(
            scale=scale,
            channels=channels,
            depths=tuple(depths[group] for group in sorted(depths)),
            heads=table.shape[1],
            window=window,
            overlap=(key_window - window) / window,
            mlp_ratio=tensors[block0 + "mlp.fc1.weight"].shape[0] / channels,
            cab_compress=channels // tensors[block0 + "conv_block.cab.0.weight"].shape[0],
            cab_squeeze=channels // tensors[block0 + "conv_block.cab.3.attention.1.weight"].shape[0],
            upsample_features=tensors["conv_last.weight"].shape[1],
            degradation_code="none",
        )
        if tensors["conv_first.weight"].shape[1] != 3:
            raise ValueError(f"only RGB checkpoints load, this one takes {tensors['conv_first.weight'].shape[1]} channels")
    except KeyError as error:
        raise ValueError(f"the HAT checkpoint lacks the tensor {error.args[0]!r}") from error
    return replace(config)


def hat_state_dict(tensors: dict[str, Tensor], config: SAVLConfig) -> dict[str, Tensor]:
    """Rename a HAT state dict to the names of `savl.network.SAVL`.

    Raises:
        ValueError: A tensor has no place in the architecture.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _DERIVED.search(name):
            continue
        target = _rename(name)
        if target is None:
            raise ValueError(f"the HAT checkpoint has a tensor {name!r} that the HAT architecture does not know")
        if target.endswith("ocab.bias_table"):
            tensor = unwrap_overlap_table(tensor, config.window, config.key_window)
        elif ".cab.squeeze." in target or ".cab.excite." in target:
            tensor = tensor.flatten(1) if tensor.dim() == 4 else tensor  # 1×1 convolution → linear layer
        renamed[target] = tensor.float()
    return renamed


def unwrap_overlap_table(table: Tensor, window: int, key_window: int) -> Tensor:
    """Reorder HAT's OCAB bias table so that row (dy + half)·span + dx + half serves (dy, dx) = query − key.

    HAT numbers pairs by key − query, offset by w − o + 1 instead of w − 1 (span = w + o − 1 values per axis), so most of
    its numbers are negative and address the table from its end. Modulo the number of rows that is a cyclic shift.

    Args:
        table: ``((w + o − 1)², heads)`` as published.
        window: w in pixels.
        key_window: o in pixels.
    """
    span = window + key_window - 1
    row = torch.arange(span * span)
    key_minus_query = span * span - 1 - row  # our row reversed: both axes run from key − query = −(w − 1) in o-coordinates
    published = (key_minus_query - (key_window - 2 + 0) * (span + 1)) % (span * span)
    return table[published.to(table.device)]


def _rename(name: str) -> str | None:
    if match := _HAB_KEY.fullmatch(name):
        inner = _translate(match[3], _HAB)
        return inner and f"groups.{match[1]}.habs.{match[2]}.{inner}"
    if match := _OCAB_KEY.fullmatch(name):
        inner = _translate(match[2], _OCAB)
        return inner and f"groups.{match[1]}.ocab.{inner}"
    if match := _GROUP_KEY.fullmatch(name):
        return f"groups.{match[1]}.conv.{match[2]}"
    if match := _STAGE_KEY.fullmatch(name):
        return f"upsampler.stages.{match[1]}.{match[2]}"
    return _translate(name, _ROOT)


def _translate(name: str, names: dict[str, str]) -> str | None:
    if name in names:
        return names[name]
    stem, _, leaf = name.rpartition(".")
    return f"{names[stem]}.{leaf}" if stem in names and leaf in ("weight", "bias") else None


def _square_root(value: int) -> int:
    root = round(value**0.5)
    if root * root != value:
        raise ValueError(f"expected a square number of table rows or sub-pixels, got {value}")
    return root
