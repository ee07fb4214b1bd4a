"""Read and update XMP packets (ISO 16684-1, and the specifications of the namespaces).

A packet is parsed and rewritten only if something in it changes, with a parser that keeps prefixes and order.
"""

from __future__ import annotations

import codecs
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any
from xml.parsers.expat import ExpatError

from savl.images.metadata_record import DEPTH_MAP, FILM, GAIN_MAP
from savl.images.result_mark import holds_descriptions

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_TIFF, _EXIF = "http://ns.adobe.com/tiff/1.0/", "http://ns.adobe.com/exif/1.0/"
_XMP, _DC = "http://ns.adobe.com/xap/1.0/", "http://purl.org/dc/elements/1.1/"
_REGIONS = "http://www.metadataworkinggroup.com/schemas/regions/"
_AREA, _DIMENSIONS = "http://ns.adobe.com/xmp/sType/Area#", "http://ns.adobe.com/xap/1.0/sType/Dimensions#"
_IPTC_EXTENSION = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_PANORAMA = "http://ns.google.com/photos/1.0/panorama/"
_MICROSOFT_PHOTO = "http://ns.microsoft.com/photo/1.2/"

# Namespaces that describe further images in the file, which are not copied.
_GAIN_MAPS = ("http://ns.adobe.com/hdr-gain-map/1.0/", "http://ns.apple.com/HDRGainMap/1.0/")
_CONTAINERS = ("http://ns.google.com/photos/1.0/container/", "http://ns.google.com/photos/1.0/container/item/")
_DEPTH = "http://ns.google.com/photos/dd/1.0/"
_CAMERA = "http://ns.google.com/photos/1.0/camera/"

_WIDTHS = frozenset({(_TIFF, "ImageWidth"), (_EXIF, "PixelXDimension")})
_HEIGHTS = frozenset({(_TIFF, "ImageLength"), (_EXIF, "PixelYDimension")})
_PANORAMA_SIDES = ("Width", "Left", "Height", "Top")

UNREADABLE = (ExpatError, ValueError, RecursionError, LookupError, AttributeError)
"""Exceptions raised by parsing a packet, or by changing a damaged one."""

Node = Any  # minidom has no type annotations
_Setter = Callable[[str], object]


def parse_xmp(packet: bytes) -> Node:
    """Parse a packet.

    Raises:
        ExpatError, ValueError, RecursionError, LookupError: The packet is damaged, is not XMP, or defines entities.
    """
    from xml.dom import minidom  # imported only for images with XMP

    if packet[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        packet = packet.decode("utf-16").encode()
    if b"<!DOCTYPE" in packet:
        raise ValueError("an XMP packet has no document type")
    document = minidom.parseString(packet.strip(b"\0 \r\n\t"))
    if not document.getElementsByTagNameNS(RDF, "RDF"):
        raise ValueError("the packet has no RDF element")
    return document


def encode_xmp(document: Node) -> bytes:
    """Return the packet of a document, without an XML declaration, which XMP does not need."""
    return "".join(node.toxml() for node in document.childNodes).encode()


def clean_xmp(packet: bytes, *, turned: bool) -> tuple[bytes | None, list[str]]:
    """Remove from a packet what is not valid for the upright image alone; return it and the names of what was removed.

    The orientation is set to upright. Thumbnails are removed without a note, because they show the old image.
    Properties of gain maps, depth maps and films in the same file are removed, because these are not copied.

    Args:
        packet: The packet as it was read.
        turned: Whether an orientation was applied to the samples, so that regions are not valid any more.
    """
    try:
        document = parse_xmp(packet)
        lost: list[str] = []
        changed = not holds_descriptions(packet)  # for example in UTF-16, in which a mark could not be added
        for node, namespace, name, value, put in list(_properties(document)):
            if (namespace, name) == (_TIFF, "Orientation"):
                if value.strip() != "1":
                    put("1")
                    changed = True
                continue
            what = _stale(namespace, name, value, turned)
            if what is not None:
                _remove(node, namespace, name)
                changed = True
                lost += [what] if what and what not in lost else []
        return encode_xmp(document) if changed else packet, lost
    except UNREADABLE:
        return None, ["XMP, which is damaged"]


def resize_xmp(packet: bytes, new_size: tuple[int, int], scale: tuple[float, float]) -> bytes:
    """Update a packet for the image at another size.

    Args:
        packet: The packet as returned by `clean_xmp`.
        new_size: Width and height, in pixels.
        scale: New pixels per old pixel, horizontally and vertically.
    """
    try:
        document = parse_xmp(packet)
        changed = False
        for node, namespace, name, value, put in list(_properties(document)):
            if (namespace, name) in _WIDTHS:
                new = str(new_size[0])
            elif (namespace, name) in _HEIGHTS:
                new = str(new_size[1])
            else:
                new = _scaled(node, namespace, name, value, scale)
            if new != value:
                put(new)
                changed = True
        return encode_xmp(document) if changed else packet
    except UNREADABLE:
        return packet


def add_captions(
    packet: bytes | None, *, title: str = "", creator: str = "", description: str = "", rights: str = ""
) -> bytes | None:
    """Add Dublin Core properties to a packet unless it has them; return None if there is nothing to store.

    Args:
        packet: The packet to extend, or None.
        title: Title of the image; "" adds no property, here and below.
        creator: Author.
        description: Description.
        rights: Copyright notice.
    """
    wanted = {"title": title, "creator": creator, "description": description, "rights": rights}
    if not any(wanted.values()):
        return packet
    try:
        held = (
            {name for _, namespace, name, _, _ in _properties(parse_xmp(packet)) if namespace == _DC}
            if packet
            else set()
        )
    except UNREADABLE:
        packet, held = None, set()
    parts = []
    for name, text in wanted.items():
        if text and name not in held:
            kind, language = ("Seq", "") if name == "creator" else ("Alt", ' xml:lang="x-default"')
            printable = "".join(c for c in text if c in "\n\t" or (c >= " " and c not in "\ufffe\uffff"))
            printable = printable.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            parts.append(f"<dc:{name}><rdf:{kind}><rdf:li{language}>{printable}</rdf:li></rdf:{kind}></dc:{name}>")
    if not parts:
        return packet
    description_element = (
        f'<rdf:Description xmlns:rdf="{RDF}" rdf:about="" xmlns:dc="{_DC}">{"".join(parts)}</rdf:Description>'
    )
    try:
        return insert_description(packet, description_element.encode())
    except UNREADABLE:  # nested so deeply that parsing exceeds the recursion limit here, though not before
        return packet


def captions_of(packet: bytes, name: str) -> list[str]:
    """Return the texts of a Dublin Core property in all languages; none if the packet is damaged.

    Args:
        packet: The packet.
        name: Name of the property, such as "title".
    """
    try:
        document = parse_xmp(packet)
        texts: list[str] = []
        for element, namespace, local, value, _ in _properties(document):
            if (namespace, local) == (_DC, name):
                texts.append(value)
                items = element.getElementsByTagNameNS(RDF, "li") if element.localName == name else []
                texts += ["".join(child.data for child in item.childNodes if hasattr(child, "data")) for item in items]
        return texts
    except UNREADABLE:
        return []


def insert_description(packet: bytes | None, description: bytes) -> bytes:
    """Insert a description at the beginning of a packet.

    Args:
        packet: The packet, as returned by `clean_xmp`; None creates a new packet.
        description: An rdf:Description element that declares its namespaces.
    """
    from xml.dom import minidom

    document = parse_xmp(packet or new_packet())
    element = minidom.parseString(description).documentElement
    rdf = document.getElementsByTagNameNS(RDF, "RDF")[0]
    rdf.insertBefore(document.importNode(element, True), rdf.firstChild)
    return encode_xmp(document)


def new_packet() -> bytes:
    """Return a packet without properties."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{RDF}"></rdf:RDF></x:xmpmeta>'
        '<?xpacket end="w"?>'
    ).encode()


def _properties(document: Node) -> Iterator[tuple[Node, str, str, str, _Setter]]:
    """Yield each element and attribute in RDF: its element, namespace, name, text, and a function to set the text."""
    for rdf in document.getElementsByTagNameNS(RDF, "RDF"):
        for element in [rdf, *rdf.getElementsByTagName("*")]:
            for attribute in list(element.attributes.values()):
                if attribute.namespaceURI and attribute.prefix not in ("xmlns", "xml") and attribute.name != "xmlns":
                    put = functools.partial(setattr, attribute, "value")
                    yield element, attribute.namespaceURI, attribute.localName, attribute.value, put
            text = "".join(child.data for child in element.childNodes if child.nodeType == child.TEXT_NODE)
            yield element, element.namespaceURI or "", element.localName, text, functools.partial(_set_text, element)


def _set_text(element: Node, text: str) -> None:
    while element.firstChild is not None:
        element.removeChild(element.firstChild)
    element.appendChild(element.ownerDocument.createTextNode(text))


def _remove(element: Node, namespace: str, name: str) -> None:
    """Remove an element, or the attribute of this name if the element has one."""
    if (element.namespaceURI or "", element.localName) == (namespace, name):
        if element.parentNode is not None:
            element.parentNode.removeChild(element)
    elif element.hasAttributeNS(namespace, name):
        element.removeAttributeNS(namespace, name)


def _stale(namespace: str, name: str, value: str, turned: bool) -> str | None:
    """Return the name of the loss if a property must be removed, "" for a loss without a note, None if it may stay."""
    if (namespace, name) == (_XMP, "Thumbnails") or namespace in _CONTAINERS:
        return ""
    if namespace in _GAIN_MAPS:
        return GAIN_MAP
    if namespace.startswith(_DEPTH):
        return DEPTH_MAP
    if namespace == _CAMERA and name.startswith(("MotionPhoto", "MicroVideo")):
        return FILM if name in ("MotionPhoto", "MicroVideo") and value.strip() == "1" else ""
    regions = ((_REGIONS, "Regions"), (_MICROSOFT_PHOTO, "RegionInfo"), (_IPTC_EXTENSION, "ImageRegion"))
    if turned and (namespace, name) in regions:
        return "marked regions, as the image was turned"
    return None


def _scaled(element: Node, namespace: str, name: str, value: str, scale: tuple[float, float]) -> str:
    """Return the text of a property for the image at another size; unchanged if it does not contain pixels."""
    factor: float | None = None
    if namespace == _PANORAMA and name.startswith(("Full", "Cropped", "Largest")):
        side = next((word for word in _PANORAMA_SIDES if word in name), "")
        factor = {"Width": scale[0], "Left": scale[0], "Height": scale[1], "Top": scale[1]}.get(side)
    elif namespace == _DIMENSIONS and _has_property(element, _DIMENSIONS, "unit", "pixel"):
        factor = {"w": scale[0], "h": scale[1]}.get(name)
    elif namespace == _AREA and _has_property(element, _AREA, "unit", "pixel"):
        factor = {"x": scale[0], "w": scale[0], "y": scale[1], "h": scale[1], "d": math.sqrt(scale[0] * scale[1])}.get(
            name
        )
    elif namespace == _IPTC_EXTENSION and _has_property(element, _IPTC_EXTENSION, "rbUnit", "pixel"):
        across = {"rbX": scale[0], "rbW": scale[0], "rbY": scale[1], "rbH": scale[1]}
        factor = {**across, "rbRx": math.sqrt(scale[0] * scale[1])}.get(name)
    elif (namespace, name) == (RDF, "li"):
        factor = _subject_factor(element, scale)
    elif namespace == _EXIF and name in ("FocalPlaneXResolution", "FocalPlaneYResolution"):
        return _scaled_fraction(value, scale[name == "FocalPlaneYResolution"])
    if factor is None:
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    if not math.isfinite(number):
        return value
    return str(round(number * factor)) if number == int(number) else f"{number * factor:.6g}"


def _has_property(element: Node, namespace: str, name: str, wanted: str) -> bool:
    """Return whether an element or its parent has a property with this value, as an attribute or an element."""
    for holder in (element, element.parentNode):
        if holder is None or holder.nodeType != holder.ELEMENT_NODE:
            continue
        if holder.getAttributeNS(namespace, name).strip() == wanted:
            return True
        for child in holder.childNodes:
            if child.nodeType == child.ELEMENT_NODE and (child.namespaceURI, child.localName) == (namespace, name):
                return (
                    "".join(text.data for text in child.childNodes if text.nodeType == text.TEXT_NODE).strip() == wanted
                )
    return False


def _subject_factor(item: Node, scale: tuple[float, float]) -> float | None:
    """Return the scale of one number in exif:SubjectArea or exif:SubjectLocation: x, y, and a diameter or two sides."""
    holder = item.parentNode.parentNode if item.parentNode is not None else None
    if holder is None or holder.namespaceURI != _EXIF or holder.localName not in ("SubjectArea", "SubjectLocation"):
        return None
    items = [node for node in item.parentNode.childNodes if node.nodeType == node.ELEMENT_NODE]
    index = next(place for place, node in enumerate(items) if node is item)
    return math.sqrt(scale[0] * scale[1]) if len(items) == 3 and index == 2 else scale[index % 2]


def _scaled_fraction(value: str, factor: float) -> str:
    numerator, _, denominator = value.partition("/")
    try:
        return f"{round(float(numerator) * factor * 1000)}/{int(denominator or 1) * 1000}"
    except (ValueError, OverflowError):
        return value
