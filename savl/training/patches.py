"""Random patches of high-resolution images, which are decoded once and may be cached in a file."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from savl.atomic_write import atomic_write, write_whole
from savl.images.errors import ImageFileError
from savl.images.folder import decode_rgb, find_images
from savl.images.result_mark import read_mark

SUFFIX = ".images"
FORMAT = 1
"""Version of the cache, part of its file name; to be raised when the layout or the result of `decode_rgb` changes."""

Images = list[NDArray[np.uint8]]
OnImage = Callable[[int, int], None]


class PatchSource:
    """Random patches of all images in some folders; the probability of an image is proportional to its area.

    Images are decoded once and kept as 8-bit RGB, 3 bytes per pixel. With a cache, a pickled source contains the name
    of the cache file instead of the pixels.
    """

    def __init__(
        self,
        folders: Iterable[str | Path],
        side: int,
        on_image: OnImage | None = None,
        cache: str | Path = "",
        include_results: bool = False,
    ) -> None:
        """Decode the images.

        Args:
            folders: Searched recursively for images.
            side: Side of the patches in pixels.
            on_image: Called with (images decoded, images in total) after each image.
            cache: Folder for the decoded images, or an empty string; see `decode_images`.
            include_results: Whether to include images that have a mark of savl (`savl.images.result_mark`).

        Raises:
            ValueError: A folder does not exist, or the folders contain no image that can be used.
            ImageFileError: An image cannot be read.
            OSError: The cache cannot be written or read.
        """
        self.side = side
        found = find_images(folders)
        paths = found if include_results else [path for path in found if read_mark(path) is None]
        self.excluded_results = len(found) - len(paths)
        """Number of images that are skipped because savl has made them."""
        if not paths:
            raise ValueError(
                f"data.hr: all of the {len(found)} images were made by savl, as their metadata says; use other images, "
                f"or set data.include_results = true (--include-results)"
            )
        decoded = decode_images(paths, cache, on_image)
        self._cached = None if cache == "" else (cache_file(paths, cache), len(paths))
        self.images = self._large_enough(decoded)
        self.too_small = len(decoded) - len(self.images)
        """Number of images that are skipped because they are smaller than a patch."""
        if not self.images:
            raise ValueError(
                f"data.hr: none of the {len(paths)} images is at least {side} pixels on both sides, which "
                f"(data.patch + 2 · data.margin) · scale needs; use a smaller patch or larger images"
            )
        area = np.array([image.shape[0] * image.shape[1] for image in self.images], dtype=np.float64)
        self.weights = area / area.sum()

    def _large_enough(self, images: Images) -> Images:
        return [pixels for pixels in images if min(pixels.shape[:2]) >= self.side]

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self._cached is not None:
            del state["images"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if self._cached is not None:
            self.images = self._large_enough(map_images(*self._cached))

    def __call__(self, count: int, random: np.random.Generator) -> Tensor:
        """Draw patches, neither rotated nor mirrored: ``(count, 3, side, side)`` uint8."""
        patches = np.stack([self._patch(random) for _ in range(count)])
        return torch.from_numpy(patches).permute(0, 3, 1, 2)

    def _patch(self, random: np.random.Generator) -> NDArray[np.uint8]:
        image = self.images[int(random.choice(len(self.images), p=self.weights))]
        top = int(random.integers(image.shape[0] - self.side + 1))
        left = int(random.integers(image.shape[1] - self.side + 1))
        return image[top : top + self.side, left : left + self.side]


def decode_images(paths: Sequence[Path], cache: str | Path = "", on_image: OnImage | None = None) -> Images:
    """Decode images, or read them from a cache.

    Args:
        paths: The files.
        cache: Folder with one file per list of images, which holds their pixels, 3 bytes each. The file is memory
            mapped, so that processes share its pages and only pages in use take memory. Its name is a digest of the
            names, sizes and modification times of the images. Files that no run uses may be deleted. An empty string
            keeps all pixels in the memory of this process.
        on_image: Called with (images decoded, images in total) after each image that is decoded.

    Returns:
        Arrays ``(H, W, 3)``, in the order of the paths; those of a cache are read-only.

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
    """Return the absolute path of the file in which `decode_images` keeps these images."""
    return Path(cache).resolve() / (_digest(paths) + SUFFIX)


def map_images(file: Path, count: int) -> Images:
    """Return the images in a cache file.

    Raises:
        OSError: There is no such file, or it does not hold ``count`` images.
    """
    images = _read(file, count)
    if images is None:
        raise OSError(f"data.cache: {file} is missing or damaged")
    return images


def _decode(paths: Sequence[Path], index: int, on_image: OnImage | None) -> NDArray[np.uint8]:
    pixels = decode_rgb(paths[index])
    if on_image is not None:
        on_image(index + 1, len(paths))
    return pixels


def _digest(paths: Sequence[Path]) -> str:
    """Return a digest of the files' names, sizes and modification times, which identify the pixels cheaply."""
    digest = hashlib.sha256(f"{FORMAT}".encode())
    for path in paths:
        stat = path.stat()
        digest.update(f"\0{stat.st_size} {stat.st_mtime_ns} ".encode() + os.fsencode(path.resolve()))
    return digest.hexdigest()[:32]


def _write(file: Path, paths: Sequence[Path], on_image: OnImage | None) -> None:
    """Write the pixels of all images one after the other, then the height and width of each as int64 little-endian.

    A valid file of that name is not replaced, because another process may have mapped it.
    """
    with _name_setting(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # a damaged one
    sizes = []
    with contextlib.suppress(FileExistsError), _name_setting(file), atomic_write(file, overwrite=False) as out:
        for index in range(len(paths)):
            pixels = _decode(paths, index, on_image)
            sizes.append(pixels.shape[:2])
            write_whole(out, pixels.reshape(-1).data)
        write_whole(out, np.array(sizes, "<i8").tobytes())


def _read(file: Path, count: int) -> Images | None:
    """Return the images in a file, or None if it does not exist or is not a complete file of ``count`` images."""
    with _name_setting(file):
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
def _name_setting(file: Path) -> Iterator[None]:
    """Add the name of the setting and of the file to errors of the operating system."""
    try:
        yield
    except ImageFileError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"data.cache: {error.strerror}", str(file)) from error
