"""The work behind the page: pictures are upscaled one at a time, into files as `savl upscale` writes them.

This module knows nothing of browsers. A `Desk` has a queue, so that the pictures of several tabs take turns. A `Task`
is one picture, which can be watched and cancelled.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import shlex
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from savl.images.errors import ImageFileError, UnsupportedImage
from savl.images.format import JPEG, PNG, format_of_suffix
from savl.images.job import Job, in_short
from savl.images.metadata_record import Metadata
from savl.images.read import read_image, read_size
from savl.images.severity_map import viridis
from savl.images.write import write_image
from savl.inference.enlarge import (
    ByBitDepth,
    ImageUpscaler,
    OnTile,
    Strength,
    UpscalerOutput,
    check_scale,
    check_strength,
    output_size,
)
from savl.inference.limits import available_bytes
from savl.inference.upscale_file import EnlargeWork
from savl.inference.upscale_image import as_upscaler
from savl.inference.upscaler import Upscaler
from savl.interrupts import raise_if_interrupted
from savl.out_of_memory import binary_size
from savl.video.container import is_video_name

LARGEST_PREVIEW = 4096
"""Width or height in pixels above which the pictures that the page shows are reduced. Downloads never are."""

_MODELS_IN_MEMORY = 2
_SEVERITY_OPACITY = 0.6


@dataclass(frozen=True)
class Choice:
    """The settings of the page for a picture.

    Attributes:
        model: Name of shipped weights, or path of a file that `savl.load` accepts.
        scale: Output pixels per input pixel; None is that of the network.
        strength: How strongly the picture is restored: "auto", or a number from 0 to 1.
        format: Name of the format to write: "png", "jpg", "webp", "tiff", or "auto" for that of the picture.
    """

    model: str
    scale: float | None = None
    strength: Strength = "auto"
    format: str = "auto"


@dataclass(frozen=True)
class Result:
    """An upscaled picture.

    Attributes:
        file: The file for the user, exactly as `savl upscale` writes it.
        before: A JPEG file of the picture, enlarged by bicubic interpolation to the size of `after`.
        after: A JPEG file of the result, reduced to `LARGEST_PREVIEW`.
        severity: ``(h, w)`` float32 in [0, 2], one value per input pixel; None for a network without a field.
        old_size: Width and height of the picture in pixels.
        new_size: Width and height of the result in pixels.
        notes: What the result could not keep, in full sentences.
    """

    file: Path
    before: Path
    after: Path
    severity: NDArray[np.float32] | None
    old_size: tuple[int, int]
    new_size: tuple[int, int]
    notes: tuple[str, ...]

    def with_severity(self) -> Path:
        """Return a JPEG file of `after` in gray, under the severity map in the colours of viridis."""
        from PIL import Image

        target = self.after.with_name("severity.jpg")
        if self.severity is None:
            return self.after
        if not target.exists():
            with Image.open(self.after) as after:
                gray = after.convert("L").convert("RGB")
            colours = Image.fromarray(viridis(self.severity / 2)).resize(gray.size, Image.Resampling.BILINEAR)
            drawn = np.asarray(Image.blend(gray, colours, _SEVERITY_OPACITY))
            with contextlib.suppress(FileExistsError):  # written by another click
                write_image(target, drawn, image_format=JPEG)
        return target


class Cancelled(Exception):
    """The picture was cancelled. Nothing was written."""


class Failed(Exception):
    """The picture could not be upscaled. The text is one line without the name of the picture."""


class Task:
    """One picture that waits, is being upscaled, or is done.

    Attributes:
        source: The file to upscale.
        started: Whether the work has begun.
        tiles: Number of tiles that are done, and number of all tiles; None before the first one is done.
    """

    def __init__(self, source: Path, stem: str, choice: Choice, folder: Path) -> None:
        """Create a task; `Desk.submit` does it, and has the same arguments."""
        self.source, self.stem, self.choice, self.folder = source, stem, choice, folder
        self.started = False
        self.tiles: tuple[int, int] | None = None
        self._cancelled = threading.Event()
        self._result: Future[Result] = Future()

    def cancel(self) -> None:
        """Stop the work after the current tile, or before it begins."""
        self._cancelled.set()

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the work, for some seconds at most; return whether it has ended."""
        with contextlib.suppress(TimeoutError, Exception):
            self._result.result(seconds)
        return self._result.done()

    def result(self) -> Result:
        """Return the result after the end of the work.

        Raises:
            Cancelled: The task was cancelled.
            Failed: The picture could not be upscaled.
        """
        return self._result.result()

    def _on_tile(self, done: int, total: int) -> None:
        self.tiles = done, total
        self._check()

    def _check(self) -> None:
        raise_if_interrupted()
        if self._cancelled.is_set():
            raise Cancelled

    def _run(self, upscalers: _Upscalers) -> None:
        """Upscale the picture in this thread, and store the result or the error."""
        self.started = True
        try:
            self._check()
            result = self._upscaled(upscalers)
            self._check()
        except Exception as error:
            self._result.set_exception(self._in_one_line(error))
            raise_if_interrupted()  # a library may have turned the exception of Ctrl-C into an error of its own
        except BaseException:
            self._drop()
            raise
        else:
            self._result.set_result(result)

    def _drop(self) -> None:
        """End a task that is not upscaled any more."""
        self._result.set_exception(Cancelled())

    def _in_one_line(self, error: Exception) -> Exception:
        if self._cancelled.is_set():
            return Cancelled()
        if isinstance(error, ImageFileError):
            return Failed(error.reason)
        if not isinstance(error, (OSError, ValueError, RuntimeError, MemoryError)):
            traceback.print_exception(error)  # a mistake in savl, for which one line is too little
        return Failed(in_short(error))

    def _upscaled(self, upscalers: _Upscalers) -> Result:
        if is_video_name(self.source):
            raise UnsupportedImage(
                self.source, f"is a video; in the shell, savl upscale {shlex.quote(self.source.name)} upscales it"
            )
        choice = self.choice
        severity: list[NDArray[np.float32]] = []
        upscaler = _observed(upscalers.get(choice.model), check_strength(choice.strength), severity)
        scale = upscaler.scale if choice.scale is None else check_scale(choice.scale)
        check_memory(self.source, upscaler.scale, scale)
        # As `savl upscale` chooses format and suffix.
        own = format_of_suffix(self.source)
        image_format = format_of_suffix(Path(f"x.{choice.format}")) or own or PNG
        suffix = self.source.suffix if own is image_format else image_format.suffixes[0]
        target = self.folder / f"{self.stem}_x{scale:g}{suffix}"
        job = Job(self.source, target, image_format, ())
        written = EnlargeWork(upscaler, scale=choice.scale)(job, target, (), self._on_tile)
        largest = max(written.new_size)
        width, height = (max(1, round(side * min(1, LARGEST_PREVIEW / largest))) for side in written.new_size)
        shown = self.folder / "shown"
        shown.mkdir()
        return Result(
            target,
            _preview(self.source, shown / "before.jpg", (width, height)),
            _preview(target, shown / "after.jpg", (width, height)),
            severity[-1] if getattr(upscaler, "has_field", True) else None,
            written.old_size,
            written.new_size,
            written.notes,
        )


class Desk:
    """Upscales the pictures of all tabs one at a time, in the order in which they come, in the thread of `work`."""

    def __init__(
        self,
        *,
        tile: int | None = None,
        tile_pad: int = 32,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Prepare the upscaling. The arguments are those of `savl.upscale`."""
        self._upscalers = _Upscalers(tile=tile, tile_pad=tile_pad, device=device, dtype=dtype)
        self._queue: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._current: Task | None = None
        self._closing = threading.Lock()
        self._closed = False

    def load(self, model: str) -> int:
        """Load a model, and return its scale.

        Raises:
            TypeError, ValueError, OSError: As for `savl.load`.
        """
        return self._upscalers.get(model).scale

    def submit(self, source: Path, stem: str, choice: Choice, folder: Path) -> Task:
        """Put a picture into the queue.

        Args:
            source: The file to upscale.
            stem: Beginning of the name of the result, which also has the scale and a suffix.
            choice: The settings.
            folder: Empty folder for the files of this picture, which exists.
        """
        task = Task(source, stem, choice, folder)
        with self._closing:
            if self._closed:
                task._drop()
            else:
                self._queue.put(task)
        return task

    def work(self, go_on: Callable[[], bool]) -> None:
        """Upscale pictures until the desk is closed or a condition is false.

        A program calls this in its main thread, which Ctrl-C interrupts.

        Args:
            go_on: The condition, which is checked twice a second while there is nothing to do.

        Raises:
            KeyboardInterrupt, SystemExit: A signal has come. The current picture is cancelled.
        """
        while not self._closed and go_on():
            with contextlib.suppress(queue.Empty):
                self._current = self._queue.get(timeout=0.5)
                self._current._run(self._upscalers)
                self._current = None

    def close(self) -> None:
        """Cancel the current picture and those that wait, and let `work` end after the current tile."""
        with self._closing:
            self._closed = True
            if (current := self._current) is not None:
                current.cancel()
            with contextlib.suppress(queue.Empty):
                while True:
                    self._queue.get_nowait()._drop()


class _Upscalers:
    """The upscalers of the models that were used last."""

    def __init__(self, **settings: Any) -> None:
        self._loading = threading.Lock()
        self._load = functools.lru_cache(_MODELS_IN_MEMORY)(lambda model: as_upscaler(model, **settings))

    def get(self, model: str) -> ImageUpscaler:
        with self._loading:
            return self._load(model)


def distinct_stems(sources: Sequence[Path]) -> list[str]:
    """Return the names of files without their suffixes, made distinct: a, b, a-2.

    Upper and lower case count as equal, because they do on the disks of many users.
    """
    stems: list[str] = []
    taken = {source.stem.lower() for source in sources}
    used: set[str] = set()
    for source in sources:
        stem, number = source.stem, 1
        while stem.lower() in used or (number > 1 and stem.lower() in taken):
            number += 1
            stem = f"{source.stem}-{number}"
        used.add(stem.lower())
        stems.append(stem)
    return stems


def check_memory(source: Path, network_scale: int, scale: float) -> None:
    """Check before the work that the picture and its result fit into the free memory, by the header of the file.

    Otherwise the system might end the page, with the pictures of all tabs, when the memory is used up.

    Raises:
        ValueError: The result would have too many pixels.
        MemoryError: The arrays of samples alone take more memory than is free.
    """
    size = read_size(source)
    if size is None:
        return  # the reader says why
    width, height = output_size(*size, scale)
    pixels = size[0] * size[1]
    # float32 planes of the picture and of the network's output, and the samples of the result.
    needed = 4 * 3 * pixels * (1 + network_scale**2) + 3 * width * height
    free = available_bytes()
    if needed > free:
        raise MemoryError(
            f"out of memory: {width}x{height} pixels take about {binary_size(needed)} while they are computed, "
            f"and {binary_size(free)} are free; choose a smaller picture"
        )


@dataclass(frozen=True)
class _Observed:
    """An upscaler that restores with a given strength, and appends the severity map of each image to a list."""

    upscaler: Upscaler
    strength: Strength
    severity: list[NDArray[np.float32]]

    @property
    def scale(self) -> int:
        return self.upscaler.scale

    @property
    def has_field(self) -> bool:
        return self.upscaler.has_field

    def __call__(self, lr: torch.Tensor, *, on_tile: OnTile | None = None) -> UpscalerOutput:
        output = self.upscaler(lr, strength=self.strength, on_tile=on_tile)
        self.severity.append(output.severity[0].numpy())
        return output


def _observed(upscaler: ImageUpscaler, strength: Strength, severity: list[NDArray[np.float32]]) -> ImageUpscaler:
    """Return an upscaler of `as_upscaler` as `_Observed`."""
    if isinstance(upscaler, ByBitDepth):
        return ByBitDepth(*(_observed(each, strength, severity) for each in (upscaler.eight_bit, upscaler.other)))
    return _Observed(cast("Upscaler", upscaler), strength, severity)


def _preview(source: Path, target: Path, size: tuple[int, int]) -> Path:
    """Write an image as a JPEG file of a given size that browsers show: 8 bits, on white, with its colour profile."""
    from PIL import Image

    picture = read_image(source)
    samples = picture.pixels if picture.pixels.dtype == np.uint8 else (picture.pixels >> 8).astype(np.uint8)
    image = Image.fromarray(samples[:, :, 0] if samples.shape[2] == 1 else samples)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    if "A" in image.getbands():
        white = Image.new("RGBA", size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white.convert("RGB")
    metadata = picture.metadata
    colours = Metadata(icc=metadata.icc, colour=metadata.colour, tiff_colour=metadata.tiff_colour)
    write_image(target, np.atleast_3d(np.asarray(image)), colours, image_format=JPEG)
    return target
