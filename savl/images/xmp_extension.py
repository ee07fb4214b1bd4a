"""Split and join XMP packets above 64 kB for JPEG files: a main packet and an extension (XMP, part 3, 1.1.3.1)."""

from __future__ import annotations

import hashlib

from savl.images.xmp import RDF, UNREADABLE, Node, encode_xmp, insert_description, new_packet, parse_xmp

_NOTE = "http://ns.adobe.com/xmp/note/"
_XMLNS = "http://www.w3.org/2000/xmlns/"


def join_extended_xmp(main: bytes, extension: bytes) -> bytes | None:
    """Join two packets to one with the properties of both; return None if one of them is damaged.

    Args:
        main: The packet of the main segment, which names the extension.
        extension: The packet assembled from the segments of the extension.
    """
    try:
        document, extended = parse_xmp(main), parse_xmp(extension)
        rdf = document.getElementsByTagNameNS(RDF, "RDF")[0]
        for description in rdf.getElementsByTagNameNS(RDF, "Description"):
            if description.hasAttributeNS(_NOTE, "HasExtendedXMP"):
                description.removeAttributeNS(_NOTE, "HasExtendedXMP")
        for element in list(rdf.getElementsByTagNameNS(_NOTE, "HasExtendedXMP")):
            element.parentNode.removeChild(element)
        for added in _descriptions(extended):
            rdf.appendChild(document.importNode(_with_namespaces(added), True))
        return encode_xmp(document)
    except UNREADABLE:
        return None


def split_extended_xmp(packet: bytes, limit: int) -> tuple[bytes | None, tuple[bytes, bytes] | None]:
    """Split a packet into a main packet of at most `limit` bytes and, if needed, an extension: its GUID and packet.

    The largest properties are moved to the extension first. The main packet is None if it cannot be made to fit.
    """
    if len(packet) <= limit:
        return packet, None
    try:
        document = parse_xmp(packet)
        extended = parse_xmp(new_packet())
        target = extended.getElementsByTagNameNS(RDF, "RDF")[0]
        properties = [
            (len(_encoded(node)), owner, node)
            for owner in _descriptions(document)
            for node in [*owner.attributes.values(), *owner.childNodes]
            if _is_property(node)
        ]
        room = limit - 200  # reserve space for the name of the extension
        size = len(encode_xmp(document))
        for length, owner, node in sorted(properties, key=lambda item: -item[0]):
            if size <= room:
                break
            target.appendChild(extended.importNode(_moved(owner, node), True))
            size -= length
        body = encode_xmp(extended.documentElement.ownerDocument)
        guid = hashlib.md5(body, usedforsecurity=False).hexdigest().upper().encode()
        name = (
            f'<rdf:Description xmlns:rdf="{RDF}" rdf:about="" xmlns:xmpNote="{_NOTE}" '
            f'xmpNote:HasExtendedXMP="{guid.decode()}"/>'
        ).encode()
        main = insert_description(encode_xmp(document), name)
    except UNREADABLE:
        return None, None
    return (main, (guid, body)) if len(main) <= limit else (None, None)


def _descriptions(document: Node) -> list[Node]:
    rdf = document.getElementsByTagNameNS(RDF, "RDF")[0]
    return [
        node
        for node in rdf.childNodes
        if node.nodeType == node.ELEMENT_NODE and (node.namespaceURI, node.localName) == (RDF, "Description")
    ]


def _is_property(node: Node) -> bool:
    """Return whether an attribute or child of a description is a property, not a declaration or white space."""
    if node.nodeType == node.ATTRIBUTE_NODE:
        return bool(node.namespaceURI) and node.namespaceURI not in (_XMLNS, RDF) and node.prefix != "xml"
    return bool(node.nodeType == node.ELEMENT_NODE)


def _encoded(node: Node) -> bytes:
    if node.nodeType == node.ATTRIBUTE_NODE:
        return f' {node.name}="{node.value}"'.encode()
    return bytes(node.toxml().encode())


def _moved(owner: Node, node: Node) -> Node:
    """Move a property out of its description into a new description with the same namespaces, and return that."""
    shell = _with_namespaces(owner.cloneNode(False))
    for attribute in list(shell.attributes.values()):
        if _is_property(attribute):
            shell.removeAttributeNode(attribute)
    for name, value in _namespaces(owner).items():
        shell.setAttributeNS(_XMLNS, name, value)
    if node.nodeType == node.ATTRIBUTE_NODE:
        shell.setAttributeNS(node.namespaceURI, node.name, node.value)
        owner.removeAttributeNode(node)
    else:
        owner.removeChild(node)
        shell.appendChild(node)
    return shell


def _with_namespaces(element: Node) -> Node:
    """Return the element with the namespace declarations of its ancestors added to it."""
    for name, value in _namespaces(element).items():
        element.setAttributeNS(_XMLNS, name, value)
    return element


def _namespaces(element: Node) -> dict[str, str]:
    declared: dict[str, str] = {}
    node = element
    while node is not None and node.nodeType == node.ELEMENT_NODE:
        for attribute in node.attributes.values():
            if attribute.name.startswith("xmlns:"):
                declared.setdefault(attribute.name, attribute.value)
        node = node.parentNode
    return declared
