"""TIFF samples are read correctly in every layout, and invalid fields that do not affect the samples are ignored."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from savl.images.errors import UnreadableImage, UnsupportedImage
from savl.images.read import read_image

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, MASK, SEPARATED, YCBCR, CIELAB = 0, 1, 2, 3, 4, 5, 6, 8
OTHER, PREMULTIPLIED, ALPHA = 0, 1, 2  # values of ExtraSamples
COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, SEPARATED: 4, YCBCR: 3, CIELAB: 3}
LAYOUTS = {
    "one strip": {"rows": 20},
    "strips": {"rows": 7},
    "tiles": {"tile": 16},
    "one strip a plane": {"planes": True, "rows": 20},
    "strips of planes": {"planes": True, "rows": 7},
    "tiles of planes": {"planes": True, "tile": 16},
}
HEIGHT, WIDTH = 20, 37

Fields = Mapping[int, Sequence[int]]


def packed(samples: NDArray[Any], bits: int, order: str) -> bytes:
    """Pack rows of samples as in TIFF, each row in whole bytes."""
    if bits >= 8:
        return samples.astype(f"{order}u{bits // 8}").tobytes()
    single = samples.reshape(len(samples), -1)[..., None] >> np.arange(bits)[::-1] & 1
    return np.packbits(single.astype(np.uint8).reshape(len(samples), -1), axis=1).tobytes()


def tiff(*pages: tuple[Fields, list[bytes]], order: str = "<") -> bytes:
    """Return a TIFF file of pages. Each is a pair of fields and strips, or tiles if there is a field TileWidth."""
    content = bytearray((b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 0))
    link = 4
    for fields, blocks in pages:
        places = []
        for block in blocks:
            places.append(len(content))
            content += block + bytes(len(block) % 2)
        kind = 322 in fields
        numbers = {**fields, 324 if kind else 273: places, 325 if kind else 279: [len(block) for block in blocks]}
        table = b""
        for tag, values in sorted(numbers.items()):
            data = struct.pack(f"{order}{len(values)}I", *values)
            if tag in (258, 262, 274, 277, 284, 296, 317, 320, 338, 339, 530):
                data = struct.pack(f"{order}{len(values)}H", *values)
            count, code = len(values), 3 if len(data) < 4 * len(values) else 4
            if len(data) > 4:
                at = len(content)
                content += data + bytes(len(data) % 2)
                data = struct.pack(order + "I", at)
            table += struct.pack(order + "HHI", tag, code, count) + data.ljust(4, b"\0")
        struct.pack_into(order + "I", content, link, len(content))
        content += struct.pack(order + "H", len(numbers)) + table
        link = len(content)
        content += bytes(4)
    return bytes(content)


def page(
    samples: NDArray[Any],
    photometric: int,
    bits: int = 8,
    extra: Sequence[int] = (),
    more: Fields | None = None,
    *,
    planes: bool = False,
    rows: int = 0,
    tile: int = 0,
    deflate: bool = False,
    order: str = "<",
) -> tuple[Fields, list[bytes]]:
    """Return a page with the given codes (H, W, bands)."""
    height, width, bands = samples.shape
    fields = {256: [width], 257: [height], 258: [bits] * bands, 259: [8 if deflate else 1], 262: [photometric]}
    fields |= {277: [bands], 284: [2 if planes else 1], **({338: list(extra)} if extra else {}), **(more or {})}
    fields |= {322: [tile], 323: [tile]} if tile else {278: [rows or height]}
    blocks = []
    for part in np.split(samples, bands, axis=2) if planes else [samples]:
        if tile:
            edges = ((0, -height % tile), (0, -width % tile), (0, 0))
            padded = np.pad(part, edges)
            for top in range(0, height, tile):
                blocks += [padded[top : top + tile, left : left + tile] for left in range(0, width, tile)]
        else:
            blocks += [part[top : top + (rows or height)] for top in range(0, height, rows or height)]
    encoded = [packed(block, bits, order) for block in blocks]
    return fields, [zlib.compress(block) for block in encoded] if deflate else encoded


def random_codes(bands: int, bits: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[Any]:
    return np.random.default_rng(bands + bits).integers(0, 2**bits, (height, width, bands)).astype(np.uint16)


def random_map(bits: int) -> list[int]:
    return [int(value) * 257 for value in np.random.default_rng(9).integers(0, 256, 3 * 2**bits)]


def meaning(codes: NDArray[Any], photometric: int, bits: int, extra: Sequence[int], colours: list[int]) -> NDArray[Any]:
    """Return the colours of gray, RGB or palette codes, with the first alpha band and without other extra bands."""
    top = 65535.0 if bits == 16 else 255.0
    values = codes * (top / (2**bits - 1))
    picture = values[..., : COLOURS[photometric]]
    if photometric == WHITE_IS_ZERO:
        picture = top - picture
    elif photometric == PALETTE:
        picture = np.reshape(colours, (3, -1)).T[codes[..., 0]] / 257.0
    alphas = [index for index, kind in enumerate(extra) if kind != OTHER]
    if not alphas:
        return picture
    alpha = values[..., COLOURS[photometric] + alphas[0]][..., None]
    if extra[alphas[0]] == PREMULTIPLIED:
        picture = np.where(alpha > 0, np.minimum(picture * top / np.maximum(alpha, 1), top), 0)
    return np.concatenate([picture, alpha], axis=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("extra", [(), (ALPHA,), (OTHER,), (PREMULTIPLIED,), (OTHER, ALPHA)], ids=str)
@pytest.mark.parametrize(
    ("photometric", "bits"),
    [
        *((photometric, bits) for photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO) for bits in (1, 2, 4, 8, 16)),
        *((PALETTE, bits) for bits in (1, 2, 4, 8)),
        *((RGB, bits) for bits in (8, 16)),
    ],
)
def test_gray_palette_and_rgb_images_are_read_in_every_layout(
    photometric: int, bits: int, extra: tuple[int, ...], layout: str
) -> None:
    codes = random_codes(COLOURS[photometric] + len(extra), bits)
    colours = random_map(bits) if photometric == PALETTE else []
    expected = meaning(codes, photometric, bits, extra, colours)
    order, deflate = ">" if bits in (2, 16) else "<", layout in ("strips", "tiles of planes")
    options = {**LAYOUTS[layout], "order": order, "deflate": deflate}
    more = {320: colours} if colours else {}
    pixels = read_image(tiff(page(codes, photometric, bits, extra, more, **options), order=order)).pixels
    assert pixels.dtype == (np.uint16 if bits == 16 else np.uint8)
    np.testing.assert_allclose(pixels.astype(float), expected, rtol=0, atol=1 if PREMULTIPLIED in extra else 0)


@cache
def read_in_one_strip(photometric: int, bits: int, extra: tuple[int, ...]) -> NDArray[Any]:
    """Return the pixels of random codes that are stored in one strip."""
    codes = random_codes(COLOURS[photometric] + len(extra), bits)
    more = {530: [1, 1]} if photometric == YCBCR else {}
    return read_image(tiff(page(codes, photometric, bits, extra, more))).pixels


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one strip"])
@pytest.mark.parametrize("extra", [(), (ALPHA,)], ids=["plain", "alpha"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("photometric", [SEPARATED, YCBCR, CIELAB], ids=["CMYK", "YCbCr", "CIELab"])
def test_other_colour_spaces_are_read_in_every_layout(
    photometric: int, bits: int, extra: tuple[int, ...], layout: str
) -> None:
    codes = random_codes(COLOURS[photometric] + len(extra), bits)
    more = {530: [1, 1]} if photometric == YCBCR else {}
    again = read_image(tiff(page(codes, photometric, bits, extra, more, **LAYOUTS[layout]))).pixels
    np.testing.assert_array_equal(again, read_in_one_strip(photometric, bits, extra))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [1, 8])
def test_a_truncated_file_raises_an_error_in_every_layout(bits: int, layout: str) -> None:
    # The directory comes before the samples, so that only samples are missing in a truncated file.
    content = tiff(page(random_codes(2, bits), BLACK_IS_ZERO, bits, (ALPHA,), **LAYOUTS[layout]))
    fields, blocks = page(random_codes(2, bits), BLACK_IS_ZERO, bits, (ALPHA,), **LAYOUTS[layout])
    first = tiff((fields, [b""] * len(blocks)))
    after = bytearray(first)
    places = 324 if 322 in fields else 273
    (at,) = struct.unpack_from("<I", first, 4)
    (count,) = struct.unpack_from("<H", first, at)
    for index in range(count):
        tag, _, values, where = struct.unpack_from("<HHII", first, at + 2 + 12 * index)
        if tag in (places, places + (6 if places == 273 else 1)):
            numbers = [len(block) for block in blocks]
            if tag == places:
                numbers = [len(first) + sum(numbers[:block]) for block in range(len(blocks))]
            struct.pack_into(f"<{values}I", after, where if values > 1 else at + 2 + 12 * index + 8, *numbers)
    whole = bytes(after) + b"".join(blocks)
    np.testing.assert_array_equal(read_image(whole).pixels, read_image(content).pixels)
    for missing in (1, len(blocks[-1])):
        with pytest.raises(UnreadableImage, match="truncated or corrupt TIFF"):
            read_image(whole[:-missing])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "field",
    [
        *({274: [0]}, {274: [9]}, {296: [0]}, {296: [9]}, {338: [7]}, {274: [65535], 296: [7]}),
        *({266: [0]}, {280: [1, 2, 3, 4]}, {281: [70000]}, {297: [5]}, {339: [0, 0, 0, 0]}),
    ],
    ids=str,
)
def test_invalid_fields_are_ignored_if_the_image_is_valid(field: dict[int, list[int]], layout: str) -> None:
    codes = random_codes(4, 8)
    picture = read_image(tiff(page(codes, RGB, 8, (OTHER,), field, **LAYOUTS[layout])))
    np.testing.assert_array_equal(picture.pixels, codes[..., :3])


def test_a_valid_orientation_is_applied_beside_an_invalid_field() -> None:
    codes = random_codes(3, 8)
    pixels = read_image(tiff(page(codes, RGB, more={274: [6], 296: [9]}))).pixels
    np.testing.assert_array_equal(pixels, np.rot90(codes, -1))


@pytest.mark.parametrize("field", [{338: [PREMULTIPLIED]}, {338: [ALPHA]}, {32995: [1]}], ids=str)
def test_colours_are_unchanged_if_the_declared_alpha_band_is_missing(field: dict[int, list[int]]) -> None:
    codes = random_codes(3, 8)
    np.testing.assert_array_equal(read_image(tiff(page(codes, RGB, more=field))).pixels, codes)


REFUSED: dict[str, tuple[dict[int, list[int]], str]] = {
    "float predictor": ({317: [3]}, "predictor of floating-point samples on 8-bit integers"),
    "unknown predictor": ({317: [9]}, "has predictor 9"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_error_names_an_unsupported_predictor(name: str) -> None:
    field, message = REFUSED[name]
    with pytest.raises(UnsupportedImage, match=message):
        read_image(tiff(page(random_codes(3, 8), RGB, more=field, deflate=True)))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("colours", [None, [0, 65535] * 5], ids=["no map", "a map of another size"])
def test_a_palette_image_without_a_palette_is_corrupt(bits: int, colours: list[int] | None) -> None:
    content = tiff(page(random_codes(1, bits), PALETTE, bits, more={320: colours} if colours else {}))
    with pytest.raises(UnreadableImage, match="its colour map " + ("has 10 numbers" if colours else "is missing")):
        read_image(content)


def test_the_transparency_mask_of_a_page_is_reported() -> None:
    codes = random_codes(3, 8)
    picture = page(codes, RGB)
    mask = page(random_codes(1, 1), MASK, 1, more={254: [4]})
    found = read_image(tiff(picture, mask))
    assert found.notes == ("its transparency mask is left out",)
    np.testing.assert_array_equal(found.pixels, codes)
    assert read_image(tiff(picture, picture, mask)).notes == ("page 1 of 2; --page picks another",)
    assert read_image(tiff(picture, picture, mask), page=2).notes == ("its transparency mask is left out",)
    unmarked = page(random_codes(1, 1), MASK, 1)
    assert read_image(tiff(picture, unmarked)).notes == ("its transparency mask is left out",)
    of_thumbnail = page(random_codes(1, 1, 4, 4), MASK, 1, more={254: [5]})
    assert read_image(tiff(picture, of_thumbnail)).notes == ()
    with pytest.raises(UnsupportedImage, match="is a transparency mask, not an image"):
        read_image(tiff(mask))


@pytest.mark.parametrize("photometric", [RGB, CIELAB])
def test_a_page_with_too_few_tiles_raises_an_error_at_once(photometric: int) -> None:
    fields, tiles = page(random_codes(3, 8), photometric, tile=16)
    with pytest.raises(UnreadableImage, match="some of its strips or tiles are missing"):
        read_image(tiff(({**fields, 256: [500_000]}, tiles)))
