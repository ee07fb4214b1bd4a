"""Decode JPEG files, and refuse files with corrupt image data.

Where image data is corrupt, libjpeg fills blocks with made-up content and only gives a warning. It gives the same kind
of warning for harmless faults, such as the stray bytes that many cameras write before a marker. Files that have only
harmless faults are decoded; files with corrupt image data are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

from savl.images.jpeg_structure import special_kind, without_harmless_faults, without_stray_bytes
from savl.images.vips_decode import (
    Attempt,
    DecodeFailure,
    Load,
    UnsupportedKind,
    decode_alone,
    decode_shared,
    reports_out_of_memory,
    summarized_message,
)

if TYPE_CHECKING:
    import pyvips


def decode_jpeg(file: BinaryIO, load: Load) -> pyvips.Image:
    """Decode a JPEG file to an image in memory.

    Nearly all files are decoded once. After a warning, the file is decoded again with its harmless faults removed, and
    is refused if the decoder still warns.

    Args:
        file: JPEG file, which must be seekable.
        load: Function that opens the file with libvips.

    Raises:
        DecodeFailure: The file is truncated or corrupt.
        UnsupportedKind: libvips cannot decode this kind of JPEG file.
    """
    attempt = decode_shared(load, fail_on="warning")
    if attempt.image is not None and not attempt.warnings:
        return attempt.image
    file.seek(0)
    content = file.read()
    kind = special_kind(content)
    content = without_harmless_faults(content)
    attempt = _decode_alone(content)
    while attempt.image is not None and attempt.warnings:
        if attempt.jpeg_warning and "Corrupt JPEG data" not in attempt.jpeg_warning:
            break
        for shorter in without_stray_bytes(content, attempt.jpeg_warning):
            trial = _decode_alone(shorter)
            if trial.image is not None and trial.warnings < attempt.warnings:
                content, attempt = shorter, trial
                break
        else:
            raise DecodeFailure(attempt.jpeg_warning or "the decoder found corrupt data")
    if attempt.image is None:
        if kind is not None and not reports_out_of_memory(attempt.messages):
            raise UnsupportedKind(f"is a JPEG file of a kind that savl cannot read: {kind}")
        raise DecodeFailure(summarized_message(attempt.messages))
    return attempt.image


def _decode_alone(content: bytes) -> Attempt:
    import pyvips

    def load(fail_on: str) -> pyvips.Image:
        return pyvips.Image.jpegload_source(pyvips.Source.new_from_memory(content), fail_on=fail_on)

    for _ in range(5):
        attempt = decode_alone(load)
        # Warnings without text mean that code outside savl has cleared the messages, so the file is decoded again.
        if not attempt.warnings or attempt.jpeg_warning:
            break
    return attempt
