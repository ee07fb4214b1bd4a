"""Segments of an upscaled video: continuing after an interruption, beginning anew, and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from video_clips import Nearest, decoded, make_clip

from savl.images.errors import OutputExists, UnwritableImage
from savl.video import upscale, upscale_video
from savl.video.segments import FRAMES_PER_SEGMENT, PacketRecord, Segment, SegmentFolder, segment_folder

FRAMES = 2 * FRAMES_PER_SEGMENT + 20


class Stop(Exception):
    pass


def stopping_after(frames: int, error: type[BaseException] = Stop) -> Nearest:
    def stop(calls: int) -> None:
        if calls == frames:
            raise error

    return Nearest(after=stop)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return make_clip(tmp_path / "clip.mp4", frames=FRAMES)


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9", "av1"])
def test_a_continued_video_is_the_file_that_an_uninterrupted_run_writes(clip: Path, codec: str) -> None:
    target = Path("large.mp4")
    with pytest.raises(Stop):
        upscale_video(clip, target, model=stopping_after(FRAMES_PER_SEGMENT + 7), video_codec=codec)
    assert not target.exists()
    assert sorted(path.name for path in segment_folder(target).iterdir()) == ["000000.segment", "settings.json"]
    rest = Nearest()
    counted: list[tuple[int, int]] = []
    done = upscale_video(
        clip, target, model=rest, video_codec=codec, on_frame=lambda frames, total: counted.append((frames, total))
    )
    assert rest.calls == FRAMES - FRAMES_PER_SEGMENT
    assert counted[0] == (1, rest.calls)
    assert counted[-1] == (rest.calls, rest.calls)
    assert (done.frames, done.continued) == (FRAMES, FRAMES_PER_SEGMENT)
    assert f"continues an earlier run: {FRAMES_PER_SEGMENT} of {FRAMES} frames" in done.notes[-1]
    assert not segment_folder(target).exists()
    whole = Path("whole") / "large.mp4"
    assert upscale_video(clip, whole, model=Nearest(), video_codec=codec).continued == 0
    assert target.read_bytes() == whole.read_bytes()


def test_an_interruption_while_streams_are_joined_repeats_no_frame(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(upscale, "_publish", lambda *_, **__: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            upscale_video(clip, "large.mp4", model=Nearest())
    rest = Nearest()
    assert upscale_video(clip, "large.mp4", model=rest).continued == FRAMES
    assert rest.calls == 0
    assert len(decoded(Path("large.mp4"))) == FRAMES


def test_a_damaged_segment_and_those_after_it_are_computed_again(clip: Path) -> None:
    with pytest.raises(Stop):
        upscale_video(clip, "large.mp4", model=stopping_after(FRAMES - 1))
    first = segment_folder(Path("large.mp4")) / "000001.segment"
    first.write_bytes(first.read_bytes()[:-1])
    assert upscale_video(clip, "large.mp4", model=Nearest()).continued == FRAMES_PER_SEGMENT


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"crf": 30}, "crf"),
        ({"scale": 2}, "scale"),
        ({"strength": 0.5}, "strength"),
        ({"video_codec": "hevc"}, "codec"),
    ],
)
def test_other_settings_begin_anew_and_say_so(clip: Path, settings: dict[str, object], changed: str) -> None:
    with pytest.raises(Stop):
        upscale_video(clip, "large.mp4", model=stopping_after(FRAMES - 1))
    every = Nearest()
    done = upscale_video(clip, "large.mp4", model=every, **settings)  # type: ignore[arg-type]
    assert every.calls == FRAMES
    assert changed in done.notes[-1]
    assert "is not continued" in done.notes[-1]
    assert not segment_folder(Path("large.mp4")).exists()


def test_another_input_begins_anew_and_says_so(clip: Path) -> None:
    with pytest.raises(Stop):
        upscale_video(clip, "large.mp4", model=stopping_after(FRAMES - 1))
    make_clip(clip, frames=30)
    done = upscale_video(clip, "large.mp4", model=Nearest())
    assert (done.frames, done.continued) == (30, 0)
    assert "(input)" in done.notes[-1].replace("encoder, ", "")


def test_an_error_in_the_first_segment_leaves_nothing(clip: Path) -> None:
    with pytest.raises(Stop):
        upscale_video(clip, "new/large.mp4", model=stopping_after(3))
    assert [path.name for path in clip.parent.rglob("*") if path.is_file()] == ["clip.mp4"]


def test_an_interruption_says_where_the_frames_are(clip: Path) -> None:
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        upscale_video(clip, "large.mp4", model=stopping_after(60, KeyboardInterrupt), on_note=told.append)
    assert f"{FRAMES_PER_SEGMENT} of {FRAMES} frames are kept in" in told[-1]
    assert "the same command continues" in told[-1]


def test_an_output_that_exists_is_kept_unless_it_is_overwritten(clip: Path) -> None:
    Path("large.mp4").write_bytes(b"old")
    with pytest.raises(OutputExists):
        upscale_video(clip, "large.mp4", model=Nearest())
    assert Path("large.mp4").read_bytes() == b"old"
    upscale_video(clip, "large.mp4", model=Nearest(), overwrite=True)
    assert len(decoded(Path("large.mp4"))) == FRAMES


def test_an_output_that_appears_meanwhile_is_not_replaced(clip: Path) -> None:
    def write(calls: int) -> None:
        Path("large.mp4").write_bytes(b"new")

    with pytest.raises(OutputExists):
        upscale_video(clip, "large.mp4", model=Nearest(after=write))
    assert Path("large.mp4").read_bytes() == b"new"


def test_a_segment_is_read_as_it_was_written(tmp_path: Path) -> None:
    segment = Segment(2, b"\x00head", (PacketRecord(5, 3, True, b"\n\x00a"), PacketRecord(9, 0, False, b"")))
    assert Segment.from_bytes(segment.to_bytes()) == segment
    for broken in (b"", segment.to_bytes()[:-1], segment.to_bytes() + b"x", b"{}\n", b"[1]\n", b"\xff\n"):
        with pytest.raises(ValueError):  # noqa: PT011  # of JSON, or of this module
            Segment.from_bytes(broken)
    folder = SegmentFolder(tmp_path / "out.mp4", {"a": 1})
    folder.append(segment)
    assert list(SegmentFolder(tmp_path / "out.mp4", {"a": 1}).segments()) == [segment]
    assert SegmentFolder(tmp_path / "out.mp4", {"a": 2}).changed == ("a",)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_full_disk_gives_one_line_and_keeps_the_finished_frames(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = SegmentFolder.append

    def full(self: SegmentFolder, segment: Segment) -> None:
        if self.count == 1:
            raise OSError(28, os.strerror(28))
        real(self, segment)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentFolder, "append", full)
        told: list[str] = []
        with pytest.raises(UnwritableImage, match=r"large.mp4: cannot be written: No space left on device"):
            upscale_video(clip, "large.mp4", model=Nearest(), on_note=told.append)
        assert f"{FRAMES_PER_SEGMENT} of {FRAMES} frames are kept in" in told[-1]
    assert upscale_video(clip, "large.mp4", model=Nearest()).continued == FRAMES_PER_SEGMENT


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_disk_that_is_full_while_streams_are_joined_gives_one_line(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = upscale.join
    with monkeypatch.context() as patch:
        patch.setattr(upscale, "join", lambda *args: real(*args[:-2], Path("/dev/full"), args[-1]))
        with pytest.raises(UnwritableImage, match=r"large.mp4: cannot be written: no space left on device"):
            upscale_video(clip, "large.mp4", model=Nearest())
    assert not Path("large.mp4").exists()


def test_a_file_that_could_not_be_completed_takes_no_space(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(joined: Path, *_: object, **__: object) -> None:
        assert joined.exists()
        raise UnwritableImage("large.mp4", "cannot be written: No space left on device")

    monkeypatch.setattr(upscale, "_publish", full)
    with pytest.raises(UnwritableImage):
        upscale_video(clip, "large.mp4", model=Nearest())
    left = [path.name for path in clip.parent.rglob("*") if path.is_file()]
    assert len([name for name in left if name.endswith(".segment")]) == -(-FRAMES // FRAMES_PER_SEGMENT)
    assert not [name for name in left if name.startswith("joined")]


GROWTH = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import numpy as np
from video_clips import Nearest, make_clip
from savl.video import upscale_video

def gray(number):
    return [np.full((64, 96), 60 + number % 100), *[np.full((32, 48), 128)] * 2]

for frames in (60, 360):
    clip = make_clip(Path(f"clip{frames}.mp4"), frames=frames, audio=None, size=(96, 64), planes=gray)
    upscale_video(clip, f"large{frames}.mp4", model=Nearest())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of the peak memory differs between systems")
def test_memory_does_not_grow_with_the_number_of_frames(tmp_path: Path) -> None:
    # 300 upscaled frames of 384x256 pixels would take 44 MB as samples of 8 bits, and 354 MB in float32.
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tests)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = (int(line) / 1024 for line in done.stdout.split())
    assert second < first + 30, (first, second)
