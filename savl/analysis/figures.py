"""Figures of an analysis, each as the bytes of a PNG or SVG file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from savl.analysis.channels import ChannelResponse
from savl.analysis.controlled import DegradedFeatures
from savl.evaluation.geometry import ClassMeanGeometry
from savl.evaluation.intervals import AnalysisUnavailable, Correlation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GENERATOR = "savl analyze"
"""Generator named in SVG files and in the page, by which an older report is recognised and replaced."""
NAMES = {"noise": "noise", "blur": "blur", "jpeg": "JPEG"}
DPI = 120
PANEL = 3.6
"""Side of a panel in inches."""
COLUMNS = 3
MOST_IN_LEGEND = 12
"""Largest number of classes in a legend."""
MOST_POINTS = 1500
"""Largest number of images in one embedding; t-SNE then takes seconds."""


def severity_by_level(data: Sequence[DegradedFeatures], correlations: Sequence[Correlation | None]) -> bytes:
    """Draw box plots of the images' severity at every level, one panel per degradation."""
    figure, panels = _panels(len(data))
    for axes, each, correlation in zip(panels, data, correlations, strict=True):
        severity = each.features[0].severity
        assert severity is not None
        groups = [severity[each.level == level] for level in range(len(each.degradation.amounts))]
        boxes = axes.boxplot(
            groups, tick_labels=each.degradation.labels, widths=0.6, patch_artist=True,
             flierprops={"marker": ".", "markersize": 3, "markeredgecolor": "0.5"},
            medianprops={"color": "black"},
        )  # fmt: skip
        for box, colour in zip(boxes["boxes"], _ordered(len(groups)), strict=True):
            box.set_facecolor(colour)
        axes.set_title(_with_correlation(NAMES[each.degradation.name], correlation), fontsize=10)
        axes.set_xlabel(each.degradation.unit, fontsize=9)
        axes.set_ylabel("severity 1 − v̄" if axes is panels[0] else "", fontsize=9)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    return _png(figure)


def severity_by_number(
    name: str, amounts: NDArray[np.float64], severity: NDArray[np.float32], correlation: Correlation | None
) -> bytes:
    """Draw the severity of the images of a table against a numeric factor."""
    from matplotlib.ticker import LogLocator

    figure, (axes,) = _panels(1)
    order = np.argsort(amounts)
    amounts, severity = amounts[order], severity[order]
    axes.scatter(amounts, severity, s=14, color=_ordered(3)[1], alpha=0.7, edgecolors="none")
    levels = np.unique(amounts)
    if len(levels) <= MOST_IN_LEGEND:
        medians = [float(np.median(severity[amounts == level])) for level in levels]
        axes.plot(levels, medians, color="black", linewidth=1, marker="_", markersize=14, label="median")
        axes.legend(fontsize=8, frameon=False)
    if _is_wide(levels):
        axes.set_xscale("log")
        if len(levels) <= MOST_IN_LEGEND and (levels[1:] / levels[:-1]).min() > 1.5:
            axes.set_xticks(levels, [f"{level:g}" for level in levels], fontsize=8)
        else:  # ticks at 1, 2 and 5 unless those are too many
            steps = (1.0, 2.0, 5.0) if levels[-1] / levels[0] < 1000 else (1.0,)
            axes.xaxis.set_major_locator(LogLocator(subs=steps))
            axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    axes.set_title(_with_correlation("", correlation), fontsize=10)
    axes.set_xlabel(name, fontsize=9, parse_math=False)
    axes.set_ylabel("severity 1 − v̄", fontsize=9)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    return _png(figure)


def embedding(features: NDArray[np.float32], seed: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Compute t-SNE of standardised features (van der Maaten and Hinton, 2008).

    Args:
        features: ``(n, R)``, n at least 4.
        seed: Seed of the embedding, and of the choice of images if there are more than `MOST_POINTS`.

    Returns:
        Rows of the embedded images ``(m,)``, ascending, and their positions ``(m, 2)``.

    Raises:
        AnalysisUnavailable: scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise AnalysisUnavailable("t-SNE", "scikit-learn", error) from error
    rows = np.arange(len(features))
    if len(rows) > MOST_POINTS:
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MOST_POINTS])
    chosen = features[rows].astype(np.float64)
    spread = chosen.std(axis=0)
    chosen = (chosen - chosen.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    start = "pca" if (spread > 0).sum() >= 2 else "random"  # PCA needs two features that vary
    places = TSNE(perplexity=perplexity, init=start, random_state=seed).fit_transform(chosen)
    return rows, np.asarray(places, dtype=np.float32)


@dataclass(frozen=True)
class Colouring:
    """A variable that the points of an embedding are coloured by."""

    values: Sequence[float | str | None]
    """One value per point: numbers are mapped to a continuous scale, names to one colour per class, None to gray."""
    order: tuple[str, ...] | None = None
    """Order of the classes if they are ordinal; their colours are then ordered too."""

    def of(self, rows: NDArray[np.int64]) -> Colouring:
        """Return the colouring of some of the points."""
        return Colouring([self.values[row] for row in rows], self.order)


def coloured_embeddings(places: NDArray[np.float32], colourings: Mapping[str, Colouring]) -> bytes:
    """Draw one embedding ``(m, 2)`` once per colouring, with the names of the colourings as titles."""
    figure, panels = _panels(len(colourings))
    for axes, (title, colouring) in zip(panels, colourings.items(), strict=True):
        _colour_points(axes, places, colouring)
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal", adjustable="datalim")
    return _png(figure)


def _colour_points(axes: Axes, places: NDArray[np.float32], colouring: Colouring) -> None:
    from matplotlib.colors import LogNorm

    known = np.asarray([value is not None for value in colouring.values])
    axes.scatter(places[~known, 0], places[~known, 1], s=8, color="0.8", edgecolors="none")
    places, values = places[known], [value for value in colouring.values if value is not None]
    if not any(isinstance(value, str) for value in values):
        amounts = np.asarray(values, dtype=np.float64)
        norm = LogNorm() if _is_wide(amounts) else None
        drawn = axes.scatter(
            places[:, 0], places[:, 1], s=10, c=amounts, cmap="viridis", norm=norm, edgecolors="none"
        )  # fmt: skip
        bar = axes.figure.colorbar(drawn, ax=axes, fraction=0.045, pad=0.02, format="{x:g}")
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=7)
        return
    present = dict.fromkeys(map(str, values))
    classes = [name for name in colouring.order or present if name in present]
    colours = _classes(len(classes)) if colouring.order is None else _ordered(len(classes))
    for number, (name, colour) in enumerate(zip(classes, colours, strict=True)):
        of_class = np.asarray([value == name for value in values])
        axes.scatter(places[of_class, 0], places[of_class, 1], s=10, color=colour, label=number, edgecolors="none")
    if len(classes) <= MOST_IN_LEGEND:
        legend = axes.legend(fontsize=7, markerscale=1.6, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        for text, name in zip(legend.get_texts(), classes, strict=True):  # matplotlib would hide labels such as _a
            text.set_text(name)
            text.set_parse_math(False)
    else:
        axes.set_xlabel(f"{len(classes)} classes", fontsize=8)


def _is_wide(amounts: NDArray[np.float64]) -> bool:
    """Return whether positive numbers span more than a factor of ten, as ISO does; their scale is then logarithmic."""
    return bool(amounts.min() > 0 and amounts.max() / amounts.min() > 10)


def channel_heatmaps(responses: Sequence[ChannelResponse]) -> bytes:
    """Draw the response of every channel to each degradation as a heatmap, and its R² over all scenes as bars.

    Channels are in the same order everywhere, sorted by the slope of the first response.
    """
    from matplotlib.figure import Figure

    order = np.argsort(responses[0].slope)
    limit = max(float(np.abs(np.asarray(each.sweep)).max()) for each in responses) or 1.0
    figure = Figure(figsize=(3 * PANEL, 1.9 * PANEL), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(1, 2 * len(responses), width_ratios=[3, 1] * len(responses))
    for place, each in enumerate(responses):
        heatmap, bars = figure.add_subplot(grid[2 * place]), figure.add_subplot(grid[2 * place + 1])
        moved = np.asarray(each.sweep)[order]
        drawn = heatmap.imshow(moved, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        marks = range(0, len(each.amounts), 2)
        labels = [100 - each.amounts[mark] if each.name == "jpeg" else each.amounts[mark] for mark in marks]
        heatmap.set_xticks(list(marks), [f"{label:.3g}" for label in labels], fontsize=7)
        heatmap.set_xlabel({"noise": "σ, 8-bit units", "blur": "σ, pixels", "jpeg": "quality"}[each.name], fontsize=8)
        heatmap.set_title(NAMES[each.name], fontsize=10)
        heatmap.set_yticks([])
        heatmap.set_ylabel(f"{len(order)} channels of the mean" if place == 0 else "", fontsize=8)
        bars.barh(np.arange(len(order)), np.asarray(each.r_squared)[order], height=1.0, color="0.45")
        bars.set_ylim(len(order) - 0.5, -0.5)
        bars.set_xlim(0, 1)
        bars.set_yticks([])
        bars.set_xticks([0, 1], ["0", "1"], fontsize=7)
        bars.set_xlabel("R²", fontsize=8)
        for side in ("top", "right", "left"):
            bars.spines[side].set_visible(False)
        if place == len(responses) - 1:
            bar = figure.colorbar(drawn, ax=bars, fraction=0.25, pad=0.1)
            bar.set_label("change, standard deviations", fontsize=8)
            bar.ax.tick_params(labelsize=7)
    return _png(figure)


def class_mean_rays(geometries: Mapping[str, ClassMeanGeometry]) -> bytes:
    """Draw the class means of fields along their first three principal components, as SVG.

    Each network has one row of two panels. Both show the first component to the right; the second panel shows the third
    component instead of the second. Each degradation is a line from its clean mean to its strongest level.

    Args:
        geometries: Geometry of the class means by the name of the network; at least one.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * PANEL, 1.09 * PANEL * len(geometries)), layout="constrained")
    rows = figure.subfigures(len(geometries), squeeze=False)[:, 0]
    for row, (name, geometry) in zip(rows, geometries.items(), strict=True):
        pairs = [f"{NAMES[a]}–{NAMES[b]} {geometry.cosines[f'{a}_{b}']:+.2f}" for a, b in combinations(NAMES, 2)]
        row.suptitle(
            f"{name}: participation ratio {geometry.participation_ratio:.2f}\ncosines: {', '.join(pairs)}",
            fontsize=9, parse_math=False,
        )  # fmt: skip
        places = np.asarray(geometry.positions)
        limit = 1.08 * float(np.abs(places).max()) or 1.0
        for axes, vertical in zip(row.subplots(1, 2), (1, 2), strict=True):
            for colour, (degradation, ray) in enumerate(zip(NAMES, places, strict=True)):
                drawn = {"color": f"C{colour}", "label": NAMES[degradation]}
                axes.plot(ray[:, 0], ray[:, vertical], linewidth=1.2, color=drawn["color"])
                axes.scatter(
                    ray[:, 0], ray[:, vertical], s=np.square(np.linspace(2, 8, len(ray))), linewidths=0, **drawn
                )
            clean = places[:, 0].mean(axis=0)
            axes.scatter(clean[0], clean[vertical], s=14, color="black", linewidths=0, label="clean", zorder=3)
            for which, place in ((axes.set_xlabel, 0), (axes.set_ylabel, vertical)):
                which(f"component {place + 1} ({100 * geometry.explained[place]:.1f} %)", fontsize=8)
            axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
            axes.tick_params(labelsize=7)
            axes.grid(color="0.92")
            axes.set_axisbelow(True)
        axes.legend(fontsize=8, frameon=False)
    file = io.BytesIO()
    # Fixed identifiers and no date: the same figure has the same bytes. Text stays text, which keeps files small.
    with matplotlib.rc_context({"svg.hashsalt": "savl", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Creator": GENERATOR, "Date": None})
    return file.getvalue()


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels in rows of at most `COLUMNS`."""
    from matplotlib.figure import Figure

    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    # Without pyplot, which would keep global state and could open a window.
    figure = Figure(figsize=(columns * PANEL * 1.15, rows * PANEL), dpi=DPI, layout="constrained")
    panels = [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
    for axes in panels:
        axes.tick_params(labelsize=8)
    return figure, panels


def _with_correlation(title: str, correlation: Correlation | None) -> str:
    if correlation is None:
        return title
    found = f"Spearman {correlation.value:+.2f} [{correlation.low:+.2f}, {correlation.high:+.2f}]"
    return f"{title}: {found}" if title else found


def _ordered(count: int) -> list[tuple[float, ...]]:
    from matplotlib import colormaps

    return [tuple(colour) for colour in colormaps["viridis"](np.linspace(0.15, 0.95, count))]


def _classes(count: int) -> list[tuple[float, ...]]:
    from matplotlib import colormaps

    if count <= 10:
        return [tuple(colormaps["tab10"](place)) for place in range(count)]
    return [tuple(colour) for colour in colormaps["turbo"](np.linspace(0.02, 0.98, count))]


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    file = io.BytesIO()
    # Without the name and version of the software, so that the same figure has the same bytes everywhere.
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
