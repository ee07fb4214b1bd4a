"""What the header of an ICC profile says, and repairs of what readers stumble over (ICC.1:2022, section 7)."""

from __future__ import annotations

import struct

from savl.images.metadata_record import Stored

_HEADER = 128
_VERSION_AT, _SIGNATURE_AT, _ID_AT = 8, 36, 84
_CHANNELS = {"GRAY": 1, "RGB": 3}
_OTHER_SPACES = ("CMYK", "CMY", "Lab", "XYZ", "Luv", "YCbr", "Yxy", "HSV", "HLS")
# Kinds that do not say what the samples of a picture mean: device links and lists of named colours.
_OTHER_CLASSES = (b"link", b"nmcl")


def colour_space(icc: bytes) -> str:
    """Return the colour space of a profile's data, such as "RGB", "GRAY", "CMYK" or "Lab"."""
    return icc[16:20].decode("latin-1").strip()


def fits(icc: bytes, stored: Stored) -> bool:
    """Return whether a profile is for the channels that are stored; one without a known space gets the doubt's benefit.

    Args:
        icc: the profile.
        stored: the picture.
    """
    space = colour_space(icc)
    if space in _CHANNELS:
        return _CHANNELS[space] == (1 if stored.is_gray else 3)
    return space not in _OTHER_SPACES and not space.endswith("CLR") and not stored.is_gray


def repaired_profile(icc: bytes) -> bytes | None:
    """Return a profile whose length field is true; None when it is damaged or does not describe samples.

    Decoders of PNG files refuse a wrong length, and since version 4 one that is no multiple of four; others do not
    mind. A profile without these faults is returned as it is.

    Args:
        icc: the profile, as it stood in a file.
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
    # The identifier is a checksum; zeros say that none was calculated.
    return struct.pack(">I", true_length) + body[4:_ID_AT] + bytes(16) + body[_ID_AT + 16 :]
