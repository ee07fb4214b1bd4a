"""Decoded images: in the memory of a process, or in a file that all processes of a machine read the same memory of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from savl.atomic_write import atomic_write
from savl.inference.errors import ImageFileError
from savl.inference.image_folder import decode_rgb

SUFFIX = ".images"
FORMAT = 1
_END = 8
"""Bytes at the end of a file that say how long the table before them is."""

OnImage = Callable[[int, int], None]


def decode_images(
    paths: Sequence[Path], cache: str | Path = "", on_image: OnImage | None = None
) -> list[NDArray[np.uint8]]:
    """Decode images, or find them decoded.

    Args:
        paths: The files.
        cache: Folder where the pixels of these files are kept, 3 bytes each, and mapped into memory: processes share
            what is read of them, and only what is read takes memory. A file that has changed since, by size or time of
            change, makes another one necessary; what is no longer needed may be deleted. An empty name keeps all
            pixels in the memory of this process.
        on_image: Told (decoded so far, total) after each image that is decoded.

    Returns:
        ``(H, W, 3)`` each, in the order of the paths, not to be written to.

    Raises:
        ImageFileError: An image cannot be read.
        OSError: The cache cannot be written or read.
    """
    if not str(cache):
        return [_decode(paths, index, on_image) for index in range(len(paths))]
    file = Path(cache) / (_digest(paths) + SUFFIX)
    images = _read(file, len(paths))
    if images is None:
        _write(file, paths, on_image)
        images = _read(file, len(paths))
        if images is None:
            raise OSError(f"data.cache: {file} is damaged as soon as it has been written")
    return images


def _decode(paths: Sequence[Path], index: int, on_image: OnImage | None) -> NDArray[np.uint8]:
    pixels = decode_rgb(paths[index])
    if on_image is not None:
        on_image(index + 1, len(paths))
    return pixels


def _digest(paths: Sequence[Path]) -> str:
    """Of the files' names, sizes and times of change: the pixels that they stand for, without reading them."""
    digest = hashlib.sha256(f"{FORMAT}".encode())
    for path in paths:
        stat = path.stat()
        digest.update(f"\0{stat.st_size} {stat.st_mtime_ns} ".encode() + os.fsencode(path.resolve()))
    return digest.hexdigest()[:32]


def _write(file: Path, paths: Sequence[Path], on_image: OnImage | None) -> None:
    """The pixels of one image after the other, a table of their sizes (JSON), and how many bytes that has."""
    sizes = []
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file, overwrite=True) as out:
            for index in range(len(paths)):
                pixels = _decode(paths, index, on_image)
                sizes.append(pixels.shape[:2])
                _append(out, pixels.reshape(-1).data)
            table = json.dumps(sizes).encode()
            _append(out, memoryview(table + len(table).to_bytes(_END, "little")))
    except ImageFileError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"data.cache: {error.strerror}", str(file)) from error


def _append(out: BinaryIO, data: memoryview) -> None:
    while data:  # an unbuffered write may take only a part
        data = data[out.write(data) :]


def _read(file: Path, count: int) -> list[NDArray[np.uint8]] | None:
    """The images in a file; None where there is none, or another than `_write` leaves."""
    if not file.is_file() or file.stat().st_size < _END:
        return None
    whole = np.asarray(np.memmap(file, np.uint8, "r"))
    end = len(whole) - _END
    start = end - int.from_bytes(whole[end:].tobytes(), "little")
    try:
        sizes = [(int(height), int(width)) for height, width in json.loads(whole[max(start, 0) : end].tobytes())]
    except (ValueError, TypeError):
        return None
    ends = np.cumsum([0, *(3 * height * width for height, width in sizes)]).tolist()
    if len(sizes) != count or ends[-1] != start:
        return None
    return [
        whole[first:last].reshape(height, width, 3)
        for (height, width), first, last in zip(sizes, ends[:-1], ends[1:], strict=True)
    ]
