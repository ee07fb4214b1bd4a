"""Write the output from finished segments and the other streams of the input, without encoding anything again."""

from __future__ import annotations

import heapq
import io
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from savl.images.errors import UnsupportedImage, UnwritableImage
from savl.interrupts import raise_if_interrupted
from savl.video.av_import import av_reason, import_av
from savl.video.container import CONTAINERS, MKV, VideoContainer
from savl.video.encode import Encoding
from savl.video.read import ALPHA_TAG, VideoFile
from savl.video.segments import Segment

# Written by the muxer itself, from what it writes.
_OWN_TAGS = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder", "duration"})
# Type of the attachment, by the codec of a cover picture.
_COVER_TYPES = {"mjpeg": "image/jpeg", "png": "image/png"}
# Their timestamps begin at any time, which players of other containers would wait for.
_STREAMED_FORMATS = frozenset({"mpegts", "mpeg"})


@dataclass(frozen=True)
class Copies:
    """Streams of the input that are copied.

    Attributes:
        indexes: Numbers of the streams in the input.
        covers: Numbers of the cover pictures in the input that become attachments.
        notes: Sentences about streams that the container does not hold.
    """

    indexes: tuple[int, ...]
    covers: tuple[int, ...]
    notes: tuple[str, ...]


def choose_copies(video: VideoFile, target: Path, container: VideoContainer) -> Copies:
    """Try which streams besides the upscaled one the container can hold.

    Raises:
        UnsupportedImage: It cannot hold a stream of sound or subtitles; the message names it. Attachments and data,
            such as fonts and positions, are left out with a note instead.
    """
    indexes, covers, notes = [], [], []
    for stream in video.container.streams:
        if stream.index == video.stream.index or _is_written_from_tags(stream):
            continue
        if _is_cover(stream) and container.muxer == "matroska" and _codec_name(stream) in _COVER_TYPES:
            covers.append(stream.index)
            continue
        if _is_held(stream, container):
            indexes.append(stream.index)
            continue
        name = f"stream {stream.index} ({stream.type}, {_codec_name(stream)})"
        if stream.type in ("audio", "subtitle"):
            raise UnsupportedImage(video.path, f"{target.suffix} cannot hold {name}; {_way_out(video, stream.index)}")
        notes.append(f"{name} is left out, because {target.suffix} cannot hold it")
    return Copies(tuple(indexes), tuple(covers), tuple(notes))


def join(
    video: VideoFile,
    copies: Copies,
    segments: Callable[[], Iterator[Segment]],
    encoding: Encoding,
    container: VideoContainer,
    path: Path,
    target: Path,
) -> None:
    """Write the output.

    Args:
        video: The input.
        copies: The streams to copy from it.
        segments: Returns the segments of the video stream; called twice.
        encoding: Settings of the encoder of the segments.
        container: The container to write.
        path: The file to write.
        target: Its name in errors.

    Raises:
        UnwritableImage: The segments do not fit together, the container refuses a stream, or the disk is full.
    """
    av = import_av()
    options = {}
    if container.is_mov:
        options["movflags"] = "+faststart"  # the index first, so that a browser can start to play
        if any(key.startswith("com.") for key in video.container.metadata):
            options["movflags"] += "+use_metadata_tags"  # keeps the tags of phones, such as the place
        if encoding.time_base.numerator == 1:
            options["video_track_timescale"] = str(encoding.time_base.denominator)
    try:
        with (
            video.reopened() as source,
            av.open(str(path), "w", format=container.muxer, options=options) as output,
        ):
            stream = output.add_stream(encoding.codec.encoder, rate=encoding.rate, options=encoding.options)
            encoding.configure(stream.codec_context)
            stream.time_base = encoding.time_base
            if encoding.codec.name == "hevc" and container.is_mov:
                stream.codec_context.codec_tag = "hvc1"  # the variant that Apple's players accept
            if video.info.display_matrix is not None:
                stream.set_display_matrix(video.info.display_matrix)
            tags = _tags(video.stream.metadata)
            stream.metadata.update({key: value for key, value in tags.items() if key.lower() != ALPHA_TAG})
            stream.disposition = video.stream.disposition
            for index in copies.covers:
                kind = _COVER_TYPES[_codec_name(source.streams[index])]
                with video.reopened() as file:
                    picture = bytes(next(file.demux(file.streams[index])))
                output.add_attachment(f"cover.{kind.removeprefix('image/')}", kind, picture)
            copied = {index: _copy_stream(source.streams[index], output) for index in copies.indexes}
            output.metadata.update(_tags(source.metadata))
            offset = _offset(source)
            output.set_chapters(source.chapters())
            output.start_encoding()
            extradata = bytes(stream.codec_context.extradata or b"")
            delay, step = _reordering(segments(), extradata, target)
            parts = [_video_packets(segments(), stream, encoding.time_base, delay, step, offset)]
            if copied:
                parts.append(_copied_packets(source, copied, offset))
            for _, packet in heapq.merge(*parts, key=lambda part: part[0]):
                raise_if_interrupted()
                output.mux_one(packet)
    except (av.FFmpegError, ValueError) as error:
        raise UnwritableImage(target, f"cannot be written: {av_reason(error)}") from error


def _video_packets(
    segments: Iterator[Segment], stream: Any, time_base: Fraction, delay: int, step: int, offset: Fraction
) -> Iterator[tuple[Fraction, Any]]:
    """Yield the packets of all segments, each with its time of decoding in seconds.

    Each encoder counted these times from its own first frame. Over the whole video, the times of decoding are the
    sorted times of showing, `delay` frames earlier.

    Args:
        segments: The segments.
        stream: Stream of the output.
        time_base: Unit of the timestamps.
        delay: Number of frames by which decoding is ahead of showing.
        step: Time between two of the first frames, for those that are decoded before the first one is shown.
        offset: Time that becomes 0, in seconds.
    """
    av = import_av()
    shift = round(offset / time_base)
    shown: deque[int] = deque()
    for segment in segments:
        times = sorted(record.pts for record in segment.packets)
        if not shown:
            shown.extend(times[0] - (delay - number) * step for number in range(delay))
        shown.extend(times)
        for record in segment.packets:
            packet = av.Packet(record.data)
            packet.stream, packet.time_base = stream, time_base
            packet.pts, packet.dts = record.pts - shift, shown.popleft() - shift
            packet.duration, packet.is_keyframe = record.duration, record.is_keyframe
            yield packet.dts * time_base, packet


def _reordering(segments: Iterator[Segment], extradata: bytes, target: Path) -> tuple[int, int]:
    """Return by how many frames decoding is ahead of showing, and the time between the first two frames.

    Raises:
        UnwritableImage: The headers of a segment differ from those of the output.
    """
    delay, step = 0, 1
    for number, segment in enumerate(segments):
        if segment.extradata != extradata:
            raise UnwritableImage(
                target, "the finished segments have other headers than this encoder writes; remove their folder"
            )
        times = sorted(record.pts for record in segment.packets)
        position = {pts: index for index, pts in enumerate(times)}
        delay = max(delay, *(index - position[record.pts] for index, record in enumerate(segment.packets)))
        if number == 0 and len(times) > 1:
            step = times[1] - times[0]
    return delay, step


def _copied_packets(source: Any, copied: dict[int, Any], offset: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """Yield the packets of the copied streams in the order of the input, each with its time in seconds."""
    last = Fraction(-(2**62))
    decoded: dict[int, int] = {}
    for packet in source.demux([source.streams[index] for index in copied]):
        if packet.size == 0 and packet.dts is None:  # the end of a stream
            continue
        if packet.dts is None:
            packet.dts = packet.pts
        if packet.dts is not None:
            shift = round(offset / packet.time_base)
            packet.dts -= shift
            if packet.pts is not None:
                packet.pts -= shift
            before = decoded.get(packet.stream_index)
            if before is not None and packet.dts <= before and packet.stream.type != "subtitle":
                packet.dts = before + 1  # as ffmpeg does, because muxers refuse times that go back
                packet.pts = packet.dts if packet.pts is None else max(packet.pts, packet.dts)
            decoded[packet.stream_index] = packet.dts
            last = packet.dts * packet.time_base
        packet.stream = copied[packet.stream_index]
        yield last, packet


def _offset(source: Any) -> Fraction:
    """Return the time in seconds that becomes 0: that of the first packet for formats for broadcasting, else 0."""
    names = set(source.format.name.split(","))
    if not names & _STREAMED_FORMATS or source.start_time is None:
        return Fraction(0)
    return Fraction(source.start_time, import_av().time_base)


def _copy_stream(stream: Any, output: Any) -> Any:
    """Add a stream to an output that has the settings of a stream of the input, and return it."""
    added = output.add_stream_from_template(stream, opaque=True)
    added.metadata.update(_tags(stream.metadata))
    added.disposition = stream.disposition
    return added


def _is_held(stream: Any, container: VideoContainer) -> bool:
    """Return whether a container can hold a stream, by writing the header of a file with nothing else."""
    av = import_av()
    if stream.type == "attachment":
        return container.muxer == "matroska"
    if _is_cover(stream) and container.muxer != "mp4":  # FFmpeg's other muxers drop it, or make it a video of its own
        return False
    try:
        with av.open(io.BytesIO(), "w", format=container.muxer) as output:
            _copy_stream(stream, output)
            output.start_encoding()
    except (av.FFmpegError, ValueError):
        return False
    return True


def _way_out(video: VideoFile, index: int) -> str:
    """Return what to do about a stream of sound or subtitles that an output cannot hold."""
    needed = [stream for stream in video.container.streams if stream.type in ("audio", "subtitle")]
    for container in (MKV, *CONTAINERS):
        if all(_is_held(stream, container) for stream in needed):
            return f"name an output that ends in {container.suffixes[0]}, which holds it"
    return f"leave it out first, for example with ffmpeg -i IN -map 0 -map -0:{index} -c copy OUT"


def _is_cover(stream: Any) -> bool:
    return bool(stream.disposition & import_av().stream.Disposition.attached_pic)


def _is_written_from_tags(stream: Any) -> bool:
    """Return whether a stream is QuickTime's for names of chapters or a time code, which the muxer writes by itself."""
    names = _codec_name(stream) == "bin_data" and "SubtitleHandler" in stream.metadata.get("handler_name", "")
    return stream.type == "data" and (names or "timecode" in stream.metadata)


def _codec_name(stream: Any) -> str:
    context = stream.codec_context
    return str(context.name if context is not None else getattr(stream, "name", None) or "unknown codec")


def _tags(metadata: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key.lower() not in _OWN_TAGS}
