"""Decoded images: in the memory of a process, or in one file that all processes of a machine map."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from savl.atomic_write import atomic_write, write_whole
from savl.images.errors import ImageFileError
from savl.images.folder import decode_rgb

SUFFIX = ".images"
FORMAT = 1
"""Part of a file's name; higher after a change of the layout, or of what `decode_rgb` makes of an image."""

Images = list[NDArray[np.uint8]]
OnImage = Callable[[int, int], None]


def decode_images(paths: Sequence[Path], cache: str | Path = "", on_image: OnImage | None = None) -> Images:
    """Decode images, or find them decoded.

    Args:
        paths: The files.
        cache: Folder with one file for every list of images: their pixels, 3 bytes each. It is mapped, so that
            processes share what they read of it and only that takes memory. Names, sizes and times of change of the
            images tell which file is theirs; a file that no run uses may be deleted. An empty string keeps all pixels
            in the memory of this process.
        on_image: Told (decoded so far, total) after each image that is decoded.

    Returns:
        ``(H, W, 3)`` each, in the order of the paths; those of a cache are read-only.

    Raises:
        ImageFileError: An image cannot be read.
        OSError: The cache cannot be written or read.
    """
    if cache == "":
        return [_decode(paths, index, on_image) for index in range(len(paths))]
    file = cache_file(paths, cache)
    images = _read(file, len(paths))
    if images is None:
        _write(file, paths, on_image)
        images = map_images(file, len(paths))
    return images


def cache_file(paths: Sequence[Path], cache: str | Path) -> Path:
    """Where `decode_images` keeps these images; an absolute path."""
    return Path(cache).resolve() / (_digest(paths) + SUFFIX)


def map_images(file: Path, count: int) -> Images:
    """The images that `decode_images` has left in a file.

    Raises:
        OSError: There is no such file, or it does not hold so many images.
    """
    images = _read(file, count)
    if images is None:
        raise OSError(f"data.cache: {file} is gone, or damaged")
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
    """The pixels of one image after the other, then a height and a width for each, int64 little-endian.

    Another process may have mapped a whole file of that name: it is not replaced.
    """
    with _naming(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # a damaged one
    sizes = []
    with contextlib.suppress(FileExistsError), _naming(file), atomic_write(file, overwrite=False) as out:
        for index in range(len(paths)):
            pixels = _decode(paths, index, on_image)
            sizes.append(pixels.shape[:2])
            write_whole(out, pixels.reshape(-1).data)
        write_whole(out, np.array(sizes, "<i8").tobytes())


def _read(file: Path, count: int) -> Images | None:
    """The images in a file; None where there is none, or another than `_write` leaves."""
    with _naming(file):
        if not file.is_file() or file.stat().st_size <= 16 * count:
            return None
        whole = np.asarray(np.memmap(file, np.uint8, "r"))
    end = len(whole) - 16 * count
    sizes = np.frombuffer(whole[end:].tobytes(), "<i8").reshape(count, 2).tolist()
    ends = [0]
    for height, width in sizes:
        if min(height, width) < 1:
            return None
        ends.append(ends[-1] + 3 * height * width)
    if ends[-1] != end:
        return None
    places = zip(sizes, ends[:-1], ends[1:], strict=True)
    return [whole[first:last].reshape(height, width, 3) for (height, width), first, last in places]


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Says in errors of the system which setting asked for the file."""
    try:
        yield
    except ImageFileError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"data.cache: {error.strerror}", str(file)) from error
