"""Metadata of the formats that savl reads but does not write: GIF, BMP, AVIF and HEIC."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from savl.images.metadata_record import DEPTH_MAP, GAIN_MAP, Metadata, PngColour

_GIF_HEADER, _GIF_DESCRIPTOR = 13, 9
_MAX_GIF_TEXT = 2**24
_BMP_HEADER_WITH_PROFILE, _EMBEDDED = 124, b"DEBM"
_MAX_META = 16 * 2**20
# Types of auxiliary and derived images as they appear in the boxes → name of the loss.
_FURTHER_IMAGES = {
    b":hdrgainmap": GAIN_MAP,
    b"tmap": GAIN_MAP,
    b"urn:mpeg:hevc:2015:auxid:2\0": DEPTH_MAP,
    b"urn:mpeg:mpegB:cicp:systems:auxiliary:depth\0": DEPTH_MAP,
    b":aux:portraiteffectsmatte": "the portrait matte",
}
# Primaries and transfer functions that viewers treat as sRGB, and those that mean "unspecified".
_PLAIN_PRIMARIES, _PLAIN_TRANSFERS = (0, 1, 2), (0, 1, 2, 6, 13, 14, 15)


def read_gif(file: BinaryIO) -> Metadata:
    """Return comments, XMP and ICC profile of a GIF file, up to its first frame (GIF89a, sections 23, 24 and 26).

    Args:
        file: The GIF file, seekable.
    """
    file.seek(0)
    head = file.read(_GIF_HEADER)
    comments: list[str] = []
    applications: dict[bytes, bytes] = {}
    if len(head) == _GIF_HEADER:
        file.seek(_colour_table(head[10]), os.SEEK_CUR)
        while file.read(1) == b"!":
            label = file.read(1)
            if label == b"\xfe":
                comments.append(_decoded(b"".join(_sub_blocks(file))))
            elif label == b"\xff":
                name = file.read(12)[1:]
                content = _xmp(file) if name == b"XMP DataXMP" else b"".join(_sub_blocks(file))
                applications.setdefault(name, content)
            else:
                for _ in _sub_blocks(file):
                    pass
    return Metadata(
        icc=applications.get(b"ICCRGBG1012"),
        xmp=applications.get(b"XMP DataXMP") or None,
        comments=tuple(comment for comment in comments if comment),
    )


def read_bmp_profile(file: BinaryIO) -> bytes | None:
    """Return the ICC profile that a BMP file of version 5 may contain, or None."""
    file.seek(14)
    header = file.read(_BMP_HEADER_WITH_PROFILE)
    if len(header) < _BMP_HEADER_WITH_PROFILE or header[:1] != b"|" or header[56:60] != _EMBEDDED:
        return None
    offset, size = struct.unpack_from("<II", header, 112)
    file.seek(14 + offset)
    profile = file.read(min(size, _MAX_META))
    return profile if len(profile) == size and profile[36:40] == b"acsp" else None


def read_heif(file: BinaryIO) -> Metadata:
    """Return the colour code points of an AVIF or HEIC file (`colr` boxes), and the names of its further images.

    The code points describe decoded RGB samples, as in PNG's cICP chunk. There are none if the file contains none, or
    only those that viewers assume by default.
    """
    meta = next((content for name, content in heif_boxes(file) if name == b"meta"), b"")
    properties = _inside(_inside(meta[4:], b"iprp"), b"ipco")
    cicp: bytes | None = None
    for name, content in heif_boxes(io.BytesIO(properties)):
        if name == b"colr" and content.startswith(b"nclx") and len(content) >= 11:
            primaries, transfer = struct.unpack_from(">HH", content, 4)
            plain = primaries in _PLAIN_PRIMARIES and transfer in _PLAIN_TRANSFERS
            # The decoder has already applied matrix and range.
            cicp = None if plain or max(primaries, transfer) > 255 else bytes([primaries, transfer, 0, 1])
            break
    lost = {words: None for sign, words in _FURTHER_IMAGES.items() if sign in meta}
    return Metadata(colour=PngColour(cicp=cicp), lost=tuple(lost))


def _inside(content: bytes, wanted: bytes) -> bytes:
    return next((held for name, held in heif_boxes(io.BytesIO(content)) if name == wanted), b"")


def heif_boxes(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and content of the boxes in a file; the content is empty for boxes too large for metadata."""
    end = file.seek(0, os.SEEK_END)
    position = 0
    while position + 8 <= end:
        file.seek(position)
        head = file.read(16)
        size, name = struct.unpack_from(">I4s", head)
        start = position + 8
        if size == 1 and len(head) == 16:
            size, start = struct.unpack_from(">Q", head, 8)[0], position + 16
        following = end if size == 0 else position + size
        if following < start or following > end:
            return
        file.seek(start)
        yield name, file.read(following - start) if following - start <= _MAX_META else b""
        position = following


def _colour_table(flags: int) -> int:
    """Return the size of a GIF colour table in bytes, from the flags before it."""
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _sub_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Yield the sub-blocks of a GIF extension, each preceded by its length, up to the empty one."""
    total = 0
    while (size := file.read(1)) not in (b"", b"\0") and total < _MAX_GIF_TEXT:
        total += size[0]
        yield file.read(size[0])


def _xmp(file: BinaryIO) -> bytes:
    """Return an XMP packet, which GIF files store without lengths.

    Readers of sub-blocks take some of its letters for lengths; 257 bytes of decreasing numbers after the packet lead
    any such reader to the end.
    """
    content = b"".join(bytes([len(piece)]) + piece for piece in _sub_blocks(file))
    end = content.rfind(b"\x01\xff\xfe\xfd")
    return content[:end] if end > 0 else b""


def _decoded(content: bytes) -> str:
    try:
        return content.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        return content.rstrip(b"\0").decode("latin-1")


def heif_frames(file: BinaryIO) -> int:
    """Return the number of frames in the longest image sequence of a file, 0 if there is none (ISO/IEC 14496-12).

    libvips reads only the still image beside such a sequence.

    Args:
        file: The AVIF or HEIC file, seekable. Its position afterwards is undefined.
    """
    longest = 0
    for movie in _all(file, b"moov"):
        for track in _all(io.BytesIO(movie), b"trak"):
            for media in _all(io.BytesIO(track), b"mdia"):
                # Skip tracks of alpha and sound, which belong to another track.
                if any(handler[8:12] in (b"pict", b"vide") for handler in _all(io.BytesIO(media), b"hdlr")):
                    longest = max(longest, _samples(media))
    return longest


def _samples(media: bytes) -> int:
    """Return the number of samples in a track, from its table of sample sizes."""
    for information in _all(io.BytesIO(media), b"minf"):
        for table in _all(io.BytesIO(information), b"stbl"):
            for name, content in heif_boxes(io.BytesIO(table)):
                if name in (b"stsz", b"stz2") and len(content) >= 12:
                    return int(struct.unpack_from(">I", content, 8)[0])
    return 0


def _all(file: BinaryIO, wanted: bytes) -> list[bytes]:
    return [content for name, content in heif_boxes(file) if name == wanted]
