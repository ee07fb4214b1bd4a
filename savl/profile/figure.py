"""Draw the roofline as a figure."""

from __future__ import annotations

import io
from itertools import combinations, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from savl.atomic_write import write_atomically
from savl.ops.op import OPS
from savl.profile.output import amount
from savl.profile.roofline import Roofline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

_COLOURS = dict(zip(OPS, cycle(("#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b")), strict=False))
"""Colours of the ops, distinguishable with colour blindness (Okabe and Ito 2008)."""
_INK = "#333333"


def draw_roofline(roofline: Roofline, subtitle: str = "") -> Figure:
    """Draw the roof, and one point for each op and backend, on logarithmic axes. Points of eager are hollow.

    Args:
        roofline: Measured roofline.
        subtitle: Description of the measured computation, in one line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.6), layout="constrained")
    FigureCanvasAgg(figure)  # instead of pyplot, which keeps global state and may open a window
    axes = figure.add_subplot()
    ceilings, points = roofline.ceilings, roofline.points
    intensities = [point.intensity for point in points] + [ceilings.ridge]
    speeds = [point.gflops for point in points]
    left, right = min(intensities) / 4, max(intensities) * 6
    bottom = min([*speeds, ceilings.roof(left)]) / 2.5
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, 2.5 * max(ceilings.gflops, *speeds)))
    corner = [left, ceilings.ridge, right]
    roof = [ceilings.roof(each) for each in corner]
    axes.plot(corner, roof, color=_INK, linewidth=1.6, zorder=2)
    axes.fill_between(corner, roof, bottom, color=_INK, alpha=0.04, linewidth=0, zorder=0)
    axes.grid(which="major", color="#dddddd", linewidth=0.6, zorder=1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("arithmetic intensity, FLOP/byte")
    axes.set_ylabel("speed, GFLOP/s")
    title = f"Roofline of {roofline.device}, {roofline.dtype}"
    axes.set_title(f"{title}\n{subtitle}" if subtitle else title, fontsize=10, loc="left")
    for op, colour in _COLOURS.items():  # a line between the points of eager and fused
        ends = [(point.intensity, point.gflops) for point in points if point.op == op]
        axes.plot([x for x, _ in ends], [y for _, y in ends], color=colour, linewidth=1, alpha=0.4, zorder=3)
    for point in points:
        fused = point.backend != "eager"
        colour = _COLOURS[point.op]
        face = colour if fused else "white"
        axes.plot(
            point.intensity, point.gflops, "o", markersize=8, color=colour, markerfacecolor=face, linewidth=2, zorder=4
        )
    _add_legend(figure, roofline)
    figure.draw_without_rendering()  # the layout is needed to place labels in pixels
    _add_labels(axes, roofline)
    return figure


def save_roofline(figure: Figure, path: Path, *, overwrite: bool) -> None:
    """Write the figure to a file. An error leaves no partial file.

    Args:
        figure: Result of `draw_roofline`.
        path: Path that ends in ``.svg``, ``.pdf`` or ``.png``.
        overwrite: Whether to replace an existing file.

    Raises:
        FileExistsError: The file exists and ``overwrite`` is False.
        OSError: The file cannot be written.
    """
    from matplotlib import rc_context

    buffer = io.BytesIO()
    suffix = path.suffix.removeprefix(".").lower()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix, {})
    with rc_context({"svg.hashsalt": "savl"}):
        figure.savefig(buffer, format=suffix, dpi=150, metadata=undated)
    write_atomically(path, buffer.getvalue(), overwrite=overwrite)


def _add_legend(figure: Figure, roofline: Roofline) -> None:
    from matplotlib.lines import Line2D

    backends = sorted({point.backend for point in roofline.points} - {"eager"})
    handles = [Line2D([], [], color=_INK, linewidth=1.6, label="roof, measured")]
    kinds = [("eager", "white")] + ([(f"fused ({', '.join(backends)})", _INK)] if backends else [])
    for label, face in reversed(kinds):
        handles.append(
            Line2D([], [], marker="o", linestyle="", markersize=8, color=_INK, markerfacecolor=face, label=label)
        )
    figure.legend(handles=handles, loc="outside lower center", ncol=3, frameon=False, fontsize=9)


def _add_labels(axes: Axes, roofline: Roofline) -> None:
    """Label the ceilings and the ops, and avoid labels that cover points, lines or other labels."""
    ceilings = roofline.ceilings
    by_op: dict[str, dict[str, float]] = {}
    for point in roofline.points:
        by_op.setdefault(point.op, {})[point.backend] = point.gflops
    places = axes.transData.transform([(point.intensity, point.gflops) for point in roofline.points])
    occupied: list[Any] = [_box(x, y, 7) for x, y in places]
    occupied += [_box(x, y, 2) for x, y in _pixels_of_roof(axes, roofline)]
    for op in by_op:  # lines between the points of eager and fused
        on_line = [place for place, point in zip(places, roofline.points, strict=True) if point.op == op]
        (x, bottom), (_, top) = min(on_line, key=lambda each: each[1]), max(on_line, key=lambda each: each[1])
        occupied.append(_box(x, bottom, 2).union([_box(x, bottom, 2), _box(x, top, 2)]))
    peak, copy = f"{amount(ceilings.gflops)} GFLOP/s, matrix product", f"{amount(ceilings.gigabytes)} GB/s, copy"
    end = (axes.get_xlim()[1], ceilings.gflops)
    text = axes.annotate(
        peak, end, (-4, 5), textcoords="offset points", ha="right", va="bottom", fontsize=8.5, color=_INK
    )
    occupied.append(text.get_window_extent())
    occupied.append(_label_slope(axes, roofline, copy, occupied[: len(places)]))
    intensities = {point.op: point.intensity for point in roofline.points}
    labels = []
    for op, speeds in by_op.items():
        label = op.replace("_window_attention", "\nwindow attention").replace("_", " ")
        fused = max((speed for backend, speed in speeds.items() if backend != "eager"), default=None)
        if fused is not None:
            label += f"\n{fused / speeds['eager']:.2g}× eager"
        labels.append((label, (intensities[op], max(speeds.values())), _COLOURS[op]))
    _place_labels(axes, labels, occupied)


_POSITIONS = [
    (x, y, horizontal, vertical)
    for y, vertical in (
        (0, "center"),
        (-8, "top"),
        (8, "bottom"),
        (-30, "top"),
        (30, "bottom"),
        (-60, "top"),
        (60, "bottom"),
    )
    for x, horizontal in ((10, "left"), (-10, "right"), (0, "center"), (40, "left"), (-40, "right"))
    if x or y
]
"""Possible positions of a label relative to its data point, the best first: x and y offset in typographic points,
horizontal and vertical alignment."""


def _place_labels(axes: Axes, labels: list[tuple[str, tuple[float, float], str]], occupied: list[Any]) -> None:
    """Place labels beside their data points, in the combination of positions with the fewest overlaps.

    Args:
        axes: Axes to draw in.
        labels: Text, data point and colour of each label.
        occupied: Boxes, in pixels, that labels should not cover.
    """
    inside = axes.get_window_extent()
    texts: list[list[Text]] = []
    boxes: list[list[Any]] = []
    costs: list[list[float]] = []
    for label, at, colour in labels:
        texts.append([])
        for x, y, horizontal, vertical in _POSITIONS:
            text = axes.annotate(
                label, at, (x, y), textcoords="offset points", ha=horizontal, va=vertical, fontsize=9, color=colour
            )
            text.set_linespacing(1.15)
            texts[-1].append(text)
        boxes.append([text.get_window_extent() for text in texts[-1]])
        costs.append([])
        for index, box in enumerate(boxes[-1]):
            covered = sum(box.overlaps(other) for other in occupied)
            outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            costs[-1].append(float(covered + 100 * outside + index / 100))
    pairs = list(combinations(range(len(labels)), 2))
    clash = {
        (one, other): [[10.0 * bool(a.overlaps(b)) for b in boxes[other]] for a in boxes[one]] for one, other in pairs
    }

    def cost(chosen: tuple[int, ...]) -> float:
        total = sum(costs[index][position] for index, position in enumerate(chosen))
        return total + sum(clash[one, other][chosen[one]][chosen[other]] for one, other in pairs)

    # All combinations are too many. Each label in turn takes its best position, from several starts, until none moves.
    best = tuple(each.index(min(each)) for each in costs)
    for start in range(len(_POSITIONS)):
        chosen = [
            each.index(min(each)) if start == 0 else (start + 5 * place) % len(each) for place, each in enumerate(costs)
        ]
        moved = True
        while moved:
            before = list(chosen)
            for index in range(len(chosen)):
                costs_here = [cost((*chosen[:index], at, *chosen[index + 1 :])) for at in range(len(_POSITIONS))]
                chosen[index] = costs_here.index(min(costs_here))
            moved = chosen != before
        best = min(best, tuple(chosen), key=cost)
    for index, positions in enumerate(texts):
        for position, unused in enumerate(positions):
            if position != best[index]:
                unused.remove()


def _label_slope(axes: Axes, roofline: Roofline, label: str, points: list[Any]) -> Any:
    """Draw a label above the slope of the roof, where it covers no points, and return its box in pixels."""
    ceilings = roofline.ceilings
    left = axes.get_xlim()[0]
    ends = axes.transData.transform([(x, ceilings.gigabytes * x) for x in (left, ceilings.ridge)])
    (dx, dy) = ends[1] - ends[0]
    angle = float(np.degrees(np.arctan2(dy, dx)))
    distance = 5.0  # in typographic points, perpendicular to the slope
    offset = (-distance * np.sin(np.radians(angle)), distance * np.cos(np.radians(angle)))
    covered: dict[float, int] = {}
    for share in (0.5, 0.35, 0.65, 0.25, 0.75, None):  # of the slope, on the logarithmic axis; at last the best one
        share = min(covered, key=covered.__getitem__) if share is None else share
        at = left ** (1 - share) * ceilings.ridge**share
        text = axes.annotate(
            label,
            (at, ceilings.gigabytes * at),
            offset,
            textcoords="offset points",
            rotation=angle,
            rotation_mode="anchor",
            ha="center",
            va="bottom",
            fontsize=8.5,
            color=_INK,
        )
        box = text.get_window_extent()
        if share in covered:
            break
        covered[share] = sum(box.overlaps(point) for point in points)
        if covered[share] == 0:
            break
        text.remove()
    return box


def _pixels_of_roof(axes: Axes, roofline: Roofline) -> Any:
    """Return points of the roof, as an array of x and y in pixels."""
    left, right = axes.get_xlim()
    at = np.geomspace(left, right, 200)
    return axes.transData.transform([(x, roofline.ceilings.roof(float(x))) for x in at])


def _box(x: float, y: float, half: float) -> Any:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - half, y - half, x + half, y + half)
