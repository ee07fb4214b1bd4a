"""`savl upscale` of videos: which files are videos, names of outputs, messages, exit codes, and interruptions."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from video_clips import av, decoded, make_clip, packets

from savl.cli.progress import ProgressReport
from savl.video.segments import FRAMES_PER_SEGMENT, segment_folder

Run = Callable[..., Any]
Write = Callable[..., Path]

FRAMES = 2 * FRAMES_PER_SEGMENT
SLOW = """
import time
def slowly(self, lr, *, on_tile=None, nearest=Nearest.__call__):
    time.sleep(0.03)
    print("frame", flush=True)
    return nearest(self, lr, on_tile=on_tile)
Nearest.__call__ = slowly
main()
"""


def files(folder: str = ".") -> list[str]:
    return sorted(path.as_posix() for path in Path(folder).rglob("*") if path.is_file())


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.chdir(tmp_path)

    def make(name: str, **settings: Any) -> Path:
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        tags = {"colorspace": 1, "color_primaries": 1, "color_trc": 1}
        return make_clip(Path(name), **{"frames": 3, "tags": tags, **settings})

    return make


def test_a_named_video_is_upscaled_beside_itself_or_to_the_named_output(savl: Run, clip: Write) -> None:
    clip("clip.mp4")
    done = savl("upscale", "clip.mp4")
    assert done.code == 0
    assert "clip.mp4 -> clip_x4.mp4  48x32 -> 192x128" in done.text
    assert len(decoded(Path("clip_x4.mp4"))) == 3
    assert packets(Path("clip_x4.mp4"), "audio") == packets(Path("clip.mp4"), "audio")
    assert savl("upscale", "clip.mp4", "-o", "large.mkv", "--scale", "2", "--crf", "30").code == 0
    assert decoded(Path("large.mkv"))[0].width == 96
    assert savl("upscale", "clip.mp4", "-o", "out/").code == 0
    assert files() == ["clip.mp4", "clip_x4.mp4", "large.mkv", "out/clip.mp4"]


def test_images_and_videos_may_be_inputs_of_one_run(savl: Run, clip: Write, picture: Write) -> None:
    clip("clip.avi", codec="mpeg4", audio=None, options={}, tags={}, time_base=Fraction(1, 25))
    picture("photo.png")
    done = savl("upscale", "photo.png", "clip.avi")
    assert done.code == 0
    assert "2 upscaled" in done.text
    assert files() == ["clip.avi", "clip_x4.mkv", "photo.png", "photo_x4.png"]


def test_videos_in_folders_are_skipped_and_counted(savl: Run, clip: Write, picture: Write) -> None:
    clip("in/a.mp4")
    clip("in/b.MP4")
    picture("in/photo.png")
    segment_folder(Path("in/c.mp4")).mkdir()  # of an unfinished run
    done = savl("upscale", "in", "-o", "out")
    assert done.code == 0
    assert "skipped: 2 .mp4 (a video is upscaled if you name it)\n" in done.text
    assert files("out") == ["out/photo.png"]
    Path("in/photo.png").unlink()
    alone = savl("upscale", "in", "-o", "out")
    assert alone.code == 2
    assert "2 .mp4 (a video is upscaled if you name it)" in alone.text


def test_a_glob_of_videos_selects_them_and_skips_results(savl: Run, clip: Write, picture: Write) -> None:
    clip("a.mp4")
    clip("b.mp4")
    picture("photo.png")
    assert savl("upscale", "*.mp4").code == 0
    assert files() == ["a.mp4", "a_x4.mp4", "b.mp4", "b_x4.mp4", "photo.png"]
    again = savl("upscale", "*.mp4")
    assert "skipped 2 results of earlier runs" in again.text
    assert again.text.count("kept") >= 2
    # What a shell expands.
    expanded = savl("upscale", "a.mp4", "a_x4.mp4")
    assert "skipped 1 result of an earlier run, a_x4.mp4" in expanded.text
    assert savl("upscale", "a_x4.mp4", "-o", "larger.mp4").code == 0
    assert "no video matches '*.mkv'" in savl("upscale", "*.mkv").text


def test_existing_results_are_kept_or_replaced(savl: Run, clip: Write) -> None:
    clip("clip.mp4")
    Path("clip_x4.mp4").write_bytes(b"old")
    assert "kept clip_x4.mp4" in savl("upscale", "clip.mp4").text
    refused = savl("upscale", "clip.mp4", "-o", "clip_x4.mp4")
    assert (refused.code, "-o clip_x4.mp4 exists already; --overwrite replaces it" in refused.text) == (2, True)
    assert Path("clip_x4.mp4").read_bytes() == b"old"
    assert savl("upscale", "clip.mp4", "--overwrite").code == 0
    assert len(decoded(Path("clip_x4.mp4"))) == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-o", "-"], "-o -: for images only, and clip.mp4 is a video"),
        (["--page", "2"], "--page: for images only"),
        (["-f", "png"], "--format: for images only"),
        (["--severity-map"], "--severity-map and --strength-map: for images only"),
        (["-o", "large.png"], "-o large.png: clip.mp4 is a video, whose result ends in one of .mp4 .mkv .mov .webm"),
        (["-o", "large.avi"], ".avi is not a format that savl writes"),
        (["--crf", "60"], "crf must be an int from 0 to 51"),
        (["--video-codec", "theora"], "theora"),
    ],
)
def test_options_that_a_video_cannot_have_are_refused(
    savl: Run, clip: Write, arguments: list[str], expected: str
) -> None:
    clip("clip.mp4")
    done = savl("upscale", "clip.mp4", *arguments)
    assert done.code == 2
    assert expected in " ".join(done.text.replace("│", " ").split())
    assert files() == ["clip.mp4"]


def test_an_image_is_not_written_to_a_video(savl: Run, picture: Write) -> None:
    picture("photo.png")
    done = savl("upscale", "photo.png", "-o", "large.mp4")
    assert done.code == 2
    assert "-o large.mp4 is a video, but photo.png is an image" in done.text


def test_a_bad_video_gives_one_line_and_exit_code_1_and_the_others_are_upscaled(savl: Run, clip: Write) -> None:
    Path("bad.mp4").write_bytes(b"no video")
    Path("none.mp4").unlink(missing_ok=True)
    clip("sub.mkv", subtitle=True, audio=None)
    clip("good.mp4")
    done = savl("upscale", "bad.mp4", "none.mp4", "good.mp4")
    assert done.code == 1
    lines = done.text.splitlines()
    assert sum(line.startswith("bad.mp4: cannot be read as a video: ") for line in lines) == 1
    assert "none.mp4: does not exist" in lines
    assert files() == ["bad.mp4", "good.mp4", "good_x4.mp4", "sub.mkv"]
    held = savl("upscale", "sub.mkv", "-o", "sub.mp4")
    assert held.code == 1
    assert "sub.mkv: .mp4 cannot hold stream 1 (subtitle, " in held.text


def test_progress_counts_frames(monkeypatch: pytest.MonkeyPatch, savl: Run, clip: Write) -> None:
    seen: list[tuple[int, int]] = []
    real = ProgressReport.on_tile

    def spy(self: ProgressReport, done: int, total: int) -> None:
        real(self, done, total)
        seen.append((done, total))
        assert "frames/s, 0:0" in self._tiles_estimate()

    monkeypatch.setattr(ProgressReport, "on_tile", spy)
    clip("clip.mp4")
    assert savl("upscale", "clip.mp4").code == 0
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_signal_leaves_no_output_and_the_same_command_continues(
    fork: Callable[..., Any], clip: Write, number: signal.Signals
) -> None:
    clip("clip.mp4", frames=FRAMES)
    process = fork(SLOW, "upscale", "clip.mp4", "-o", "large.mp4")
    process.wait_for(lambda printed: printed.count("frame") > FRAMES_PER_SEGMENT + 5)
    os.kill(process.pid, number)
    code, _, errors = process.wait()
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[number]
    assert "Traceback" not in errors
    assert not Path("large.mp4").exists()
    kept = segment_folder(Path("large.mp4"))
    assert "000000.segment" in {path.name for path in kept.iterdir()}
    if number is not signal.SIGKILL:
        assert f"{FRAMES_PER_SEGMENT} of {FRAMES} frames are kept in {kept}; the same command continues" in errors
    if number is signal.SIGINT:
        assert "interrupted: 0 of 1 upscaled, no partial output left" in errors
    again = fork("main()", "upscale", "clip.mp4", "-o", "large.mp4")
    code, _, errors = again.wait()
    assert code == 0
    assert f"continues an earlier run: {FRAMES_PER_SEGMENT} of {FRAMES} frames are finished" in errors
    assert len(decoded(Path("large.mp4"))) == FRAMES
    assert [name for name in files() if "claim" not in name] == ["clip.mp4", "large.mp4"]
    whole = fork("main()", "upscale", "clip.mp4", "-o", "whole.mp4")
    assert whole.wait()[0] == 0
    assert Path("whole.mp4").read_bytes() == Path("large.mp4").read_bytes()


def test_the_container_of_a_result_holds_what_av_reads_back(savl: Run, clip: Write) -> None:
    clip("clip.mkv", planes=lambda number: [np.full((32, 48), 90), *[np.full((16, 24), 128)] * 2])
    assert savl("upscale", "clip.mkv", "-o", "large.mov", "--video-codec", "hevc").code == 0
    with av.open("large.mov") as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == "hevc"
        assert "mov" in container.format.name
