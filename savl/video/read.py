"""Read a video: what it consists of, and its frames one after another."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from savl.images.errors import ImageFileError, ImageNotFound, UnreadableImage, UnsupportedImage
from savl.interrupts import raise_if_interrupted
from savl.video.av_import import av_reason, import_av
from savl.video.colour import Colour, colour_of, to_rgb

# Formats in FFmpeg of still and moving images, which have a path of their own through savl.
_IMAGE_FORMATS = frozenset({"gif", "image2", "apng", "webp", "ico"})
_PLANAR = re.compile(r"(yuvj?4(20|22|44)p|gbrp|gray)(9|10|12|14|16)?(le)?")
_MOST_PLANES = 3
_PQ = 16  # transfer characteristic of HDR10
_PROGRESSIVE = (0, 1)  # values of AVFieldOrder: unknown and progressive
_MOST_BACKWARD = 1.0  # seconds by which the time of decoding may go back from one packet to the next
ALPHA_TAG = "alpha_mode"  # tag of WebM and MKV for video with transparency, in any case
_TRUNCATED = 0.5  # seconds by which the packets of a complete file may end before its header says


@dataclass(frozen=True)
class VideoInfo:
    """Properties of the video stream of a file.

    Attributes:
        width: Width of the frames in pixels.
        height: Height of the frames in pixels.
        frames: Number of frames.
        time_base: Unit of all timestamps, in seconds.
        rate: Average number of frames per second.
        bits: Bits per sample.
        colour: How the samples stand for colours.
        aspect: Width divided by height of a pixel; None if unknown.
        display_matrix: Rotation and flips that players apply, as the nine integers of FFmpeg; None if there is none.
        notes: Sentences about what the result cannot keep, and other surprises.
    """

    width: int
    height: int
    frames: int
    time_base: Fraction
    rate: Fraction
    bits: int
    colour: Colour
    aspect: Fraction | None
    display_matrix: tuple[int, ...] | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A decoded frame.

    Attributes:
        rgb: ``(H, W, 3)`` float32 in [0, 1].
        pts: Time at which the frame is shown, in units of `VideoInfo.time_base`.
        duration: How long it is shown, in the same units; 0 if unknown.
    """

    rgb: Tensor
    pts: int
    duration: int


class VideoFile:
    """A video file that is open for reading, as a context manager.

    Attributes:
        path: The file.
        container: The file, open in PyAV.
        stream: The video stream that is upscaled: the first one that is not a cover picture.
        info: Properties of that stream.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a video file, and count its frames.

        All packets are read once, so that a truncated file is found before hours of work.

        Raises:
            VideoUnavailable: PyAV is not installed.
            ImageNotFound: The file does not exist.
            UnreadableImage: The file cannot be read, is truncated, or contains no frame.
            UnsupportedImage: The file is an image, contains no video, or stores its frames in an unsupported way.
        """
        self.path = Path(path)
        self._av = import_av()
        self.container = self._open()
        try:
            self.stream = self._video_stream()
            self.info = self._info(self._count())
        except BaseException:
            self.container.close()
            raise

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def reopened(self) -> Any:
        """Open the file once more in PyAV, positioned at its beginning."""
        return self._open()

    def pictures(self, skip: int) -> Iterator[Picture]:
        """Yield the frames in the order in which they are shown.

        Args:
            skip: Number of frames at the beginning that are decoded but not converted and not yielded.

        Raises:
            UnreadableImage: A frame cannot be decoded.
            UnsupportedImage: The size of the frames changes.
        """
        number, last = 0, None
        for frame in self._frames():
            raise_if_interrupted()
            # Files with missing or repeated timestamps: each frame is shown after the one before.
            pts = frame.pts if frame.pts is not None else (0 if last is None else last + self._step)
            if last is not None and pts <= last:
                pts = last + 1
            number, last = number + 1, pts
            if (frame.width, frame.height) != (self.info.width, self.info.height):
                raise UnsupportedImage(
                    self.path,
                    f"frame {number} has {frame.width}x{frame.height} pixels, those before have "
                    f"{self.info.width}x{self.info.height}",
                )
            if number > skip:
                yield Picture(self._to_rgb(frame), pts, frame.duration or 0)

    @property
    def _step(self) -> int:
        """Duration of a frame at the average rate."""
        return max(1, round(1 / (self.info.rate * self.info.time_base)))

    def _open(self) -> Any:
        try:
            # An absolute path, because FFmpeg takes the beginning of "a:b.mp4" for a protocol; and files are the only
            # protocol, because a file may be a list of addresses.
            return self._av.open(
                os.path.abspath(self.path), metadata_errors="replace", options={"protocol_whitelist": "file"}
            )
        except FileNotFoundError as error:
            raise ImageNotFound(self.path, "does not exist") from error
        except (self._av.FFmpegError, OSError, ValueError) as error:
            reason = None
            if os.path.isfile(self.path) and not os.path.getsize(self.path):
                reason = "is empty"
            elif isinstance(error, EOFError):
                reason = "contains no frames"
            raise UnreadableImage(self.path, reason or f"cannot be read as a video: {av_reason(error)}") from error

    def _video_stream(self) -> Any:
        names = set(self.container.format.name.split(","))
        if names & _IMAGE_FORMATS or any(name.endswith("_pipe") for name in names):
            raise UnsupportedImage(
                self.path, f"is an image ({self.container.format.long_name}) with a name that ends like a video's"
            )
        cover = self._av.stream.Disposition.attached_pic
        for stream in self.container.streams.video:
            if not stream.disposition & cover:
                if stream.codec_context is None:
                    raise UnsupportedImage(self.path, "this PyAV has no decoder for its video stream")
                stream.thread_type = "AUTO"
                return stream
        kind = "only sound" if self.container.streams.audio else "no video stream"
        raise UnsupportedImage(self.path, f"contains {kind}")

    def _count(self) -> int:
        """Return the number of frames, by reading all packets."""
        frames, end = 0, 0.0
        decoded: dict[int, float] = {}
        with self._open() as container:
            try:
                for packet in container.demux():
                    raise_if_interrupted()
                    if packet.size == 0:
                        continue
                    frames += packet.stream_index == self.stream.index
                    if packet.dts is not None:
                        time = float(packet.dts * packet.time_base)
                        if time < decoded.get(packet.stream_index, time) - _MOST_BACKWARD:
                            raise UnsupportedImage(
                                self.path,
                                f"its times go back at {decoded[packet.stream_index]:.1f} seconds, as if it were "
                                "several recordings; repair it first, for example with ffmpeg -i IN -c copy OUT",
                            )
                        decoded[packet.stream_index] = time
                    if packet.pts is not None:
                        end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            except ImageFileError:
                raise
            except (self._av.FFmpegError, OSError) as error:
                raise UnreadableImage(self.path, f"is truncated or damaged: {av_reason(error)}") from error
        declared = self.stream.frames
        names = self.container.format.name.split(",")
        if frames == 0:
            raise UnreadableImage(self.path, "contains no frames")
        if "mov" in names and frames < declared:
            raise UnreadableImage(self.path, f"is truncated: {frames} of {declared} frames are there")
        if "matroska" in names and self.container.duration is not None:
            duration = self.container.duration / self._av.time_base
            if end < duration - _TRUNCATED:
                raise UnreadableImage(self.path, f"is truncated: it ends after {end:.1f} of {duration:.1f} seconds")
        return frames

    def _frames(self) -> Iterator[Any]:
        """Yield the frames of PyAV, from a container that is opened for it.

        Packets before the first frame that cannot be decoded are left out, as players do: a recording may begin amid
        frames that depend on earlier ones.
        """
        number = 0
        with self._open() as container:
            stream = container.streams[self.stream.index]
            stream.thread_type = "AUTO"
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except self._av.FFmpegError as error:
                    if number == 0:
                        continue
                    raise UnreadableImage(
                        self.path, f"is damaged: frame {number + 1} cannot be decoded: {av_reason(error)}"
                    ) from error
                for frame in frames:
                    number += 1
                    yield frame

    def _info(self, frames: int) -> VideoInfo:
        first = next(self._frames(), None)
        if first is None:
            raise UnreadableImage(self.path, "contains no frame that can be decoded")
        pixel_format = first.format
        try:
            colour, note = colour_of(
                int(first.colorspace),
                int(first.color_range),
                int(first.color_primaries),
                int(first.color_trc),
                rgb=_stores_rgb(pixel_format),
                jpeg=pixel_format.name.startswith(("yuvj", "mono")),
                width=first.width,
                height=first.height,
            )
        except ValueError as error:
            raise UnsupportedImage(self.path, str(error)) from error
        notes = [] if note is None else [note]
        if self.stream.codec_context.field_order not in _PROGRESSIVE or first.interlaced_frame:
            notes.append(
                "it is interlaced: both fields of a frame are upscaled together, which enlarges the combs at moving "
                "edges; deinterlace it first, for example with ffmpeg -vf bwdif"
            )
        # FFmpeg's decoders of VP8 and VP9 leave the transparency out of the frames; a tag tells that there is one.
        tagged = ALPHA_TAG in {key.lower() for key in self.stream.metadata}
        if tagged or any(component.is_alpha for component in pixel_format.components):
            notes.append("its transparency is not kept")
        if colour.transfer == _PQ:
            notes.append("the HDR metadata of the mastering display are not kept; the colour tags are")
        cover = self._av.stream.Disposition.attached_pic
        if len([each for each in self.container.streams.video if not each.disposition & cover]) > 1:
            notes.append("only the first video stream is upscaled; the others are copied")
        matrix = first.side_data.get(self._av.sidedata.sidedata.Type.DISPLAYMATRIX)
        rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(25)
        return VideoInfo(
            first.width,
            first.height,
            frames,
            self.stream.time_base,
            Fraction(rate),
            max(component.bits for component in pixel_format.components),
            colour,
            self.stream.sample_aspect_ratio or self.stream.codec_context.sample_aspect_ratio or None,
            None if matrix is None else struct.unpack("=9i", bytes(matrix)),
            tuple(notes),
        )

    def _to_rgb(self, frame: Any) -> Tensor:
        planes, bits = planes_of(frame)
        centred = self.stream.codec_context.name in ("mjpeg", "mpeg1video")
        return to_rgb(planes, self.info.colour, bits, centred)


def planes_of(frame: Any) -> tuple[list[NDArray[Any]], int]:
    """Return the planes of a frame of PyAV as arrays ``(H, W)`` without alpha, and the bits per sample.

    Of RGB and of palettes, the planes are G, B and R; of gray, there is one. Packed formats are taken apart by FFmpeg,
    which changes no sample; samples of fewer than 8 bits are scaled to 8.
    """
    pixel_format = frame.format
    bits = max(component.bits for component in pixel_format.components)
    if not _PLANAR.fullmatch(pixel_format.name.replace("yuva", "yuv").replace("gbrap", "gbrp")):
        depth = "" if bits <= 8 else "10le" if bits <= 10 else "12le" if bits <= 12 else "16le"
        if _stores_rgb(pixel_format):
            if bits < 8:  # FFmpeg scales such samples to the range of 8 bits only on the way to rgb24
                frame = frame.reformat(format="rgb24")
            name = f"gbrp{depth}"
        elif len([component for component in pixel_format.components if not component.is_alpha]) == 1:
            name = f"gray{depth}"
        else:
            width = pixel_format.chroma_width(16)
            height = pixel_format.chroma_height(16)
            name = f"yuv{ {(8, 8): '420', (8, 16): '422'}.get((width, height), '444') }p{depth}"
        frame = frame.reformat(format=name)
        bits = frame.format.components[0].bits
    dtype = np.uint8 if bits == 8 else np.dtype("<u2")
    planes = []
    for plane in frame.planes[:_MOST_PLANES]:
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        planes.append(rows.view(dtype)[:, : plane.width])
    return planes, bits


def _stores_rgb(pixel_format: Any) -> bool:
    return bool(pixel_format.is_rgb or pixel_format.has_palette)
