"""Every kind of TIFF samples is converted correctly, or an error names the unsupported kind."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from PIL import Image, ImageCms

from savl.images.errors import UnreadableImage, UnsupportedImage
from savl.images.read import read_image

RED = (200, 40, 30)
SHORT, LONG, RATIONAL = 3, 4, 5

Fields = Mapping[int, tuple[int, Sequence[float]]]


def directory(fields: Fields, order: str, offset: int, following: int = 0, *, big: bool = False) -> bytes:
    """Return a directory at `offset`, followed by the values that do not fit its entries."""
    width = 8 if big else 4
    entry = 12 + width - 4 + (4 if big else 0)
    table = struct.pack(order + ("Q" if big else "H"), len(fields))
    after = offset + len(table) + len(fields) * entry + width
    values = b""
    for tag, (kind, numbers) in sorted(fields.items()):
        if kind == RATIONAL:
            data = b"".join(struct.pack(order + "II", round(number * 1000), 1000) for number in numbers)
        else:
            data = struct.pack(f"{order}{len(numbers)}{'H' if kind == SHORT else 'I'}", *map(int, numbers))
        if len(data) > width:
            place = struct.pack(order + ("Q" if big else "I"), after + len(values))
            values += data + bytes(len(data) % 2)
            data = place
        table += struct.pack(order + ("HHQ" if big else "HHI"), tag, kind, len(numbers)) + data.ljust(width, b"\0")
    return table + struct.pack(order + ("Q" if big else "I"), following) + values


def tiff(
    data: bytes | list[bytes],
    width: int,
    height: int,
    photometric: int,
    bits: Sequence[int],
    more: Fields | None = None,
    *,
    order: str = "<",
    big: bool = False,
    compression: int = 1,
) -> bytes:
    """Return a TIFF file of one page; `data` is its only strip, or a list of strips or tiles as defined by `more`."""
    strips = data if isinstance(data, list) else [data]
    if compression == 8:
        strips = [zlib.compress(strip) for strip in strips]
    start = 16 if big else 8
    places = [start + sum(map(len, strips[:index])) for index in range(len(strips))]
    end = start + sum(map(len, strips))
    fields: dict[int, tuple[int, Sequence[float]]] = {
        256: (SHORT, [width]),
        257: (SHORT, [height]),
        258: (SHORT, bits),
        259: (SHORT, [compression]),
        262: (SHORT, [photometric]),
        273: (LONG, places),
        277: (SHORT, [len(bits)]),
        278: (LONG, [height]),
        279: (LONG, [len(strip) for strip in strips]),
        **(more or {}),
    }
    if 322 in fields:
        for strip_tag, tile_tag in ((273, 324), (279, 325)):
            fields[tile_tag] = fields.pop(strip_tag)
        del fields[278]
    name = b"II" if order == "<" else b"MM"
    end += end % 2
    head = struct.pack(order + "HHHQ", 43, 8, 0, end) if big else struct.pack(order + "HI", 42, end)
    body = name + head + b"".join(strips)
    return body.ljust(end, b"\0") + directory(fields, order, end, big=big)


def flat(samples: Sequence[int], dtype: str = "u1", side: int = 16) -> bytes:
    """Return the samples of a square of one colour."""
    return np.full((side, side, len(samples)), samples, np.dtype(dtype)).tobytes()


def colour(content: bytes) -> list[int]:
    """Return the only colour of the image."""
    pixels = read_image(content).pixels
    assert (pixels == pixels[0, 0]).all()
    return [int(sample) for sample in pixels[0, 0]]


def near(content: bytes, expected: Sequence[int], tolerance: int = 1) -> None:
    assert np.abs(np.subtract(colour(content), expected)).max() <= tolerance, colour(content)


def ycbcr(red: float, green: float, blue: float) -> tuple[float, float, float]:
    """Convert RGB to YCbCr by ITU-R BT.601 with full range, as in JFIF."""
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    return y, 128 + (blue - y) / 1.772, 128 + (red - y) / 1.402


def rounded(values: Sequence[float]) -> list[int]:
    return [round(value) for value in values]


LAB_8 = (43, 58, 42)  # in units of L* 0 to 100; signed a* and b*


def lab_to_srgb(lightness: float, a: float, b: float) -> list[int]:
    """Convert Lab to sRGB with Little CMS."""
    samples = np.array([[[round(lightness * 2.55), a, b]]], np.int16).astype(np.uint8)
    transform = ImageCms.buildTransform(
        ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB", renderingIntent=1
    )
    return list(ImageCms.applyTransform(Image.frombytes("LAB", (1, 1), samples.tobytes()), transform).getpixel((0, 0)))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True], ids=["classic", "big"])
@pytest.mark.parametrize("compression", [1, 8], ids=["raw", "deflate"])
@pytest.mark.parametrize("bits", [8, 16])
def test_rgb_is_read_in_every_layout(order: str, big: bool, compression: int, bits: int) -> None:
    dtype = f"{order}u{bits // 8}"
    scale = 257 if bits == 16 else 1
    values = [value * scale for value in RED]
    content = tiff(flat(values, dtype), 16, 16, 2, [bits] * 3, order=order, big=big, compression=compression)
    assert colour(content) == values
    planes = [flat([value], dtype) for value in values]
    separate = tiff(planes, 16, 16, 2, [bits] * 3, {284: (SHORT, [2])}, order=order, big=big, compression=compression)
    assert colour(separate) == values
    tiles = {322: (SHORT, [16]), 323: (SHORT, [16])}
    assert colour(tiff(flat(values, dtype), 16, 16, 2, [bits] * 3, tiles, order=order, big=big)) == values


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("photometric", [0, 1], ids=["white is zero", "black is zero"])
def test_gray_of_every_bit_depth_and_polarity_is_read(bits: int, photometric: int) -> None:
    top = 2**bits - 1
    codes = np.arange(16) % (top + 1) if bits < 16 else np.arange(16) * 4096
    digits = "".join(format(code, f"0{bits}b") for code in codes)
    row = bytes(int(digits[start : start + 8], 2) for start in range(0, len(digits), 8))
    row = np.frombuffer(row, ">u2").astype("<u2").tobytes() if bits == 16 else row
    peak = 65535 if bits == 16 else 255
    expected = np.rint((top - codes if photometric == 0 else codes) * (peak / top))
    np.testing.assert_array_equal(read_image(tiff(row * 2, 16, 2, photometric, [bits])).pixels[1, :, 0], expected)


def test_fill_order_2_reverses_the_bits() -> None:
    content = tiff(bytes([0b00000101]), 8, 1, 1, [1], {266: (SHORT, [2])})
    assert read_image(content).pixels.ravel().tolist() == [255, 0, 255, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", [1, 257], ids=["8-bit map", "16-bit map"])
def test_palette_codes_become_colours(bits: int, scale: int) -> None:
    count = 2**bits
    colours = np.zeros((count, 3), int)
    colours[-1] = RED
    content = tiff(b"\xff" * 64, 8, 8, 3, [bits], {320: (SHORT, (colours.T * scale).ravel().tolist())})
    assert colour(content) == list(RED)


@pytest.mark.parametrize("compression", [1, 8], ids=["raw", "deflate"])
@pytest.mark.parametrize("bits", [8, 16])
def test_ycbcr_without_subsampling_is_converted(compression: int, bits: int) -> None:
    scale = 257 if bits == 16 else 1
    coded = ycbcr(*RED)
    codes = [coded[0] * scale, *((value - 128) * scale + 2 ** (bits - 1) for value in coded[1:])]
    data = flat(rounded(codes), f"<u{bits // 8}")
    ends = [0, 2**bits - 1, 2 ** (bits - 1), 2**bits - 1] + [2 ** (bits - 1), 2**bits - 1]
    for more in ({530: (SHORT, [1, 1])}, {530: (SHORT, [1, 1]), 532: (RATIONAL, ends)}):
        near(
            tiff(data, 16, 16, 6, [bits] * 3, more, compression=compression),
            [value * scale for value in RED],
            tolerance=2 * scale,
        )


def test_ycbcr_of_video_range_and_other_coefficients_is_converted() -> None:
    red, green, blue = RED
    luma = (0.2126, 0.7152, 0.0722)
    y = luma[0] * red + luma[1] * green + luma[2] * blue
    cb, cr = (blue - y) / (2 - 2 * luma[2]), (red - y) / (2 - 2 * luma[0])
    codes = rounded([16 + y * 219 / 255, 128 + cb * 112 / 127, 128 + cr * 112 / 127])
    more = {
        529: (RATIONAL, luma),
        530: (SHORT, [1, 1]),
        532: (RATIONAL, [16, 235, 128, 240, 128, 240]),
    }
    near(tiff(flat(codes), 16, 16, 6, [8] * 3, more), RED, tolerance=2)


def test_ycbcr_keeps_its_alpha() -> None:
    content = tiff(flat([*rounded(ycbcr(*RED)), 51]), 16, 16, 6, [8] * 4, {530: (SHORT, [1, 1]), 338: (SHORT, [2])})
    near(content, [*RED, 51], tolerance=2)


@pytest.mark.parametrize("subsampling", [(2, 2), (2, 1), (1, 2), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_subsampled_ycbcr_is_converted_and_rotated_upright(subsampling: tuple[int, int], orientation: int) -> None:
    across, down = subsampling
    columns, rows = 16, 8
    # Gray, so that luminance alone identifies a pixel.
    luminance = np.arange(columns * rows, dtype=np.uint8).reshape(rows, columns)
    blocks = luminance.reshape(rows // down, down, columns // across, across).transpose(0, 2, 1, 3)
    units = np.concatenate([blocks.reshape(-1, down * across), np.full((blocks.shape[0] * blocks.shape[1], 2), 128)], 1)
    more = {530: (SHORT, subsampling), 274: (SHORT, [orientation])}
    pixels = read_image(tiff(units.astype(np.uint8).tobytes(), columns, rows, 6, [8] * 3, more)).pixels
    upright = {
        1: luminance,
        2: luminance[:, ::-1],
        3: luminance[::-1, ::-1],
        4: luminance[::-1],
        5: luminance.T,
        6: luminance[::-1].T,
        7: luminance[::-1, ::-1].T,
        8: luminance[:, ::-1].T,
    }[orientation]
    assert pixels.shape == (*upright.shape, 3)
    for band in range(3):
        assert np.abs(pixels[..., band].astype(int) - upright).max() <= 1


def test_the_chroma_of_subsampled_ycbcr_is_correct() -> None:
    y, cb, cr = rounded(ycbcr(*RED))
    units = bytes([y, y, y, y, cb, cr]) * 64
    near(tiff(units, 16, 16, 6, [8] * 3, {530: (SHORT, [2, 2])}), RED, tolerance=2)


@pytest.mark.parametrize(
    ("subsampling", "bits", "planar"),
    [((1, 4), 8, 1), ((2, 2), 8, 2), ((2, 2), 16, 1)],
    ids=["1x4", "planar", "16-bit"],
)
def test_subsampled_ycbcr_that_libtiff_cannot_read_raises_an_error(
    subsampling: tuple[int, int], bits: int, planar: int
) -> None:
    more = {530: (SHORT, subsampling), 284: (SHORT, [planar])}
    with pytest.raises(UnsupportedImage, match=rf"{bits}-bit YCbCr.*subsampled {subsampling[0]}x{subsampling[1]}"):
        read_image(tiff(bytes(4096), 16, 16, 6, [bits] * 3, more))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_ycbcr_in_jpeg_is_converted(subsampling: int) -> None:
    buffer = io.BytesIO()
    Image.new("YCbCr", (33, 21), tuple(rounded(ycbcr(*RED)))).save(
        buffer, "TIFF", compression="jpeg", quality=95, subsampling=subsampling
    )
    near(buffer.getvalue(), RED, tolerance=4)


@pytest.mark.parametrize("lab", [LAB_8, (0, 0, 0), (100, 0, 0), (50, -30, 60), (70, 20, -50)])
def test_cielab_is_converted_to_srgb(lab: tuple[int, int, int]) -> None:
    expected = lab_to_srgb(*lab)
    lightness, a, b = lab
    eight = tiff(flat([round(lightness * 2.55), a % 256, b % 256]), 16, 16, 8, [8] * 3)
    near(eight, expected, tolerance=2)
    assert read_image(eight).metadata.icc is not None, "the profile of what it was converted to must be named"
    near(tiff(flat([round(lightness * 2.55), a + 128, b + 128]), 16, 16, 9, [8] * 3), expected, tolerance=2)
    in_16 = [value * 257 for value in expected]
    codes = [round(lightness * 655.35), a * 256 % 65536, b * 256 % 65536]
    near(tiff(flat(codes, "<u2"), 16, 16, 8, [16] * 3), in_16, tolerance=600)
    codes = [round(lightness * 652.8), (a + 128) * 256, (b + 128) * 256]
    near(tiff(flat(codes, "<u2"), 16, 16, 9, [16] * 3), in_16, tolerance=600)


@pytest.mark.parametrize("bits", [8, 16])
def test_cielab_keeps_its_alpha(bits: int) -> None:
    scale = 257 if bits == 16 else 1
    content = tiff(flat([255 * scale, 0, 0, 90 * scale], f"<u{bits // 8}"), 16, 16, 8, [bits] * 4, {338: (SHORT, [2])})
    assert colour(content) == [255 * scale] * 3 + [90 * scale]


@pytest.mark.parametrize("bits", [8, 16])
def test_cmyk_is_converted_to_srgb(bits: int) -> None:
    scale = 257 if bits == 16 else 1
    dtype = f"<u{bits // 8}"
    near(tiff(flat([0, 0, 0, 0], dtype), 16, 16, 5, [bits] * 4), [255 * scale] * 3, tolerance=2 * scale)
    red, green, blue = colour(tiff(flat([0, 255 * scale, 255 * scale, 0], dtype), 16, 16, 5, [bits] * 4))
    assert red > 180 * scale
    assert max(green, blue) < 90 * scale
    alpha = tiff(flat([0, 0, 0, 0, 77 * scale], dtype), 16, 16, 5, [bits] * 5, {338: (SHORT, [2])})
    near(alpha, [255 * scale] * 3 + [77 * scale], tolerance=2 * scale)


# Kinds of the extra samples, and the expected bands of samples 1, 2, 3…
EXTRA = {
    "unspecified": ([0], None),
    "associated": ([1], 0),
    "unassociated": ([2], 0),
    "unspecified, unassociated": ([0, 2], 1),
    "unassociated, unspecified": ([2, 0], 0),
}


@pytest.mark.parametrize(("kind", "expected"), [(0, [*RED]), (2, [*RED, 77])], ids=["other", "alpha"])
def test_an_extra_band_of_a_palette_image_is_alpha_if_declared(kind: int, expected: list[int]) -> None:
    colours = [channel * 257 for channel in RED for _ in range(256)]
    assert colour(tiff(flat([255, 77]), 16, 16, 3, [8] * 2, {320: (SHORT, colours), 338: (SHORT, [kind])})) == expected


@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("base", [(200,), RED], ids=["gray", "rgb"])
def test_only_declared_alpha_bands_become_alpha(base: tuple[int, ...], bits: int, name: str) -> None:
    kinds, alpha = EXTRA[name]
    scale = 257 if bits == 16 else 1
    extra = [51, 102][: len(kinds)]
    stored = [value * extra[0] // 255 if kinds == [1] else value for value in base]
    samples = [value * scale for value in (*stored, *extra)]
    photometric = 1 if len(base) == 1 else 2
    content = tiff(flat(samples, f"<u{bits // 8}"), 16, 16, photometric, [bits] * len(samples), {338: (SHORT, kinds)})
    expected = [value * scale for value in base] + ([] if alpha is None else [extra[alpha] * scale])
    near(content, expected, tolerance=2 * scale if kinds == [1] else 0)
    dropped = len(kinds) - (alpha is not None)
    notes = read_image(content).notes
    assert notes == (("1 extra band is left out, because it is not transparency",) if dropped else ())


def test_an_undeclared_fourth_band_is_used_as_alpha_with_a_note() -> None:
    content = tiff(flat([*RED, 51]), 16, 16, 2, [8] * 4)
    assert colour(content) == [*RED, 51]
    assert read_image(content).notes == (
        "its last band is used as transparency, because the file does not declare its meaning",
    )


def test_white_is_zero_inverts_gray_but_not_alpha() -> None:
    assert colour(tiff(flat([55, 51]), 16, 16, 0, [8] * 2, {338: (SHORT, [2])})) == [200, 51]


def test_a_gray_image_with_many_bands_raises_an_error() -> None:
    with pytest.raises(UnsupportedImage, match="has 5 bands"):
        read_image(tiff(flat([1, 2, 3, 4, 5]), 16, 16, 1, [8] * 5, {338: (SHORT, [0, 0, 0, 0])}))


REFUSED = {
    "transparency mask": tiff(bytes(2), 8, 2, 4, [1]),
    "inks other than CMYK": tiff(flat([1, 2, 3, 4]), 16, 16, 5, [8] * 4, {332: (SHORT, [2])}),
    "dot range": tiff(flat([1, 2, 3, 4]), 16, 16, 5, [8] * 4, {336: (SHORT, [255, 0] * 4)}),
    "ITULAB": tiff(flat([1, 2, 3]), 16, 16, 10, [8] * 3),
    "colour filter array": tiff(flat([1], "<u2"), 16, 16, 32803, [16]),
    "LogL samples": tiff(flat([1], "<u2"), 16, 16, 32844, [16]),
    "LogLuv": tiff(flat([1, 2, 3], "<u2"), 16, 16, 32845, [16] * 3),
    "LinearRaw": tiff(flat([1, 2, 3], "<u2"), 16, 16, 34892, [16] * 3),
    "photometric interpretation 777": tiff(flat([1]), 16, 16, 777, [8]),
    "32-bit float samples": tiff(flat([1], "<f4"), 16, 16, 1, [32], {339: (SHORT, [3])}),
    "16-bit float samples": tiff(flat([1, 1, 1], "<f2"), 16, 16, 2, [16] * 3, {339: (SHORT, [3] * 3)}),
    "8-bit signed integer samples": tiff(flat([1]), 16, 16, 1, [8], {339: (SHORT, [2])}),
    "16-bit signed integer samples": tiff(flat([1], "<i2"), 16, 16, 1, [16], {339: (SHORT, [2])}),
    "64-bit complex float samples": tiff(flat([1], "<c8"), 16, 16, 1, [64], {339: (SHORT, [6])}),
    "32-bit complex integer samples": tiff(flat([1], "<u4"), 16, 16, 1, [32], {339: (SHORT, [5])}),
    "32-bit gray samples": tiff(flat([1], "<u4"), 16, 16, 1, [32]),
    "12-bit gray samples": tiff(bytes(24 * 16), 16, 16, 1, [12]),
    "4-bit RGB samples": tiff(bytes(24 * 16), 16, 16, 2, [4] * 3),
    "samples of 5, 6 bits": tiff(bytes(2 * 16), 16, 1, 2, [5, 6, 5]),
    "premultiplied alpha": tiff(flat([1, 2, 3, 4]), 16, 16, 8, [8] * 4, {338: (SHORT, [1])}),
    "compressed by old-style JPEG": tiff(
        b"\xff\xd8\xff\xd9", 16, 16, 6, [8] * 3, {513: (LONG, [8]), 514: (LONG, [4])}, compression=6
    ),
    "compressed by JPEG 2000": tiff(flat([1]), 16, 16, 1, [8], compression=34712),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_error_names_the_unsupported_kind_of_image(name: str) -> None:
    with pytest.raises(UnsupportedImage, match=name) as caught:
        read_image(REFUSED[name])
    assert "truncated" not in str(caught.value)


def test_subsampled_ycbcr_in_tiles_is_converted() -> None:
    y, cb, cr = rounded(ycbcr(*RED))
    units = bytes([y, y, y, y, cb, cr]) * 64
    more = {530: (SHORT, [2, 2]), 322: (SHORT, [16]), 323: (SHORT, [16])}
    near(tiff([units] * 4, 32, 32, 6, [8] * 3, more, compression=8), RED, tolerance=2)
    with pytest.raises(UnsupportedImage, match="YCbCr with subsampled chroma in uncompressed tiles"):
        read_image(tiff([units] * 4, 32, 32, 6, [8] * 3, more))


LAYOUTS = {
    "strips": {278: (LONG, [16])},
    "tiles": {322: (SHORT, [32]), 323: (SHORT, [16])},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("photometric", [2, 6, 8], ids=["RGB", "subsampled YCbCr", "CIELab"])
def test_a_corrupt_strip_or_tile_raises_an_error(photometric: int, layout: str) -> None:
    size = 32 * 16 * 3 // (2 if photometric == 6 else 1)
    strips = [np.random.default_rng(number).bytes(size) for number in range(3)]
    more = LAYOUTS[layout] | ({530: (SHORT, [2, 2])} if photometric == 6 else {})
    content = bytearray(tiff(strips, 32, 48, photometric, [8] * 3, more, compression=8))
    assert read_image(bytes(content)).pixels.shape == (48, 32, 3)
    content[size + 200 : size + 220] = bytes(20)
    with pytest.raises(UnreadableImage, match="truncated or corrupt TIFF"):
        read_image(bytes(content))


@pytest.mark.parametrize("tile", [False, True], ids=["strips", "tiles"])
def test_a_truncated_jpeg_stream_raises_an_error(tile: bool) -> None:
    import pyvips

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = pyvips.Image.new_from_array(noise).copy(interpretation="srgb")
    content = bytearray(image.tiffsave_buffer(compression="jpeg", tile=tile, tile_width=64, tile_height=64))
    assert read_image(bytes(content)).pixels.shape == (64, 64, 3)
    position = content.index(b"\xff\xda", 8) + 1500
    content[position : position + 2] = b"\xff\xd9"
    with pytest.raises(UnreadableImage, match="truncated or corrupt TIFF"):
        read_image(bytes(content))


def pages(*fields: Fields) -> bytes:
    """Return a TIFF file of 8×6 gray pages, each of one value: 10, 20…"""
    body = bytearray(b"II*\0" + bytes(4))
    link = 4
    for number, more in enumerate(fields, 1):
        start = len(body)
        body += bytes([10 * number]) * 48
        struct.pack_into("<I", body, link, len(body))
        page: dict[int, tuple[int, Sequence[float]]] = {
            256: (SHORT, [8]),
            257: (SHORT, [6]),
            258: (SHORT, [8]),
            262: (SHORT, [1]),
            273: (LONG, [start]),
            277: (SHORT, [1]),
            278: (SHORT, [6]),
            279: (LONG, [48]),
            **more,
        }
        link = len(body) + 2 + 12 * len(page)
        body += directory(page, "<", len(body))
    return bytes(body)


def test_thumbnails_and_masks_are_not_counted_as_pages() -> None:
    reduced, mask, old = {254: (LONG, [1])}, {254: (LONG, [4])}, {255: (SHORT, [2])}
    content = pages({}, reduced, {}, mask, old)
    assert read_image(content).notes == ("page 1 of 2; --page picks another",)
    assert colour_of_page(content, 2) == 30
    assert colour_of_page(pages(reduced, {}), 1) == 20
    with pytest.raises(UnsupportedImage, match="has no page 3; it holds 2 pages"):
        read_image(content, page=3)
    assert read_image(pages({}, reduced)).notes == ()


def colour_of_page(content: bytes, page: int) -> int:
    return int(read_image(content, page=page).pixels[0, 0, 0])


def test_a_small_page_that_is_not_declared_a_thumbnail_is_a_page() -> None:
    content = pages({}, {256: (SHORT, [4]), 257: (SHORT, [3])})
    assert read_image(content).notes == ("page 1 of 2; --page picks another",)
    assert read_image(content, page=2).pixels.shape[:2] == (3, 4)


def test_a_raw_camera_file_raises_an_error_that_names_its_format() -> None:
    with pytest.raises(UnsupportedImage, match="DNG file of raw camera data"):
        read_image(pages({254: (LONG, [1]), 50706: (1, [1])} | {50706: (SHORT, [1, 4])}))
    with pytest.raises(UnsupportedImage, match="CR2 file of raw camera data"):
        read_image(b"II*\0\x10\0\0\0CR\2\0" + bytes(40))
    with pytest.raises(UnsupportedImage, match="only a thumbnail"):
        read_image(pages({254: (LONG, [1]), 330: (LONG, [8])}))


def test_a_cyclic_chain_of_directories_is_read_once() -> None:
    content = bytearray(pages({}))
    start = struct.unpack_from("<I", content, 4)[0]
    struct.pack_into("<I", content, start + 2 + 12 * 8, start)
    assert colour_of_page(bytes(content), 1) == 10
