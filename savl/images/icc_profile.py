"""ICC profiles (ICC.1:2022): check and repair headers, and build profiles from primaries and transfer functions.

Profiles are built from the numbers of PNG's cICP, sRGB, gAMA and cHRM chunks and of TIFF's entries, for formats that
store colour spaces as profiles only.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from savl.images.metadata_record import PngColour, Stored

_HEADER = 128
_VERSION_AT, _SIGNATURE_AT, _ID_AT = 8, 36, 84
_CHANNELS = {"GRAY": 1, "RGB": 3}
_OTHER_SPACES = ("CMYK", "CMY", "Lab", "XYZ", "Luv", "YCbr", "Yxy", "HSV", "HLS")
# Profile classes that do not define the colours of an image: device links and lists of named colours.
_OTHER_CLASSES = (b"link", b"nmcl")


def colour_space(icc: bytes) -> str:
    """Return the colour space of a profile's data, such as "RGB", "GRAY", "CMYK" or "Lab"."""
    return icc[16:20].decode("latin-1").strip()


def fits(icc: bytes, stored: Stored) -> bool:
    """Return whether a profile suits the channels of a stored image; a profile of an unknown colour space does.

    Args:
        icc: The profile.
        stored: The stored image.
    """
    space = colour_space(icc)
    if space in _CHANNELS:
        return _CHANNELS[space] == (1 if stored.is_gray else 3)
    return space not in _OTHER_SPACES and not space.endswith("CLR") and not stored.is_gray


def repaired_profile(icc: bytes) -> bytes | None:
    """Correct the length field of a profile; return None if the profile is damaged or does not describe samples.

    Decoders of PNG refuse a profile whose length field is wrong or, since version 4, no multiple of four; other
    decoders accept it. A profile without such faults is returned unchanged.

    Args:
        icc: The profile as stored in a file.
    """
    if len(icc) < _HEADER + 4 or icc[_SIGNATURE_AT : _SIGNATURE_AT + 4] != b"acsp" or icc[12:16] in _OTHER_CLASSES:
        return None
    length, count = struct.unpack_from(">I", icc)[0], struct.unpack_from(">I", icc, _HEADER)[0]
    end = _HEADER + 4 + 12 * count
    if end > len(icc):
        return None
    for at in range(_HEADER + 4, end, 12):
        offset, size = struct.unpack_from(">II", icc, at + 4)
        if offset + size > len(icc):
            return None
        end = max(end, offset + size)
    true_length = length if end <= length <= len(icc) else end
    if icc[_VERSION_AT] >= 4:
        true_length += -true_length % 4
    if length == true_length == len(icc):
        return icc
    body = icc[:true_length].ljust(true_length, b"\0")
    # The profile ID is a checksum; zeros mean that it was not computed.
    return struct.pack(">I", true_length) + body[4:_ID_AT] + bytes(16) + body[_ID_AT + 16 :]


_D50 = np.array([0.9642, 1.0, 0.8249])
_D65 = (0.3127, 0.3290)
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_BT709 = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), _D65)
_SMPTE170 = ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), _D65)
# x and y of red, green, blue and white (ITU-T H.273, table 2).
_PRIMARIES = {
    1: _BT709,
    4: ((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), (0.310, 0.316)),
    5: ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06), _D65),
    6: _SMPTE170,
    7: _SMPTE170,
    8: ((0.681, 0.319), (0.243, 0.692), (0.145, 0.049), (0.310, 0.316)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65),
    22: ((0.630, 0.340), (0.295, 0.605), (0.155, 0.077), _D65),
}
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_BT709_CURVE = (1 / 0.45, 1 / 1.099297, 0.099297 / 1.099297, 1 / 4.5, 0.081243)
# (gamma, a, b, c, d) of the curve (a·v + b)^gamma for v ≥ d and c·v below (H.273, table 3). One number is an exponent.
_CURVES: dict[int, tuple[float, ...]] = {
    1: _BT709_CURVE,
    4: (2.2,),
    5: (2.8,),
    6: _BT709_CURVE,
    7: (1 / 0.45, 1 / 1.1115, 0.1115 / 1.1115, 1 / 4.0, 0.0912),
    8: (1.0,),
    13: _SRGB_CURVE,
    14: _BT709_CURVE,
    15: _BT709_CURVE,
    17: (2.6,),
}
_PQ, _HLG = 16, 18
# ITU-R BT.2408: the luminance of white in graphics and paper, cd/m², and the peak of a nominal HLG display.
_REFERENCE_WHITE, _HLG_PEAK = 203.0, 1000.0
_SAMPLES = 4096


def profile_of(colour: PngColour, *, gray: bool) -> bytes | None:
    """Build a profile equivalent to the colour chunks of a PNG file, with the precedence of the PNG specification.

    Args:
        colour: Values of the chunks. The caller must handle an ICC profile, which has precedence over all chunks but
            cICP.
        gray: Whether the image has one colour channel.

    Returns:
        The profile, or None if there are no such chunks, or their transfer function or primaries have no formula.
        Perceptual quantiser and hybrid log-gamma become curves whose white is the reference white of 203 cd/m² and
        which clip brighter values. A `cicp` tag is added for programs that support these transfer functions.
    """
    return profile_of_cicp(colour, gray=gray) or _profile_of_older_chunks(colour, gray=gray)


def profile_of_cicp(colour: PngColour, *, gray: bool) -> bytes | None:
    """Build a profile equivalent to a cICP chunk, or return None; see `profile_of`."""
    if colour.cicp is None:
        return None
    primaries, transfer, _, full_range = colour.cicp
    if primaries not in _PRIMARIES or (transfer not in _CURVES and transfer not in (_PQ, _HLG)):
        return None
    if full_range and transfer in _CURVES:
        curve = _parametric(_CURVES[transfer])
    else:
        signal = np.linspace(0.0, 1.0, _SAMPLES)
        if not full_range:  # black is 16 and white is 235 of 255
            signal = np.clip((signal * 255 - 16) / 219, 0.0, 1.0)
        curve = _sampled(_linear(signal, transfer))
    name = f"cICP {primaries}/{transfer}"
    return _profile(name, _PRIMARIES[primaries], curve, gray=gray, cicp=colour.cicp)


def _profile_of_older_chunks(colour: PngColour, *, gray: bool) -> bytes | None:
    """Build a profile from the sRGB chunk, else from gAMA and cHRM; a missing one of these is taken from sRGB."""
    if colour.intent is not None:
        return _profile("sRGB", _BT709, _parametric(_SRGB_CURVE), gray=gray, intent=colour.intent)
    if colour.gamma is None and (colour.chromaticities is None or gray):
        return None
    gamma = None if colour.gamma is None else 100000 / colour.gamma
    curve = _parametric(_SRGB_CURVE if gamma is None else (gamma,))
    primaries: tuple[tuple[float, float], ...] = _BT709
    if colour.chromaticities is not None:
        primaries = _by_colour(colour.chromaticities)
    name = "sRGB curve" if gamma is None else f"gamma {gamma:.4g}"
    return _profile(f"{name}, {'sRGB' if primaries is _BT709 else 'own'} primaries", primaries, curve, gray=gray)


def profile_of_tables(
    chromaticities: tuple[int, ...], tables: Sequence[NDArray[np.float64]] | None, *, gray: bool
) -> bytes:
    """Build a profile from tables of linear light.

    Args:
        chromaticities: 100000 times x and y of white, red, green and blue, checked by `primaries_are_sound`.
        tables: Linear light, 0 to 1, for equally spaced samples: one table for all channels, or three for red, green
            and blue; None is sRGB's curve.
        gray: Whether the image has one colour channel.
    """
    if tables is None:
        curves = [_parametric(_SRGB_CURVE)]
    else:
        places = [np.linspace(0.0, 1.0, min(len(table), _SAMPLES)) for table in tables]
        curves = [
            _sampled(np.interp(place, np.linspace(0.0, 1.0, len(table)), table))
            for place, table in zip(places, tables, strict=True)
        ]
    name = "sRGB curve" if tables is None else "own curve"
    return _profile(f"{name}, own primaries", _by_colour(chromaticities), *curves, gray=gray)


def primaries_are_sound(chromaticities: tuple[int, ...]) -> bool:
    """Return whether the primaries span a colour space in which white has positive red, green and blue components."""
    red, green, blue, white = _by_colour(chromaticities)
    if any(y <= 0 for _, y in (white, red, green, blue)):
        return False
    columns = np.stack([_xyz(point) for point in (red, green, blue)], axis=1)
    if abs(np.linalg.det(columns)) < 1e-6:
        return False
    return bool((np.linalg.solve(columns, _xyz(white)) > 0).all())


def _by_colour(chromaticities: tuple[int, ...]) -> tuple[tuple[float, float], ...]:
    """Return x and y of red, green, blue and white from integers in the order white, red, green, blue."""
    x_y = [value / 100000 for value in chromaticities]
    white, red, green, blue = zip(x_y[::2], x_y[1::2], strict=True)
    return red, green, blue, white


def _linear(signal: NDArray[np.float64], transfer: int) -> NDArray[np.float64]:
    """Return the linear light of a signal in [0, 1]; 1 is white."""
    if transfer == _PQ:  # SMPTE ST 2084
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = signal ** (1 / m2)
        light = (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
        return np.minimum(light * 10000 / _REFERENCE_WHITE, 1.0)
    if transfer == _HLG:  # BT.2100, with the display's exponent of 1.2 applied to each channel
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
        return np.minimum(scene**1.2 * _HLG_PEAK / _REFERENCE_WHITE, 1.0)
    curve = _CURVES[transfer]
    if len(curve) == 1:
        return signal ** curve[0]
    gamma, a, b, c, d = curve
    return np.where(signal >= d, (a * signal + b) ** gamma, c * signal)


def _xyz(point: tuple[float, float]) -> NDArray[np.float64]:
    x, y = point
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _profile(
    name: str,
    primaries: tuple[tuple[float, float], ...],
    *curves: bytes,
    gray: bool,
    intent: int = 0,
    cicp: bytes | None = None,
) -> bytes:
    red, green, blue, white = primaries
    cone = _BRADFORD @ _xyz(white)
    adaptation = np.linalg.inv(_BRADFORD) @ np.diag((_BRADFORD @ _D50) / cone) @ _BRADFORD
    tags = {
        b"desc": _text(name),
        b"cprt": _text("No copyright"),
        b"wtpt": b"XYZ \0\0\0\0" + _fixed(_D50),
        b"chad": b"sf32\0\0\0\0" + _fixed(adaptation.ravel()),
    }
    if gray:
        tags[b"kTRC"] = curves[0]
    else:
        columns = np.stack([_xyz(point) for point in (red, green, blue)], axis=1)
        columns = adaptation @ columns @ np.diag(np.linalg.solve(columns, _xyz(white)))
        for index, letter in enumerate((b"r", b"g", b"b")):
            tags[letter + b"XYZ"] = b"XYZ \0\0\0\0" + _fixed(columns.T[index])
            tags[letter + b"TRC"] = curves[index % len(curves)]
    if cicp is not None and not gray:
        tags[b"cicp"] = b"cicp\0\0\0\0" + cicp
    table, data = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    places: dict[bytes, int] = {}  # equal tags share their data
    for tag, content in tags.items():
        if content not in places:
            places[content] = start + len(data)
            data += content + bytes(-len(content) % 4)
        table += tag + struct.pack(">II", places[content], len(content))
    version = 0x04400000 if b"cicp" in tags else 0x04300000
    head = struct.pack(
        ">I4sI4s4s4s6H4s4sIIIQI",
        start + len(data),
        b"\0\0\0\0",
        version,
        b"mntr",
        b"GRAY" if gray else b"RGB ",
        b"XYZ ",
        *(2026, 1, 1, 0, 0, 0),  # a fixed date, so that equal inputs give equal files
        b"acsp",
        b"\0\0\0\0",
        0,
        0,
        0,
        0,
        intent,
    )
    return (head + _fixed(_D50)).ljust(128, b"\0") + table + data


def _parametric(curve: tuple[float, ...]) -> bytes:
    return b"para\0\0\0\0" + struct.pack(">HH", 0 if len(curve) == 1 else 3, 0) + _fixed(np.array(curve))


def _sampled(light: NDArray[np.float64]) -> bytes:
    samples = np.round(light * 65535).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", len(samples)) + samples.tobytes()


def _fixed(values: NDArray[np.float64]) -> bytes:
    """Encode numbers as s15Fixed16."""
    return bytes(np.round(np.clip(values, -32768, 32767) * 65536).astype(">i4").tobytes())


def _text(text: str) -> bytes:
    """Encode a multi-localised text in one language."""
    content = text.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(content), 28) + content
