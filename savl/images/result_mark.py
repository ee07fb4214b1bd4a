"""Mark results as made by savl, so that a later run does not take them for inputs.

The mark is a property in the file's XMP packet, in a namespace of savl: the same for PNG, JPEG, WebP and TIFF, and
other programs keep it. It stands at the beginning of the packet. A second property holds a digest of the source
(`digest_origin`), by which a later run can tell whether a result was made from the current input or from another image.
"""

from __future__ import annotations

import os
import re
import stat
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

from savl.images import jpeg_structure, png_chunks, tiff_directory, webp_metadata
from savl.images.format import JPEG, PNG, TIFF, WEBP, ImageFormat, format_of_content

UPSCALED = "upscaled"
DEGRADED = "degraded"
SEVERITY_MAP = "severity map"
STRENGTH_MAP = "strength map"
MAP_MARKS = (SEVERITY_MAP, STRENGTH_MAP)
MARKS = (UPSCALED, DEGRADED, *MAP_MARKS)

# It ends in a slash because Adobe's toolkit, which many programs use, adds one to namespaces without it.
_NAMESPACE = "urn:savl:result:1.0/"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
# Beginning of savl's own description, up to the mark.
_OWN_BEGINNING = f'<rdf:Description xmlns:rdf="{_RDF}" rdf:about="" xmlns:savl="{_NAMESPACE}" savl:result='
_EMPTY_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{_RDF}"></rdf:RDF></x:xmpmeta>'
    '<?xpacket end="w"?>'
).encode()
_PREFIX = re.compile(rb"""xmlns:([\w.-]+)\s*=\s*["']""" + re.escape(_NAMESPACE.encode()) + rb"""["']""")
# The element that contains the descriptions, with any prefix, but not an empty element.
_RDF_ELEMENT = re.compile(rb"<(?:[\w.-]+:)?RDF(?:\s[^<>]*)?(?<!/)>")
_XMP_TAG = 700
_MAX_PACKET = 16 * 2**20


def add_mark(xmp: bytes | None, mark: str, origin: str | None = None) -> bytes:
    """Return an XMP packet with this mark instead of any other.

    Args:
        xmp: The packet to extend. None, or a packet that cannot be parsed, is replaced by a new packet.
        mark: One of `MARKS`.
        origin: Digest of the source (`digest_origin`), or None.

    Raises:
        ValueError: `mark` is not in `MARKS`, or `origin` is not a digest.
    """
    if mark not in MARKS:
        raise ValueError(f"mark: {mark!r}; accepted are {', '.join(MARKS)}")
    if origin is not None and not origin.isalnum():
        raise ValueError(f"origin: {origin!r}; a digest in hexadecimal digits is accepted")
    packet = _without_marks(xmp) if xmp is not None and holds_descriptions(xmp) else _EMPTY_PACKET
    element = _RDF_ELEMENT.search(packet)
    assert element is not None  # `holds_descriptions` has checked it, and `_EMPTY_PACKET` has one
    description = _description(mark, origin)
    return packet[: element.end()] + description + packet[element.end() :]


def _description(mark: str, origin: str | None) -> bytes:
    source = "" if origin is None else f' savl:source="{origin}"'
    return f'{_OWN_BEGINNING}"{mark}"{source}/>'.encode()


def _without_marks(packet: bytes) -> bytes:
    """Return the packet without marks: neither savl's descriptions nor its properties in those of other programs."""
    packet = re.sub(re.escape(_OWN_BEGINNING.encode()) + rb"""[\w "=:]*/>""", b"", packet)
    for prefix in {found.group(1) for found in _PREFIX.finditer(packet)}:
        name = re.escape(prefix) + rb":(?:result|source)"
        packet = re.sub(rb"\s" + name + rb"""\s*=\s*("[^"]*"|'[^']*')""", b"", packet)
        packet = re.sub(rb"<" + name + rb"\s*>[^<]*</" + name + rb"\s*>", b"", packet)
    return packet


def holds_descriptions(xmp: bytes) -> bool:
    """Return whether a description can be added to an XMP packet."""
    return _RDF_ELEMENT.search(xmp) is not None


def find_mark(xmp: bytes) -> str | None:
    """Return the mark in an XMP packet, stored as an attribute or an element, or None."""
    text = _find_property(xmp, b"result")
    return text if text in MARKS else None


def find_origin(xmp: bytes) -> str | None:
    """Return the digest of the source in an XMP packet with a mark, or None."""
    return None if find_mark(xmp) is None else _find_property(xmp, b"source") or None


def read_mark(path: str | os.PathLike[str]) -> str | None:
    """Return the mark of an image file, or None.

    Only headers are read. A file that is missing, unreadable, damaged or not an image has no mark.
    """
    packet = _packet_of(path)
    return None if packet is None else find_mark(packet)


def read_origin(file: str | os.PathLike[str] | BinaryIO) -> str | None:
    """Return the digest of the source that is stored in a result, or None; otherwise like `read_mark`.

    Args:
        file: The path of the result, or the result as a seekable file, which is read from its beginning.
    """
    packet = _packet_of(file)
    return None if packet is None else find_origin(packet)


def _find_property(xmp: bytes, local_name: bytes) -> str | None:
    for prefix in dict.fromkeys(found.group(1) for found in _PREFIX.finditer(xmp)):
        name = re.escape(prefix) + b":" + local_name
        found = re.search(name + rb"""\s*=\s*["']([^"']*)["']|<""" + name + rb"\s*>([^<]*)<", xmp)
        if found is not None:
            return (found.group(1) or found.group(2) or b"").decode("utf-8", errors="replace").strip()
    return None


def _packet_of(source: str | os.PathLike[str] | BinaryIO) -> bytes | None:
    try:
        with open(source, "rb") if isinstance(source, (str, os.PathLike)) else nullcontext(source) as file:
            image_format = format_of_content(file.read(12))
            return None if image_format is None else _read_packet(file, image_format)
    except (OSError, ValueError):
        return None


def _read_packet(file: BinaryIO, image_format: ImageFormat) -> bytes | None:
    """Return the XMP packet before the samples; for JPEG files its main part."""
    if image_format is PNG:
        for chunk in png_chunks.read_chunks(file, stop_at_samples=True):
            packet = png_chunks.xmp_packet(chunk)
            if packet is not None:
                return packet[:_MAX_PACKET]
    elif image_format is JPEG:
        for segment in jpeg_structure.read_segments(file):
            if segment.marker == jpeg_structure.APP1 and segment.content.startswith(jpeg_structure.XMP):
                return segment.content[len(jpeg_structure.XMP) :]
    elif image_format is WEBP:
        for name, content in webp_metadata.read_chunks(file):
            if name == b"XMP ":
                return content[:_MAX_PACKET]
    elif image_format is TIFF:
        found = tiff_directory.read_layout(file)
        if found is not None:
            entry = tiff_directory.read_directory(file, *found, tags=[_XMP_TAG]).get(_XMP_TAG)
            return None if entry is None else entry.data[:_MAX_PACKET]
    return None


_PART = 2**16  # bytes read at the beginning and at the end, so that large files need not be read completely


def digest_origin(source: str | os.PathLike[str] | bytes, page: int | None = None) -> str | None:
    """Compute a digest of the bytes and the page of an image file; return None if it cannot be read.

    The digest depends on the size of the file, its first and last 64 KiB, and the page. It does not depend on the name,
    which stays private, nor on the folder, so files can be moved together with their results.

    Args:
        source: The file, or its content. Only regular files are read, because data from a pipe cannot be read twice.
        page: Page number in a file with several pages, counted from 1; None selects the first page.

    Returns:
        Eight hexadecimal digits, or None.
    """
    if isinstance(source, bytes):
        size, first, last = len(source), source[:_PART], source[-_PART:]
    else:
        try:
            if not stat.S_ISREG(os.stat(source).st_mode):
                return None
            with Path(source).open("rb") as file:
                first = file.read(_PART)
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _PART))
                last = file.read(_PART)
        except (OSError, ValueError):
            return None
    checksum = zlib.crc32(last, zlib.crc32(first, zlib.crc32(f"{size} {page or 1}".encode())))
    return f"{checksum:08x}"
