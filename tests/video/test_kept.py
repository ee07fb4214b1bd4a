"""What `savl.video.upscale_video` keeps: times, sound, subtitles, colour tags, rotation, shape of pixels, bit depth."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_clips import HEIGHT, WIDTH, Nearest, av, decoded, gradient, make_clip, packets

from savl.images.errors import UnsupportedImage
from savl.video import join, upscale_video

BT709 = {"colorspace": 1, "color_primaries": 1, "color_trc": 1}
IRREGULAR = [0, 512, 600, 2000, 2048, 5000, 5001, 9000, 9512, 20000] + [20512 + 700 * n for n in range(60)]


def times(path: Path) -> list[Fraction]:
    return [frame.pts * frame.time_base for frame in decoded(path)]


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".m4v"])
def test_every_frame_is_enlarged_and_keeps_its_time_and_the_sound_its_packets(suffix: str) -> None:
    source, target = make_clip(Path(f"clip{suffix}")), Path(f"large{suffix}")
    done = upscale_video(source, target, model=Nearest())
    assert (done.old_size, done.new_size, done.frames) == ((WIDTH, HEIGHT), (4 * WIDTH, 4 * HEIGHT), 50)
    frames = decoded(target)
    assert [(frame.width, frame.height) for frame in frames] == [(4 * WIDTH, 4 * HEIGHT)] * 50
    before = decoded(source)
    assert [(frame.pts, frame.time_base) for frame in frames] == [(frame.pts, frame.time_base) for frame in before]
    assert packets(target, "audio") == packets(source, "audio")
    assert sorted(path.name for path in Path().iterdir()) == [source.name, target.name]


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_variable_frame_rate_is_kept_in_more_than_one_segment(codec: str) -> None:
    source = make_clip(Path("clip.mp4"), times=IRREGULAR, audio=None)
    upscale_video(source, "large.mp4", model=Nearest(), video_codec={"libx264": "h264", "libx265": "hevc"}[codec])
    assert times(Path("large.mp4")) == times(source) == [Fraction(pts, 12800) for pts in IRREGULAR]
    with av.open("large.mp4") as container:
        decoding = [packet.dts for packet in container.demux(video=0) if packet.size]
        assert decoding == sorted(set(decoding))
        assert container.streams.video[0].time_base == Fraction(1, 12800)


@pytest.mark.parametrize(("codec", "name"), [("vp9", "vp9"), ("av1", "av1"), ("auto", "vp9")])
def test_webm_holds_vp9_and_av1_and_copies_opus(codec: str, name: str) -> None:
    source = make_clip(Path("clip.webm"), codec="libvpx-vp9", audio="libopus", time_base=Fraction(1, 1000))
    upscale_video(source, "large.webm", model=Nearest(), video_codec=codec)
    assert times(Path("large.webm")) == times(source)
    assert packets(Path("large.webm"), "audio") == packets(source, "audio")
    with av.open("large.webm") as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == name


def test_subtitles_attachments_chapters_and_metadata_are_copied() -> None:
    source = make_clip(
        Path("clip.mkv"), subtitle=True, chapters=True, attachment=True, metadata={"title": "A clip", "ARTIST": "Me"}
    )
    done = upscale_video(source, "large.mkv", model=Nearest())
    assert packets(Path("large.mkv"), "subtitle") == packets(source, "subtitle")
    with av.open(str(source)) as before, av.open("large.mkv") as after:
        assert [stream.type for stream in after.streams] == ["video", "audio", "subtitle", "attachment"]
        assert after.streams[2].language == before.streams[2].language == "deu"
        assert after.streams[3].metadata == before.streams[3].metadata
        assert after.chapters() == before.chapters()
        assert len(after.chapters()) == 2
        assert {"title": "A clip", "ARTIST": "Me"}.items() <= after.metadata.items()
    assert done.notes == (done.notes[0],), "only the assumed matrix"


def test_chapters_and_title_of_mp4_are_copied_without_a_second_track_of_names() -> None:
    source = make_clip(Path("clip.mp4"), chapters=True, metadata={"title": "A clip"}, tags=BT709)
    done = upscale_video(source, "large.mp4", model=Nearest())
    with av.open(str(source)) as before, av.open("large.mp4") as after:
        assert [stream.type for stream in after.streams] == [stream.type for stream in before.streams]
        titles = [chapter["metadata"]["title"] for chapter in after.chapters()]
        assert titles == [chapter["metadata"]["title"] for chapter in before.chapters()] == ["First", "Rest"]
        assert after.metadata["title"] == "A clip"
    assert done.notes == ()


def test_a_stream_that_the_container_cannot_hold_is_named() -> None:
    source = make_clip(Path("clip.mkv"), subtitle=True)
    with pytest.raises(UnsupportedImage, match=r"clip.mkv: \.mp4 cannot hold stream 2 \(subtitle, (srt|subrip)\)"):
        upscale_video(source, "large.mp4", model=Nearest())
    with pytest.raises(UnsupportedImage, match=r"\.webm cannot hold stream 1 \(audio, aac\); name .* \.mkv"):
        upscale_video(source, "large.webm", model=Nearest())
    assert [path.name for path in Path().iterdir()] == ["clip.mkv"]


def clip_with_timed_text() -> Path:
    """Return an MP4 file with the subtitles that only MP4 and MOV hold."""
    path = Path("text.mp4")
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        text = container.add_mux_stream("mov_text", time_base=Fraction(1, 1000))
        container.start_encoding()
        frame = av.VideoFrame(WIDTH, HEIGHT, "yuv420p")
        frame.pts = 0
        container.mux([*video.encode(frame), *video.encode(None)])
        packet = av.Packet(b"\0\2Hi")
        packet.stream, packet.time_base = text, Fraction(1, 1000)
        packet.pts, packet.dts, packet.duration = 0, 0, 40
        container.mux(packet)
    return path


def test_the_message_about_a_stream_names_a_container_that_holds_it() -> None:
    with pytest.raises(UnsupportedImage, match=r"\.mkv cannot hold stream 1 \(.*\); name an output that ends in \.mp4"):
        upscale_video(clip_with_timed_text(), "large.mkv", model=Nearest())


def test_the_message_about_a_stream_says_how_to_leave_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "CONTAINERS", ())
    with pytest.raises(UnsupportedImage, match=r"leave it out first, for example with ffmpeg .* -map -0:1 "):
        upscale_video(clip_with_timed_text(), "large.mkv", model=Nearest())


def test_an_attachment_that_the_container_cannot_hold_is_left_out_with_a_note() -> None:
    source = make_clip(Path("clip.mkv"), attachment=True, tags=BT709)
    done = upscale_video(source, "large.mp4", model=Nearest())
    assert len(done.notes) == 1
    assert "attachment" in done.notes[0]
    assert ".mp4 cannot hold it" in done.notes[0]


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation_and_shape_of_pixels_are_kept(rotation: int) -> None:
    source = make_clip(Path("clip.mp4"), frames=4, rotation=rotation, aspect=Fraction(4, 3))
    upscale_video(source, "large.mp4", model=Nearest())
    before, after = decoded(source)[0], decoded(Path("large.mp4"))[0]
    assert after.rotation == before.rotation
    assert abs(after.rotation) == abs(rotation)
    with av.open("large.mp4") as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("colour_range", [1, 2])
@pytest.mark.parametrize("matrix", [1, 6, 9])
def test_colour_tags_are_kept(suffix: str, colour_range: int, matrix: int) -> None:
    tags = {"colorspace": matrix, "color_primaries": 9, "color_trc": 14, "color_range": colour_range}
    source, target = make_clip(Path(f"clip{suffix}"), frames=4, tags=tags), Path(f"large{suffix}")
    upscale_video(source, target, model=Nearest())
    found = decoded(target)[0]
    assert {name: int(getattr(found, name)) for name in tags} == tags


def test_ten_bits_stay_ten_bits() -> None:
    def ramp(number: int) -> list[np.ndarray]:
        return [plane * 4 + 1 for plane in (np.full((HEIGHT, WIDTH), 100), *[np.full((16, 24), 128)] * 2)]

    source = make_clip(Path("clip.mp4"), frames=4, pixel_format="yuv420p10le", planes=ramp, tags=BT709)
    upscale_video(source, "large.mp4", model=Nearest(), crf=0)
    frame = decoded(Path("large.mp4"))[0]
    assert frame.format.name == "yuv420p10le"
    with av.open("large.mp4") as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == "hevc"
        assert container.streams.video[0].codec_tag == "hvc1"
    luma = frame.to_ndarray()[: 4 * HEIGHT]
    assert abs(int(luma.mean()) - 401) <= 1


def test_the_size_is_made_even_by_leaving_out_one_row_or_column() -> None:
    source = make_clip(Path("clip.mp4"), frames=3, audio=None)
    assert upscale_video(source, "large.mp4", model=Nearest(), scale=33 / 32).new_size == (50, 32)  # of 50 x 33


def test_transparency_of_webm_is_left_out_with_a_note_and_its_tag_too() -> None:
    def half_visible(number: int) -> list[np.ndarray]:
        return [*gradient(number), np.full((HEIGHT, WIDTH), 128)]

    options = {"crf": "20", "auto-alt-ref": "0"}
    source = make_clip(
        Path("clip.webm"),
        frames=3,
        codec="libvpx-vp9",
        pixel_format="yuva420p",
        options=options,
        time_base=Fraction(1, 1000),
        audio=None,
        planes=half_visible,
    )
    done = upscale_video(source, "large.webm", model=Nearest())
    assert "its transparency is not kept" in done.notes
    for path, tagged in ((source, True), (Path("large.webm"), False)):
        with av.open(str(path)) as container:
            assert ("alpha_mode" in {key.lower() for key in container.streams.video[0].metadata}) == tagged


def test_interlaced_frames_give_a_note() -> None:
    source = make_clip(Path("clip.mkv"), frames=3, options={"flags": "+ildct+ilme", "x264-params": "tff=1"})
    told: list[str] = []
    done = upscale_video(source, "large.mkv", model=Nearest(), on_note=told.append)
    assert any("interlaced" in note and "bwdif" in note for note in done.notes)
    assert told == list(done.notes)


def test_a_transport_stream_begins_at_zero_in_its_result() -> None:
    source = make_clip(Path("clip.ts"), audio=None, time_base=Fraction(1, 90000), frames=5, begins="100")
    upscale_video(source, "large.mkv", model=Nearest())
    before, after = times(source), times(Path("large.mkv"))
    assert before[0] == 100
    assert after[0] < Fraction(1, 100)
    assert [t - after[0] for t in after] == [t - before[0] for t in before]


def test_a_cover_picture_is_kept_where_the_container_has_one() -> None:
    Image.new("RGB", (64, 64), (255, 0, 0)).save("cover.jpg")
    plain = make_clip(Path("plain.mp4"), frames=5, tags=BT709)
    with av.open(str(plain)) as source, av.open("cover.jpg") as cover, av.open("clip.mp4", "w") as target:
        streams = {stream.index: target.add_stream_from_template(stream, opaque=True) for stream in source.streams}
        picture = target.add_stream_from_template(cover.streams[0], opaque=True)
        picture.disposition = av.stream.Disposition.attached_pic
        for packet in cover.demux():
            if packet.size:
                packet.stream, packet.pts, packet.dts = picture, 0, 0
                target.mux(packet)
        for packet in source.demux():
            if packet.size:
                packet.stream = streams[packet.stream_index]
                target.mux(packet)
    for suffix in (".mp4", ".mkv"):
        assert upscale_video("clip.mp4", f"large{suffix}", model=Nearest()).notes == ()
        with av.open(f"large{suffix}") as container:
            kept = [stream for stream in container.streams.video if stream.disposition & 1 << 10]
            assert [stream.codec_context.name for stream in kept] == ["mjpeg"]
            assert bytes(next(container.demux(kept))) == Path("cover.jpg").read_bytes()
    again = upscale_video("large.mkv", "again.mov", model=Nearest(scale=1))
    assert [note for note in again.notes if "(video, mjpeg) is left out, because .mov cannot hold it" in note]


@pytest.mark.parametrize("suffix", [".mov", ".mp4", ".mkv"])
def test_a_time_code_is_kept_as_a_tag(suffix: str) -> None:
    make_clip(Path("clip.mov"), frames=5, metadata={"timecode": "01:00:00:00"}, tags=BT709)
    assert upscale_video("clip.mov", f"large{suffix}", model=Nearest()).notes == ()
    with av.open(f"large{suffix}") as container:
        tags = {key.lower(): value for key, value in container.streams.video[0].metadata.items()}
        assert tags["timecode"] == "01:00:00:00"


def test_a_colon_in_a_name_is_no_protocol() -> None:
    make_clip(Path("clip.mp4"), frames=3).rename("a:b.mp4")
    assert upscale_video("a:b.mp4", "c:d.mp4", model=Nearest()).frames == 3
