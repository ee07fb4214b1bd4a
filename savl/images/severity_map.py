"""The severity map as a picture: colours for values, and a bar that says which is which."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_DPI = 100
# Small maps are enlarged by a whole factor to about this many pixels, or the bar's labels would dwarf them.
_LONG_SIDE = 512
_MARGIN = 12
_BAR_WIDTH = 20
_LABEL_WIDTH = 72


def draw_severity(
    severity: NDArray[np.float32], limits: tuple[float, float] = (0.0, 2.0), label: str = "severity"
) -> NDArray[np.uint8]:
    """Draws a severity map in matplotlib's viridis, with a colour bar at its right.

    The range is fixed so that colours mean the same from picture to picture. Pixels stay squares of one colour,
    one per input pixel, so that nothing is shown that was not measured.

    Args:
        severity: (h, w) float; values outside the limits are drawn as the nearest end.
        limits: what the ends of the colour bar stand for. [0, 2] is for maps as networks give them, where 1 is
            the picture's average severity; the ground truth of a degradation lies in [0, 1].
        label: what stands beside the colour bar.

    Returns:
        (H, W, 3) uint8 RGB on white; the map itself starts at pixel (12, 12) from the top left and measures a
        whole multiple of (h, w).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    factor = max(1, round(_LONG_SIDE / max(severity.shape)))
    height, width = (side * factor for side in severity.shape)
    bar_height = max(height, 120)
    total_width = _MARGIN + width + _MARGIN + _BAR_WIDTH + _LABEL_WIDTH
    total_height = _MARGIN + bar_height + _MARGIN

    mapping = ScalarMappable(Normalize(*limits), "viridis")
    # Drawn by the figure object itself: pyplot would keep state and could open a window.
    figure = Figure(figsize=(total_width / _DPI, total_height / _DPI), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    left = (_MARGIN + width + _MARGIN) / total_width
    bar = figure.add_axes((left, _MARGIN / total_height, _BAR_WIDTH / total_width, bar_height / total_height))
    figure.colorbar(mapping, cax=bar, ticks=np.linspace(*limits, 5), label=label)
    canvas.draw()
    picture = np.array(canvas.buffer_rgba())[:, :, :3]

    # Pasted, not drawn: the figure would resample the map.
    coloured = mapping.to_rgba(np.asarray(severity), bytes=True)[:, :, :3]
    enlarged = coloured.repeat(factor, axis=0).repeat(factor, axis=1)
    picture[_MARGIN : _MARGIN + height, _MARGIN : _MARGIN + width] = enlarged
    return picture
