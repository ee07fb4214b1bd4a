"""Draw severity maps as images in the colours of viridis, with a colour bar."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


# Small maps are enlarged by an integer factor to about this many pixels, so that the colour bar does not dominate.
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
    """Draw a severity map in viridis, with a colour bar on its right.

    The range is fixed, so that a colour has the same meaning in all images. Each pixel of the map is drawn as a square
    of one colour, without interpolation.

    Args:
        severity: (h, w) float. Values outside the limits are drawn in the colour of the nearest limit.
        limits: Values at the ends of the colour bar. [0, 2] is the range of severity maps from a network, where 1 is
            the average of the image; ground-truth degradation masks are in [0, 1].
        label: Label of the colour bar.

    Returns:
        (H, W, 3) uint8 RGB on white. The map begins at pixel (12, 12) from the top left, and its size is an integer
        multiple of (h, w).
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
    # Draw the colour bar separately and insert it, because Pillow would copy all pixels of a large map.
    left = _MARGIN + width + _MARGIN
    picture[:, left:] = np.asarray(_colour_bar(bar_height, limits, label))
    return picture


def _colour_bar(height: int, limits: tuple[float, float], label: str) -> Picture:
    """Return the colour bar with five labelled ticks and its label, including margins above and below."""
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


# The colour map viridis: perceptually uniform, and readable without colour vision. By Stéfan van der Walt and Nathaniel
# Smith, dedicated to the public domain (CC0). The table is matplotlib's, rounded to 8 bits.
_VIRIDIS = np.frombuffer(
    bytes.fromhex(
        "44015444025544035745055845065a45085b46095c460b5e460c5f460e61470f6247116347126547146647156747166947186a48196b481a6c"
        "481c6e481d6f481e70482071482172482273482374472575472676472777472878472a79472b7a472c7b462d7c462f7c46307d46317e45327f"
        "45347f453580453681443781443982433a83433b83433c84423d84423e854240854141864142864043874044873f45873f47883e48883e4989"
        "3d4a893d4b893d4c893c4d8a3c4e8a3b508a3b518a3a528b3a538b39548b39558b38568b38578c37588c37598c365a8c365b8c355c8c355d8c"
        "345e8d345f8d33608d33618d32628d32638d31648d31658d31668d30678d30688d2f698d2f6a8d2e6b8e2e6c8e2e6d8e2d6e8e2d6f8e2c708e"
        "2c718e2c728e2b738e2b748e2a758e2a768e2a778e29788e29798e287a8e287a8e287b8e277c8e277d8e277e8e267f8e26808e26818e25828e"
        "25838d24848d24858d24868d23878d23888d23898d22898d228a8d228b8d218c8d218d8c218e8c208f8c20908c20918c1f928c1f938b1f948b"
        "1f958b1f968b1e978a1e988a1e998a1e998a1e9a891e9b891e9c891e9d881e9e881e9f881ea0871fa1871fa2861fa38620a48520a58521a685"
        "21a78422a78423a88323a98224aa8225ab8126ac8127ad8028ae7f29af7f2ab07e2bb17d2cb17d2eb27c2fb37b30b47a32b57a33b67935b778"
        "36b87738b97639b9763bba753dbb743ebc7340bd7242be7144be7045bf6f47c06e49c16d4bc26c4dc26b4fc36951c46853c56755c66657c665"
        "59c7645bc8625ec96160c96062ca5f64cb5d67cc5c69cc5b6bcd596dce5870ce5672cf5574d05477d05279d1517cd24f7ed24e81d34c83d34b"
        "86d44988d5478bd5468dd64490d64392d74195d73f97d83e9ad83c9dd93a9fd938a2da37a5da35a7db33aadb32addc30afdc2eb2dd2cb5dd2b"
        "b7dd29bade27bdde26bfdf24c2df22c5df21c7e01fcae01ecde01dcfe11cd2e11bd4e11ad7e219dae218dce218dfe318e1e318e4e318e7e419"
        "e9e419ece41aeee51bf1e51cf3e51ef6e61ff8e621fae622fde724"
    ),
    dtype=np.uint8,
).reshape(256, 3)


def viridis(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return the colours of values in [0, 1], dark violet for 0 and yellow for 1.

    Args:
        values: Floating, of any shape. Values outside the range get the colour of the nearest end, NaN gets black.

    Returns:
        RGB, ``(*values.shape, 3)`` uint8.
    """
    undefined = np.isnan(values)
    # As in matplotlib: 256 bins of equal width, the last of which includes 1.
    bins = np.clip(np.where(undefined, 0, values) * 256, 0, 255).astype(np.uint8)
    colours: NDArray[np.uint8] = _VIRIDIS[bins]
    colours[undefined] = 0
    return colours
