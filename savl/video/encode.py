"""Encode frames: the settings of the encoder, and one segment of a video after another."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from savl.images.errors import UnwritableImage
from savl.video.av_import import av_reason, import_av
from savl.video.colour import FULL, LIMITED, Colour, from_rgb
from savl.video.container import VideoCodec, VideoContainer
from savl.video.read import VideoInfo
from savl.video.segments import PacketRecord, Segment

# Frames that decoders of H.264 in hardware accept at most.
_LARGE = (4096, 2304)


@dataclass(frozen=True)
class Encoding:
    """All settings of the encoder. Equal settings give equal headers, so that segments can be joined.

    Attributes:
        codec: The codec.
        crf: Quality; less is better.
        width: Width of the frames in pixels, even.
        height: Height of the frames in pixels, even.
        bits: Bits per sample, 8 or 10.
        time_base: Unit of timestamps, in seconds.
        rate: Average number of frames per second.
        colour: How the samples stand for colours.
        aspect: Width divided by height of a pixel; None if unknown.
    """

    codec: VideoCodec
    crf: int
    width: int
    height: int
    bits: int
    time_base: Fraction
    rate: Fraction
    colour: Colour
    aspect: Fraction | None

    @property
    def pixel_format(self) -> str:
        """Name of the pixel format in FFmpeg."""
        return "yuv420p" if self.bits == 8 else "yuv420p10le"

    @property
    def options(self) -> dict[str, str]:
        """Options of the encoder."""
        return {"crf": str(self.crf), **dict(self.codec.options)}

    def configure(self, context: Any) -> None:
        """Set up a codec context of PyAV that is not open yet."""
        context.width, context.height, context.pix_fmt = self.width, self.height, self.pixel_format
        context.time_base, context.framerate = self.time_base, self.rate
        context.color_range = FULL if self.colour.full else LIMITED
        context.colorspace = self.colour.matrix
        context.color_primaries, context.color_trc = self.colour.primaries, self.colour.transfer
        if self.aspect is not None:
            context.sample_aspect_ratio = self.aspect
        context.options = self.options


def choose_encoding(
    info: VideoInfo,
    size: tuple[int, int],
    container: VideoContainer,
    codec: VideoCodec | None,
    crf: int | None,
) -> tuple[Encoding, str | None]:
    """Return the settings of the encoder for a video.

    Args:
        info: The video.
        size: Width and height of the upscaled frames, even.
        container: The container to write, which holds the codec.
        codec: The codec; None chooses that of the container.
        crf: Quality; None for the default of the codec.

    Returns:
        The settings, and a sentence about what is not kept, or None.

    Raises:
        ValueError: This PyAV does not have the encoder.
    """
    if codec is None:
        large = info.bits > 8 or size[0] > _LARGE[0] or size[1] > _LARGE[1]
        codec = container.large if large else container.default
    av = import_av()
    try:
        formats = {each.name for each in av.codec.Codec(codec.encoder, "w").video_formats or ()}
    except ValueError as error:
        raise ValueError(f"this PyAV has no encoder {codec.encoder} for {codec.name}; try another codec") from error
    bits = 10 if info.bits > 8 and "yuv420p10le" in formats else 8
    note = None
    if bits < info.bits:
        note = f"its {info.bits} bits per sample become {bits}, which is what {codec.encoder} stores here"
    return (
        Encoding(
            codec,
            codec.crf if crf is None else crf,
            *size,
            bits,
            info.time_base,
            info.rate,
            info.colour.encoded(),
            info.aspect,
        ),
        note,
    )


class SegmentEncoder:
    """Encodes the frames of one segment."""

    def __init__(self, encoding: Encoding, path: object) -> None:
        """Open the encoder.

        Args:
            encoding: Settings.
            path: Name of the output in errors.

        Raises:
            UnwritableImage: The encoder refuses the settings, such as the size.
        """
        self._av = import_av()
        self._encoding = encoding
        self._path = str(path)
        self._durations: dict[int, int] = {}
        self._packets: list[PacketRecord] = []
        self._context = self._av.CodecContext.create(encoding.codec.encoder, "w")
        encoding.configure(self._context)
        self._context.flags |= self._av.codec.context.Flags.global_header
        try:
            self._context.open()
        except (self._av.FFmpegError, ValueError) as error:
            raise self._refusal(error) from error

    @property
    def frames(self) -> int:
        """Number of frames so far."""
        return len(self._durations)

    def add(self, rgb: NDArray[np.float32], pts: int, duration: int) -> None:
        """Encode a frame.

        Args:
            rgb: ``(H, W, 3)`` float32 in [0, 1], at least as large as the frames of the encoder; the rest is cut off.
            pts: Time at which it is shown.
            duration: How long it is shown; 0 if unknown.
        """
        encoding = self._encoding
        planes = from_rgb(rgb[: encoding.height, : encoding.width], encoding.colour, encoding.bits)
        frame = self._av.VideoFrame(encoding.width, encoding.height, encoding.pixel_format)
        for source, plane in zip(planes, frame.planes, strict=True):
            rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
            rows.view(source.dtype)[:, : plane.width] = source
        frame.pts, frame.time_base = pts, encoding.time_base
        frame.color_range = FULL if encoding.colour.full else LIMITED
        frame.colorspace = encoding.colour.matrix
        self._durations[pts] = duration
        self._encode(frame)

    def finish(self) -> Segment:
        """Encode what the encoder has kept, and return the segment."""
        self._encode(None)
        return Segment(len(self._durations), bytes(self._context.extradata or b""), tuple(self._packets))

    def _encode(self, frame: Any) -> None:
        try:
            packets = self._context.encode(frame)
        except (self._av.FFmpegError, ValueError) as error:
            raise self._refusal(error) from error
        for packet in packets:
            duration = self._durations[packet.pts]
            self._packets.append(PacketRecord(packet.pts, duration, packet.is_keyframe, bytes(packet)))

    def _refusal(self, error: Exception) -> UnwritableImage:
        encoding = self._encoding
        size = f"{encoding.width}x{encoding.height}"
        return UnwritableImage(
            self._path, f"{encoding.codec.encoder} cannot encode frames of {size} pixels: {av_reason(error)}"
        )
