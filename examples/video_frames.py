"""Make a clip that pans over a photograph, and draw frames of a clip beside those of its upscaled version.

    python examples/video_frames.py make examples/chairs.webp clip.mp4
    savl upscale clip.mp4
    python examples/video_frames.py draw clip.mp4 clip_x4.mp4 -o docs/video.webp

The clip has noise and strong compression, as the videos of old cameras have. It needs PyAV.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
import numpy as np
from PIL import Image

WIDTH, HEIGHT, FRAMES, RATE = 128, 96, 50, 25
NOISE = 4.0
"""Standard deviation of the noise, in 8-bit levels."""
DETAIL = (60, 40, 460, 340)
"""Left, top, right and bottom of the part that is drawn, in pixels of the upscaled frames."""
GAP = 12
"""Pixels between the parts."""


def make(photograph: Path, clip: Path) -> None:
    """Write a clip of two seconds that pans over a photograph, one pixel per frame."""
    pixels = np.asarray(Image.open(photograph).convert("RGB")).astype(np.float32)
    generator = np.random.default_rng(0)
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "24"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(FRAMES):
            part = pixels[60 : 60 + HEIGHT, 60 + number : 60 + number + WIDTH]
            noisy = part + generator.normal(0, NOISE, part.shape)
            frame = av.VideoFrame.from_ndarray(np.clip(noisy.round(), 0, 255).astype(np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def draw(before: Path, after: Path, picture: Path) -> None:
    """Draw the same detail of three frames of two clips: the first clip bicubically enlarged, and the second."""
    columns = []
    for clip in (before, after):
        with av.open(str(clip)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        columns.append([frames[number] for number in (0, len(frames) // 2, len(frames) - 1)])
    width, height = DETAIL[2] - DETAIL[0], DETAIL[3] - DETAIL[1]
    drawn = Image.new("RGB", (3 * (width + GAP) - GAP, 2 * (height + GAP) - GAP), "white")
    for row, frames in enumerate(columns):
        for column, frame in enumerate(frames):
            large = frame.resize(columns[1][column].size, Image.Resampling.BICUBIC)
            drawn.paste(large.crop(DETAIL), (column * (width + GAP), row * (height + GAP)))
    drawn.save(picture, quality=80)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("make")
    made.add_argument("photograph", type=Path)
    made.add_argument("clip", type=Path)
    drawing = commands.add_parser("draw")
    drawing.add_argument("before", type=Path)
    drawing.add_argument("after", type=Path)
    drawing.add_argument("-o", dest="picture", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.photograph, arguments.clip)
    else:
        draw(arguments.before, arguments.after, arguments.picture)


if __name__ == "__main__":
    main()
