"""The video files that savl reads and writes, and the codecs that it encodes with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CodecName = Literal["auto", "h264", "hevc", "vp9", "av1"]


@dataclass(frozen=True)
class VideoCodec:
    """A codec.

    Attributes:
        name: Value of `--video-codec`.
        encoder: Name of the encoder in FFmpeg.
        crf: Default of `--crf`, at which the result can hardly be told from the frames before encoding.
        max_crf: Largest value of `--crf`.
        options: Further options of the encoder.
    """

    name: CodecName
    encoder: str
    crf: int
    max_crf: int
    options: tuple[tuple[str, str], ...] = ()


# rc-lookahead: as that of x265, because x264 keeps 40 frames by default, which are 2 GB at 7680x4320.
H264 = VideoCodec("h264", "libx264", 18, 51, (("preset", "medium"), ("rc-lookahead", "20")))
# info=0: the headers would list settings, such as the number of threads, that may change before a run is continued.
HEVC = VideoCodec("hevc", "libx265", 20, 51, (("preset", "medium"), ("x265-params", "log-level=error:info=0")))
VP9 = VideoCodec("vp9", "libvpx-vp9", 20, 63, (("b", "0"), ("row-mt", "1"), ("deadline", "good"), ("cpu-used", "2")))
AV1 = VideoCodec("av1", "libsvtav1", 20, 63, (("preset", "6"),))
CODECS = (H264, HEVC, VP9, AV1)


@dataclass(frozen=True)
class VideoContainer:
    """A container format to write.

    Attributes:
        title: Name in messages.
        muxer: Name in FFmpeg.
        suffixes: File name suffixes, lower case, with the dot.
        codecs: Codecs of the video stream.
        default: Codec of `--video-codec auto`.
        large: The same if the frames have more than 8 bits or are larger than decoders of H.264 in hardware accept.
    """

    title: str
    muxer: str
    suffixes: tuple[str, ...]
    codecs: tuple[VideoCodec, ...]
    default: VideoCodec = H264
    large: VideoCodec = HEVC

    @property
    def is_mov(self) -> bool:
        """Whether FFmpeg writes the container with its QuickTime muxer."""
        return self.muxer in ("mp4", "mov")


MP4 = VideoContainer("MP4", "mp4", (".mp4", ".m4v"), CODECS)
MKV = VideoContainer("Matroska", "matroska", (".mkv",), CODECS)
MOV = VideoContainer("QuickTime", "mov", (".mov",), (H264, HEVC))
WEBM = VideoContainer("WebM", "webm", (".webm",), (VP9, AV1), VP9, AV1)
CONTAINERS = (MP4, MKV, MOV, WEBM)

_READ_ONLY = (".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".vob", ".wmv", ".flv", ".3gp", ".ogv")


def container_of_suffix(path: Path) -> VideoContainer | None:
    """Return the container to write by the suffix of a file name, or None if it is none of them."""
    suffix = path.suffix.lower()
    return next((container for container in CONTAINERS if suffix in container.suffixes), None)


def is_video_name(path: Path) -> bool:
    """Return whether a file is a video by the suffix of its name."""
    return container_of_suffix(path) is not None or path.suffix.lower() in _READ_ONLY


def result_suffix(path: Path) -> str:
    """Return the suffix of the result of a video: its own, or ".mkv", which holds nearly every kind of stream."""
    return path.suffix if container_of_suffix(path) is not None else ".mkv"


def codec_named(name: str) -> VideoCodec | None:
    """Return the codec of a name, or None for "auto".

    Raises:
        ValueError: There is no codec of this name.
    """
    for codec in CODECS:
        if codec.name == name:
            return codec
    if name == "auto":
        return None
    raise ValueError(f"video_codec must be auto, {', '.join(codec.name for codec in CODECS)}, got {name!r}")
