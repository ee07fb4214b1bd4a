"""Draw the figures of docs/benchmarks.md as SVG, from the committed results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cases import FUSED_BFLOAT16
from benchmarks.peers.runtimes import ONNX_RUNTIME, OPENVINO, OPENVINO_DEFAULT
from savl.profile.figure import draw_roofline
from savl.profile.roofline import Ceilings, Point, Roofline

COLOURS = {
    "eager": "#8c8c8c",
    "sdpa": "#c9862b",
    "sdpa, mask kept": "#e0b273",
    "flex": "#7a5fa6",
    "compile": "#3b7dae",
    ONNX_RUNTIME: "#b5536b",
    OPENVINO: "#4f4f9e",
    OPENVINO_DEFAULT: "#9a9ad6",
    "copy": "#bbbbbb",
    "fused": "#1f8a4c",
    FUSED_BFLOAT16: "#7cc49a",
}
MARKERS = {"window attention": "o", "savl-tiny": "s", "savl-base": "D"}
_STYLE = {"svg.hashsalt": "savl", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}


def svg(figure: Figure) -> str:
    """Return a figure as SVG. The text is reproducible, so that a committed file changes only when its data change."""
    out = StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _axes(width: float = 7.2, height: float = 4.4) -> tuple[Figure, Axes]:
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(width, height))
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def growth(points: Sequence[Mapping[str, Any]], quantity: str, limit_gib: float) -> str:
    """Draw how the time or the memory grows with the area of the image, on logarithmic axes.

    Args:
        points: Measurements, as `benchmarks.scaling` records them. Those of tiled images are left out.
        quantity: ``"seconds"`` or ``"peak_bytes"``.
        limit_gib: Memory that each measurement was allowed to use, in GiB.
    """
    figure, axes = _axes()
    rows = [row for row in points if row["series"] == "area"]
    for subject in dict.fromkeys(row["subject"] for row in rows):
        for variant in ("eager", "fused"):
            untiled = [row for row in rows if (row["subject"], row["variant"], row["tile"]) == (subject, variant, 0)]
            measured = [row for row in untiled if row.get(quantity)]
            scale = 1.0 if quantity == "seconds" else 2**-30
            x, y = [row["side"] ** 2 for row in measured], [row[quantity] * scale for row in measured]
            style = {"color": COLOURS[variant], "marker": MARKERS.get(subject, "o"), "markersize": 5}
            axes.plot(x, y, label=f"{subject}, {variant}", linestyle="-" if variant == "fused" else "--", **style)
            if quantity == "peak_bytes":
                for row in untiled:
                    if row.get("failed") == "out of memory":
                        axes.plot(
                            [row["side"] ** 2], [limit_gib], "x", color="#b22222", markersize=9, markeredgewidth=2
                        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sides = sorted({row["side"] for row in rows if row["tile"] == 0})
    axes.set_xticks([side**2 for side in sides], [f"{side}²" for side in sides])
    axes.minorticks_off()
    axes.set_xlabel("LR pixels of the image, processed without tiles")
    if quantity == "seconds":
        axes.set_ylabel("seconds")
    else:
        axes.axhline(limit_gib, color="#b22222", linewidth=1)
        axes.annotate(f"limit of {limit_gib:g} GiB; ×: out of memory", (axes.get_xlim()[0], limit_gib), xytext=(4, 4),
                      textcoords="offset points", color="#b22222")  # fmt: skip
        axes.set_ylabel("peak memory in GiB, without network and image")
    axes.legend(frameon=False, fontsize=9)
    return svg(figure)


def speedups(entries: Mapping[str, Mapping[str, float]]) -> str:
    """Draw the speedup of each variant over eager, as one group of bars per entry.

    Args:
        entries: Median time in seconds, by entry and variant. Every entry has the variant ``"eager"``.
    """
    names = list(entries)
    variants = [name for name in COLOURS if name != "eager" and any(name in times for times in entries.values())]
    figure, axes = _axes(7.6, 0.42 * sum(len(times) - 1 for times in entries.values()) * 0.5 + 1.2)
    position, ticks = 0.0, []
    for name in names:
        times = entries[name]
        shown = [variant for variant in variants if variant in times]
        ticks.append(position + (len(shown) - 1) / 2)
        for variant in shown:
            ratio = times["eager"] / times[variant]
            axes.barh(position, ratio, color=COLOURS[variant], height=0.9)
            axes.annotate(f"{ratio:.2f}", (ratio, position), xytext=(3, 0), textcoords="offset points", va="center",
                          fontsize=8)  # fmt: skip
            position += 1
        position += 0.8
    axes.axvline(1, color="#8c8c8c", linewidth=1)
    axes.set_yticks(ticks, names)
    axes.invert_yaxis()
    axes.set_xlabel("speedup over eager")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[variant]) for variant in variants]
    axes.legend(
        handles,
        variants,
        frameon=False,
        fontsize=9,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=min(len(variants), 4),
    )
    axes.grid(False, axis="y")
    return svg(figure)


def roofline(device: str, dtype: str, ceilings: Ceilings, points: Sequence[Point]) -> str:
    """Draw the measurements of the benchmark suites as a roofline, with `savl.profile`."""
    figure = draw_roofline(Roofline(device, dtype, ceilings, tuple(points)), "forward passes of the ops of savl-base")
    return svg(figure)
