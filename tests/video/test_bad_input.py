"""One clear line for each input or output of `savl.video.upscale_video` that cannot be processed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from video_clips import Nearest, av, make_clip

from savl.images.errors import ImageFileError, ImageNotFound, UnreadableImage, UnsupportedImage, UnwritableImage
from savl.video import upscale_video


def message_of(error: type[Exception], path: str, output: str = "large.mkv", **settings: Any) -> str:
    with pytest.raises(error) as caught:
        upscale_video(path, output, model=Nearest(), **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert not [name for name in os.listdir() if "large" in name]
    return message


def test_missing_empty_and_foreign_files() -> None:
    assert message_of(ImageNotFound, "none.mp4") == "none.mp4: does not exist"
    Path("empty.mp4").touch()
    assert message_of(UnreadableImage, "empty.mp4") == "empty.mp4: is empty"
    Path("text.mp4").write_text("no video " * 100)
    assert message_of(UnreadableImage, "text.mp4").startswith("text.mp4: cannot be read as a video: invalid data")
    Path("folder.mp4").mkdir()
    assert message_of(ImageFileError, "folder.mp4").startswith("folder.mp4: cannot be read as a video: is a directory")


def test_sound_without_video() -> None:
    with av.open("sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        part = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), "fltp", "mono")
        part.sample_rate = 48000
        container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    assert message_of(UnsupportedImage, "sound.mp4") == "sound.mp4: contains only sound"


@pytest.mark.parametrize("suffix", ["gif", "png", "jpg", "webp"])
def test_an_image_with_the_name_of_a_video(suffix: str) -> None:
    pictures = [Image.new("RGB", (32, 32), (value, 0, 0)) for value in (0, 100)]
    pictures[0].save(f"a.{suffix}", save_all=suffix == "gif", append_images=pictures[1:] if suffix == "gif" else ())
    os.rename(f"a.{suffix}", "a.mp4")
    assert "is an image" in message_of(UnsupportedImage, "a.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_truncated_clip(suffix: str) -> None:
    # The index of MP4 comes first, as in files for the web: without it, such a file could not be opened at all.
    clip = make_clip(Path(f"clip{suffix}"), options={"crf": "8"})
    if suffix == ".mp4":
        with av.open(str(clip)) as source, av.open("fast.mp4", "w", options={"movflags": "+faststart"}) as target:
            streams = {stream.index: target.add_stream_from_template(stream, opaque=True) for stream in source.streams}
            for packet in source.demux():
                if packet.dts is not None:
                    packet.stream = streams[packet.stream_index]
                    target.mux(packet)
        clip = Path("fast.mp4")
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) // 2])
    assert "is truncated" in message_of(UnreadableImage, clip.name)


def test_an_mp4_file_without_its_index() -> None:
    clip = make_clip(Path("clip.mp4"))
    clip.write_bytes(clip.read_bytes()[:3000])
    assert "cannot be read as a video: invalid data" in message_of(UnreadableImage, "clip.mp4")


def test_no_frames() -> None:
    with av.open("none.mkv", "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
    assert "contains no frames" in message_of(UnreadableImage, "none.mkv")


def test_a_damaged_frame_is_named_and_damage_before_the_first_frame_is_skipped() -> None:
    source = make_clip(Path("source.mkv"), audio=None, codec="mjpeg", pixel_format="yuvj420p", options={}, frames=9)
    content = source.read_bytes()
    with av.open(str(source)) as container:
        data = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    Path("clip.mkv").write_bytes(content.replace(data[5], bytes(len(data[5]))))
    assert "clip.mkv: is damaged: frame 6 cannot be decoded" in message_of(UnreadableImage, "clip.mkv")
    Path("clip.mkv").write_bytes(content.replace(data[0], bytes(len(data[0]))))
    assert upscale_video("clip.mkv", "large.mkv", model=Nearest()).frames == 8


def test_the_output_is_checked_before_the_network_runs() -> None:
    clip = str(make_clip(Path("clip.mkv")))
    assert "its folder cannot be made" in message_of(UnwritableImage, clip, f"{clip}/large.mkv")
    Path("dir.mkv").mkdir()
    assert "not a regular file" in message_of(UnwritableImage, clip, "dir.mkv")
    with pytest.raises(ValueError, match=r"output must end in one of \.mp4 \.m4v \.mkv \.mov \.webm, got 'a.avi'"):
        upscale_video(clip, "a.avi", model=Nearest())


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match="path must be a path, got bytes"):
        upscale_video(b"clip", "large.mp4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="crf must be an int from 0 to 51, got 60"):
        upscale_video("clip.mp4", "large.mp4", crf=60)
    with pytest.raises(ValueError, match="video_codec must be auto, h264, hevc, vp9, av1, got 'x'"):
        upscale_video("clip.mp4", "large.mp4", video_codec="x")
    with pytest.raises(ValueError, match="WebM files hold vp9 or av1 here, not h264"):
        upscale_video("clip.mp4", "large.webm", video_codec="h264")
    with pytest.raises(ValueError, match="scale must be a finite number above 0"):
        upscale_video("clip.mp4", "large.mp4", scale=0)


def test_frames_that_change_their_size_are_refused() -> None:
    small = make_clip(Path("small.ts"), frames=10, audio=None)
    other = make_clip(Path("other.ts"), frames=10, audio=None, size=(64, 32), planes=_flat)
    Path("clip.ts").write_bytes(small.read_bytes() + other.read_bytes())
    with pytest.raises(UnsupportedImage, match=r"frame \d+ has 64x32 pixels, those before have 48x32"):
        upscale_video("clip.ts", "large.mkv", model=Nearest())


def test_recordings_that_were_appended_are_refused_and_small_steps_back_are_not() -> None:
    long = make_clip(Path("long.ts"), frames=50)
    Path("clip.ts").write_bytes(2 * long.read_bytes())
    assert "its times go back at " in message_of(UnsupportedImage, "clip.ts")
    short = make_clip(Path("short.ts"), frames=10)
    Path("clip.ts").write_bytes(2 * short.read_bytes())
    assert upscale_video("clip.ts", "large.mkv", model=Nearest()).frames == 20


def _flat(number: int) -> list[np.ndarray]:
    return [np.full((32, 64), 80), np.full((16, 32), 120), np.full((16, 32), 120)]


def test_without_pyav_the_command_says_what_to_install_and_images_need_none(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "clip.mp4").write_bytes(b"x")
    code = """
import sys
sys.modules["av"] = None
from savl.cli import main
def run(*arguments):
    try:
        main(["upscale", *arguments])
    except SystemExit as stop:
        return stop.code
assert not run("a.png", "-o", "large.png")
assert run("clip.mp4") == 1
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "videos need PyAV" in last
    assert "pip install 'savl[video]'" in last


def test_neither_savl_nor_upscaling_an_image_imports_pyav(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code = """
import sys, savl, savl.video
from savl.cli import main
try:
    main(["upscale", "a.png", "-o", "large.png"])
except SystemExit as stop:
    assert not stop.code
assert "av" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120, capture_output=True)
