"""Small videos that tests make with PyAV, and a stand-in for a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

av = pytest.importorskip("av", reason="videos need PyAV: pip install 'savl[video]'")

WIDTH, HEIGHT = 48, 32


@dataclass
class Nearest:
    """A stand-in for a network: repeats every pixel.

    Attributes:
        calls: Number of frames so far.
        after: Called with that number after each frame.
    """

    scale: int = 4
    calls: int = 0
    after: Callable[[int], None] = field(default=lambda calls: None)

    def __call__(self, lr: torch.Tensor, *, on_tile: Callable[[int, int], None] | None = None) -> Any:
        sr = F.interpolate(lr, scale_factor=self.scale, mode="nearest")
        self.calls += 1
        self.after(self.calls)
        return SimpleNamespace(sr=sr, severity=torch.ones(1, *lr.shape[2:]))


def gradient(number: int) -> list[np.ndarray]:
    """Return the 8-bit planes of a 4:2:0 frame that differs from those of other numbers."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    luma = 40 + (2 * rows + 2 * columns + 3 * number) % 160
    chroma = [np.full((HEIGHT // 2, WIDTH // 2), value) for value in (110 + number % 20, 140 - number % 20)]
    return [luma, *chroma]


def make_clip(
    path: Path,
    *,
    frames: int = 50,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 12800),
    tags: dict[str, int] | None = None,
    rotation: int | None = None,
    aspect: Fraction | None = None,
    audio: str | None = "aac",
    subtitle: bool = False,
    chapters: bool = False,
    attachment: bool = False,
    metadata: dict[str, str] | None = None,
    planes: Callable[[int], list[np.ndarray]] = gradient,
    context: Callable[[Any], None] = lambda _: None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    begins: str = "0",
) -> Path:
    """Write a video of 25 frames per second, or of the given times in units of the time base."""
    step = round(1 / (25 * time_base))
    times = times or [number * step for number in range(frames)]
    container_options = {"output_ts_offset": begins} if begins != "0" else {}
    if path.suffix in (".mp4", ".mov"):
        container_options["video_track_timescale"] = str(time_base.denominator)
    with av.open(str(path), "w", options=container_options) as container:
        container.metadata.update(metadata or {})
        video = container.add_stream(codec, rate=25, options=options or {"crf": "8"})
        video.width, video.height, video.pix_fmt = *size, pixel_format
        video.time_base = video.codec_context.time_base = time_base
        for name, value in (tags or {}).items():
            setattr(video.codec_context, name, value)
        if aspect is not None:
            video.codec_context.sample_aspect_ratio = aspect
        if rotation is not None:
            video.set_display_rotation(rotation)
        context(video.codec_context)
        sound = None if audio is None else container.add_stream(audio, rate=48000, layout="mono")
        text = None
        if subtitle:
            text = container.add_mux_stream("subrip", time_base=Fraction(1, 1000))
            text.metadata["language"] = "deu"
        if attachment:
            container.add_attachment("font.ttf", "application/x-truetype-font", b"a font")
        if chapters:
            container.set_chapters(
                [
                    {"id": 1, "start": 0, "end": 900, "time_base": Fraction(1, 1000), "metadata": {"title": "First"}},
                    {"id": 2, "start": 900, "end": 2000, "time_base": Fraction(1, 1000), "metadata": {"title": "Rest"}},
                ]
            )
        container.start_encoding()
        for number, pts in enumerate(times):
            frame = av.VideoFrame(*size, pixel_format)
            for values, plane in zip(planes(number), frame.planes, strict=True):
                dtype = np.uint16 if "10" in pixel_format else np.uint8
                rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size).view(dtype)
                rows[:, : plane.width] = values
            frame.pts, frame.time_base = pts, time_base
            container.mux(video.encode(frame))
            if sound is not None:
                wave = np.sin(np.arange(1920) * (0.05 + 0.001 * number), dtype=np.float32)[None]
                samples = (wave * 8000).astype(np.int16)
                planar = sound.codec_context.format.name
                part = av.AudioFrame.from_ndarray(
                    wave if planar.startswith("fltp") else samples, planar.replace("s16p", "s16"), "mono"
                )
                part.sample_rate, part.pts, part.time_base = 48000, number * 1920, Fraction(1, 48000)
                container.mux(sound.encode(part))
        if text is not None:
            for number, line in enumerate((b"One.", b"Two.")):
                packet = av.Packet(line)
                packet.stream, packet.time_base = text, Fraction(1, 1000)
                packet.pts = packet.dts = 200 + 700 * number
                packet.duration = 500
                container.mux(packet)
        container.mux(video.encode(None))
        if sound is not None:
            container.mux(sound.encode(None))
    return path


def decoded(path: Path) -> list[Any]:
    """Return the frames of the first video stream."""
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def packets(path: Path, kind: str) -> list[tuple[Any, ...]]:
    """Return time, duration and content of the packets of the first stream of a kind."""
    with av.open(str(path)) as container:
        stream = next(stream for stream in container.streams if stream.type == kind)
        return [
            (packet.pts * packet.time_base, packet.duration * packet.time_base, bytes(packet))
            for packet in container.demux(stream)
            if packet.size
        ]
