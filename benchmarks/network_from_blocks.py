"""Compute the time of savl-base from the times of its blocks, for variants that take long to compile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from savl.network import CONFIGS

OTHER_LAYERS = "other layers"
"""What the network does besides its groups."""
_CONFIG = CONFIGS["savl-base"]
_PARTS = {"DSCA": "dsca", "HAB": "hab", "DA-RHAG": "da-rhag", OTHER_LAYERS: "other-layers"}


def network_from_blocks(parts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the computed time of savl-base by variant.

    The network is its DA-RHAGs and the other layers. Where a variant of DA-RHAG was not measured, which takes long to
    compile, the time of its DSCAs and HABs in this variant counts, multiplied by the ratio of DA-RHAG to DSCAs and HABs
    in eager. Where the other layers were not measured, they count as in eager.

    Args:
        parts: The parts of a report of `benchmarks.gpu_ratios`.

    Returns:
        By variant, ``ms`` and ``from``: the blocks that the time was computed from. Variants of which too little was
        measured are missing.
    """
    groups, depth = len(_CONFIG.depths), _CONFIG.depths[0]
    times = {block: _times(parts, name) for block, name in _PARTS.items()}

    def blocks(variant: str) -> float | None:
        dsca, hab = times["DSCA"].get(variant), times["HAB"].get(variant)
        return None if dsca is None or hab is None else (depth + 1) * dsca + depth * hab

    found: dict[str, dict[str, Any]] = {}
    other_in_eager, group_in_eager, blocks_in_eager = (
        times[OTHER_LAYERS].get("eager"),
        times["DA-RHAG"].get("eager"),
        blocks("eager"),
    )
    for variant in dict.fromkeys(name for each in times.values() for name in each):
        group, source = times["DA-RHAG"].get(variant), "DA-RHAG"
        own = blocks(variant)
        if group is None and None not in (own, group_in_eager, blocks_in_eager):
            group, source = own * group_in_eager / blocks_in_eager, "DSCA and HAB"  # type: ignore[operator]
        other = times[OTHER_LAYERS].get(variant, other_in_eager)
        if group is not None and other is not None:
            found[variant] = {"ms": groups * group + other, "from": source}
    return found


def _times(parts: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return the median times of the variants of a block in milliseconds, from all its parts."""
    found: dict[str, float] = {}
    for part in (f"{name}-max-autotune", name):
        for variant, record in parts.get(part, {}).get("variants", {}).items():
            if "median_ms" in record:
                found[variant] = record["median_ms"]
    return found
