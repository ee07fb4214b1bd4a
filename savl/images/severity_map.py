"""The severity map as a picture: colours for values, and a bar that says which is which."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from savl.images.viridis import viridis

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# Small maps are enlarged by a whole factor to about this many pixels, or the bar's labels would dwarf them.
_LONG_SIDE = 512
_MARGIN = 12
_BAR_WIDTH = 20
_LABEL_WIDTH = 72
_TICK = 5
_FONT_SIZE = 14
_INK = (0, 0, 0)


def draw_severity(
    severity: NDArray[np.float32], limits: tuple[float, float] = (0.0, 2.0), label: str = "severity"
) -> NDArray[np.uint8]:
    """Draw a severity map in viridis, with a colour bar at its right.

    The range is fixed so that colours mean the same from picture to picture. Pixels stay squares of one colour,
    one per input pixel, so that nothing is shown that was not measured.

    Args:
        severity: (h, w) float; values outside the limits are drawn as the nearest end.
        limits: What the ends of the colour bar stand for. [0, 2] is for maps as networks give them, where 1 is
            the picture's average severity; the ground truth of a degradation lies in [0, 1].
        label: What stands beside the colour bar.

    Returns:
        (H, W, 3) uint8 RGB on white; the map itself starts at pixel (12, 12) from the top left and measures a
        whole multiple of (h, w).
    """
    factor = max(1, round(_LONG_SIDE / max(severity.shape)))
    height, width = (side * factor for side in severity.shape)
    bar_height = max(height, 120)
    total_width = _MARGIN + width + _MARGIN + _BAR_WIDTH + _LABEL_WIDTH
    picture = np.full((_MARGIN + bar_height + _MARGIN, total_width, 3), 255, dtype=np.uint8)
    low, high = limits
    coloured = viridis((np.asarray(severity, dtype=np.float64) - low) / (high - low))
    picture[_MARGIN : _MARGIN + height, _MARGIN : _MARGIN + width] = coloured.repeat(factor, axis=0).repeat(
        factor, axis=1
    )
    # Drawn apart and pasted: of a large map Pillow would copy every pixel back and forth.
    left = _MARGIN + width + _MARGIN
    picture[:, left:] = np.asarray(_colour_bar(bar_height, limits, label))
    return picture


def _colour_bar(height: int, limits: tuple[float, float], label: str) -> Picture:
    """Return the bar with five labelled ticks and its name, margins above and below included."""
    from PIL import Image, ImageDraw, ImageFont

    bar = Image.new("RGB", (_BAR_WIDTH + _LABEL_WIDTH, _MARGIN + height + _MARGIN), "white")
    gradient = viridis(np.linspace(1, 0, height))[:, None].repeat(_BAR_WIDTH, axis=1)
    bar.paste(Image.fromarray(gradient), (0, _MARGIN))
    draw = ImageDraw.Draw(bar)
    draw.rectangle((0, _MARGIN, _BAR_WIDTH - 1, _MARGIN + height - 1), outline=_INK)
    font = ImageFont.load_default(_FONT_SIZE)
    ticks = np.linspace(*limits, 5)
    decimals = 1 if np.allclose(ticks, np.round(ticks, 1)) else 2
    labels = [f"{tick:.{decimals}f}" for tick in ticks]
    for y, text in zip(np.linspace(_MARGIN + height - 1, _MARGIN, 5), labels, strict=True):
        draw.line((_BAR_WIDTH, round(y), _BAR_WIDTH + _TICK - 1, round(y)), fill=_INK)
        draw.text((_BAR_WIDTH + _TICK + 3, round(y)), text, fill=_INK, font=font, anchor="lm")
    left, top, right, bottom = font.getbbox(label)
    name = Image.new("RGB", (round(right - left) + 2, round(bottom - top) + 2), "white")
    ImageDraw.Draw(name).text((1 - left, 1 - top), label, fill=_INK, font=font)
    turned = name.transpose(Image.Transpose.ROTATE_90)
    # Centred between the numbers and the right edge.
    numbers = _BAR_WIDTH + _TICK + 3 + max(round(font.getlength(text)) for text in labels)
    at = numbers + (bar.width - numbers - turned.width) // 2, (bar.height - turned.height) // 2
    bar.paste(turned, at)
    return bar
