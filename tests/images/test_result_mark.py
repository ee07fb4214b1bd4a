"""The mark of results: it is written to every format and read from headers alone."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from savl.images.format import FORMATS, JPEG, PNG, ImageFormat
from savl.images.metadata import Metadata
from savl.images.result_mark import (
    DEGRADED,
    MARKS,
    SEVERITY_MAP,
    UPSCALED,
    add_mark,
    digest_origin,
    find_mark,
    find_origin,
    read_mark,
)
from savl.images.write import write_image

PIXELS = np.full((12, 16, 3), 90, np.uint8)
TITLE = b'<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" dc:format="image/png"/>'
PACKET = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    + TITLE
    + b"</rdf:RDF></x:xmpmeta>"
)


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("image_format", FORMATS, ids=lambda f: f.name)
def test_a_mark_is_read_back(tmp_path: Path, image_format: ImageFormat, mark: str) -> None:
    path = tmp_path / "x"
    write_image(path, PIXELS, image_format=image_format, mark=mark)
    assert read_mark(path) == mark
    Image.open(path).load()


@pytest.mark.parametrize("image_format", FORMATS, ids=lambda f: f.name)
def test_a_file_without_a_mark_has_none(tmp_path: Path, image_format: ImageFormat) -> None:
    path = tmp_path / "x"
    write_image(path, PIXELS, Metadata(xmp=PACKET), image_format=image_format)
    assert read_mark(path) is None


@pytest.mark.parametrize("image_format", FORMATS, ids=lambda f: f.name)
def test_a_new_mark_takes_the_place_of_the_old_and_leaves_the_packet(tmp_path: Path, image_format: ImageFormat) -> None:
    marked = add_mark(PACKET, UPSCALED)
    path = tmp_path / "x"
    write_image(path, PIXELS, Metadata(xmp=marked), image_format=image_format, mark=DEGRADED)
    assert read_mark(path) == DEGRADED
    twice = add_mark(marked, DEGRADED)
    assert twice.count(b"savl:result=") == 1
    assert TITLE in twice


def test_a_mark_that_another_program_wrote_as_an_element_is_found() -> None:
    packet = PACKET.replace(
        TITLE, b'<rdf:Description xmlns:ns1="urn:savl:result:1.0/"><ns1:result>upscaled</ns1:result></rdf:Description>'
    )
    assert find_mark(packet) == UPSCALED


@pytest.mark.parametrize(
    "description",
    [
        b"<rdf:Description rdf:about='' xmlns:s='urn:savl:result:1.0/' xmlns:dc='http://purl.org/dc/elements/1.1/'"
        b" s:result='upscaled' dc:format='image/png'/>",
        b"<rdf:Description rdf:about='' xmlns:s='urn:savl:result:1.0/' xmlns:dc='http://purl.org/dc/elements/1.1/'>"
        b"<s:result>upscaled</s:result><dc:format>image/png</dc:format></rdf:Description>",
    ],
    ids=["attributes", "elements"],
)
def test_a_mark_that_another_program_put_among_others_leaves_alone(description: bytes) -> None:
    packet = PACKET.replace(TITLE, description)
    assert find_mark(packet) == UPSCALED
    marked = add_mark(packet, DEGRADED)
    assert find_mark(marked) == DEGRADED
    assert UPSCALED.encode() not in marked
    assert b"dc:format" in marked


def test_a_new_digest_of_the_source_takes_the_place_of_the_old_or_goes_with_the_mark() -> None:
    marked = add_mark(PACKET, UPSCALED, "0123abcd")
    assert find_origin(marked) == "0123abcd"
    assert find_mark(marked) == UPSCALED
    again = add_mark(marked, DEGRADED, "ffff0000")
    assert (find_mark(again), find_origin(again)) == (DEGRADED, "ffff0000")
    assert b"0123abcd" not in again
    assert len(again) == len(marked)
    none = add_mark(marked, DEGRADED)
    assert find_origin(none) is None
    assert none == add_mark(PACKET, DEGRADED)


def test_the_digest_of_a_source_follows_from_its_bytes_and_page(tmp_path: Path) -> None:
    path = tmp_path / "a"
    content = bytes(range(256)) * 1024
    path.write_bytes(content)
    first = digest_origin(path)
    assert first == digest_origin(content) == digest_origin(path, 1)
    others = {
        digest_origin(path, 2),
        digest_origin(content[1:]),
        digest_origin(content[:-1] + b"x"),
        digest_origin(b""),
    }
    assert len(others - {first, None}) == 4
    assert digest_origin(tmp_path) is None
    assert digest_origin(tmp_path / "missing") is None


def test_a_packet_that_cannot_be_parsed_is_replaced() -> None:
    for junk in (b"", b"no xml", b'<rdf:RDF xmlns:rdf="x"/>', b"\xff\xfe\0"):
        assert find_mark(add_mark(junk, SEVERITY_MAP)) == SEVERITY_MAP


def test_a_mark_of_another_name_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'sharpened'; accepted are upscaled, degraded, severity map"):
        add_mark(None, "sharpened")


@pytest.mark.parametrize("image_format", FORMATS, ids=lambda f: f.name)
def test_damaged_and_missing_files_have_no_mark_and_raise_nothing(tmp_path: Path, image_format: ImageFormat) -> None:
    path = tmp_path / "x"
    write_image(path, PIXELS, image_format=image_format, mark=UPSCALED)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        read_mark(path)
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 6):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged)
        read_mark(path)
    path.write_bytes(struct.pack(">2sHI", b"MM", 42, 8) + b"\xff" * 40)
    assert read_mark(path) is None
    assert read_mark(tmp_path) is None
    assert read_mark(tmp_path / "missing") is None


def test_only_headers_are_read(tmp_path: Path) -> None:
    """The mark is read although the samples are missing, so nothing is decoded."""
    for image_format in (PNG, JPEG):
        path = tmp_path / "x"
        write_image(path, PIXELS, image_format=image_format, mark=UPSCALED, overwrite=True)
        whole = path.read_bytes()
        end = whole.index(b"IDAT") + 4 if image_format is PNG else whole.index(b"\xff\xda")
        path.write_bytes(whole[:end])
        assert read_mark(path) == UPSCALED
