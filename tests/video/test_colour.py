"""Colours of upscaled videos: the conversion between YCbCr and RGB, and flat patches of colour from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from video_clips import HEIGHT, WIDTH, Nearest, av, decoded, make_clip

import savl
from savl.video import colour as colours
from savl.video import upscale, upscale_video
from savl.video.colour import Colour, colour_of, from_rgb, to_rgb
from savl.video.read import VideoFile, planes_of

# Red in the matrices, as the standards list it: Y, Cb and Cr of 8 bits in the limited range.
RED = {1: (63, 102, 240), 6: (81, 90, 240), 9: (74, 97, 240)}


@pytest.mark.parametrize(("matrix", "expected"), RED.items())
def test_red_has_the_samples_that_the_standard_lists(matrix: int, expected: tuple[int, ...]) -> None:
    red = np.zeros((4, 4, 3), np.float32)
    red[..., 0] = 1
    planes = from_rgb(red, Colour(matrix, False, 2, 2), 8)
    assert tuple(int(plane[0, 0]) for plane in planes) == expected
    assert all((plane == plane[0, 0]).all() for plane in planes)


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 4, 5, 7, 9])
def test_flat_patches_survive_the_way_through_rgb(matrix: int, full: bool, bits: int) -> None:
    colour = Colour(matrix, full, 2, 2)
    generator = np.random.default_rng(0)
    for rgb in generator.uniform(0.1, 0.9, (20, 3)).astype(np.float32):
        planes = from_rgb(np.broadcast_to(rgb, (4, 6, 3)).copy(), colour, bits)
        back = to_rgb(list(planes), colour, bits, centred=False)
        assert torch.allclose(back, torch.from_numpy(rgb).expand(4, 6, 3), atol=1.6 / 2**bits * 256 / 219)
        again = from_rgb(back.numpy(), colour, bits)
        assert all((a == b).all() for a, b in zip(planes, again, strict=True))


def test_gray_stays_exactly_gray() -> None:
    planes = [np.arange(16, 236, dtype=np.uint8).reshape(10, 22), *[np.full((5, 11), 128, np.uint8)] * 2]
    rgb = to_rgb(planes, Colour(1, False, 2, 2), 8, centred=False)
    assert torch.equal(rgb[..., 0], rgb[..., 1])
    assert torch.equal(rgb[..., 0], rgb[..., 2])
    assert (rgb.min(), rgb.max()) == (0, 1)


@pytest.mark.parametrize(("centred", "first"), [(False, [0, 5, 10, 15, 20, 20]), (True, [0, 2.5, 7.5, 12.5, 17.5, 20])])
def test_chroma_is_interpolated_from_where_its_samples_lie(centred: bool, first: list[float]) -> None:
    chroma = np.tile(np.array([118, 128, 138], np.uint8) + 10, (2, 1))
    luma = np.full((4, 6), 126, np.uint8)
    neutral = np.full((2, 3), 128, np.uint8)
    rgb = to_rgb([luma, neutral, chroma], Colour(1, True, 2, 2), 8, centred)
    red = (rgb[..., 0] * 255 - 126) / (2 * (1 - 0.2126))
    assert torch.allclose(red, torch.tensor(first, dtype=torch.float32).expand(4, 6), atol=1e-4)


@pytest.mark.parametrize(
    ("size", "matrix"), [((720, 480), 6), ((720, 576), 5), ((1280, 720), 1), ((640, 360), 6), ((608, 1080), 1)]
)
def test_an_untagged_video_has_the_matrix_that_players_assume(size: tuple[int, int], matrix: int) -> None:
    colour, note = colour_of(2, 0, 2, 2, rgb=False, jpeg=False, width=size[0], height=size[1])
    assert colour == Colour(matrix, False, 2, 2)
    assert note is not None
    assert ("BT.709" if matrix == 1 else "BT.601") in note


def test_rgb_is_stored_in_bt709_and_other_matrices_are_refused() -> None:
    colour, note = colour_of(0, 0, 1, 13, rgb=True, jpeg=False, width=10, height=10)
    assert note is None
    assert colour.full
    assert colour.encoded() == Colour(colours.BT709, False, 1, 13)
    with pytest.raises(ValueError, match="matrix"):
        colour_of(14, 0, 9, 16, rgb=False, jpeg=False, width=10, height=10)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 6])
def test_flat_colours_of_a_clip_are_those_of_its_result(matrix: int, full: bool) -> None:
    samples = (90, 100, 170)

    def flat(number: int) -> list[np.ndarray]:
        y, cb, cr = samples
        return [np.full((HEIGHT, WIDTH), y), *(np.full((HEIGHT // 2, WIDTH // 2), value) for value in (cb, cr))]

    tags = {"colorspace": matrix, "color_range": 2 if full else 1}
    source = make_clip(Path("clip.mp4"), frames=3, planes=flat, tags=tags, audio=None)
    upscale_video(source, "large.mp4", model=Nearest())
    for frame in decoded(Path("large.mp4")):
        planes, bits = planes_of(frame)
        assert bits == 8
        for plane, expected in zip(planes, samples, strict=True):
            assert np.abs(plane.astype(int) - expected).max() <= 1


def test_an_untagged_small_clip_is_tagged_because_its_large_result_would_look_different() -> None:
    source = make_clip(Path("clip.mp4"), frames=3, audio=None)
    done = upscale_video(source, "large.mp4", model=Nearest())
    frame = decoded(Path("large.mp4"))[0]
    assert (int(decoded(source)[0].colorspace), int(frame.colorspace), int(frame.color_range)) == (2, 6, 1)
    assert "BT.601 is assumed" in done.notes[0]


def flat_clip(path: Path, codec: str, frame: Any) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def first_rgb(path: Path, pixel_format: str) -> torch.Tensor:
    with VideoFile(path) as video:
        assert video.stream.codec_context.pix_fmt == pixel_format
        return next(video.pictures(skip=0)).rgb


@pytest.mark.parametrize("pixel_format", ["monob", "ya8", "gray16be"])
def test_packed_gray_is_gray(pixel_format: str) -> None:
    halves = np.zeros((HEIGHT, WIDTH), np.uint8)
    halves[:, WIDTH // 2 :] = 255
    gray = av.VideoFrame.from_ndarray(halves, format="gray")
    packed = gray.reformat(format=pixel_format, src_color_range=2, dst_color_range=2)
    clip = flat_clip(Path("clip.mov"), "png", packed)
    rgb = first_rgb(clip, pixel_format)
    assert torch.equal(rgb, rgb[:, :, :1].expand(-1, -1, 3))
    assert rgb[:, : WIDTH // 2].max() <= 0.01
    assert rgb[:, WIDTH // 2 :].min() >= 0.99


def test_colours_of_a_palette_are_its_entries() -> None:
    palette = np.tile(np.array([255, 200, 60, 90], np.uint8), (256, 1))  # alpha, red, green and blue
    frame = av.VideoFrame.from_ndarray((np.full((HEIGHT, WIDTH), 7, np.uint8), palette), format="pal8")
    rgb = first_rgb(flat_clip(Path("clip.mov"), "png", frame), "pal8")
    assert torch.allclose(rgb * 255, torch.tensor([200.0, 60, 90]).expand(HEIGHT, WIDTH, 3))


def test_white_of_five_bits_is_white() -> None:
    white = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), 255, np.uint8), format="rgb24")
    clip = flat_clip(Path("clip.avi"), "rawvideo", white.reformat(format="rgb555le"))
    assert first_rgb(clip, "rgb555le").min() == 1


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuvj420p", "gray"])
def test_frames_before_encoding_are_those_of_savl_upscale(monkeypatch: pytest.MonkeyPatch, pixel_format: str) -> None:
    def noise(number: int) -> list[np.ndarray]:
        generator = np.random.default_rng(number)
        chroma = {"yuv422p": (HEIGHT, WIDTH // 2), "yuv444p": (HEIGHT, WIDTH)}.get(pixel_format, (16, 24))
        shapes = [(HEIGHT, WIDTH)] if pixel_format == "gray" else [(HEIGHT, WIDTH), chroma, chroma]
        return [generator.integers(60, 180, shape) for shape in shapes]

    source = make_clip(Path("clip.mkv"), frames=3, pixel_format=pixel_format, planes=noise, audio=None)
    encoded = []
    real = upscale.SegmentEncoder.add

    def spy(self: object, rgb: np.ndarray, pts: int, duration: int) -> None:
        encoded.append(rgb)
        real(self, rgb, pts, duration)

    monkeypatch.setattr(upscale.SegmentEncoder, "add", spy)
    upscale_video(source, "large.mkv", model=Nearest())
    with VideoFile(source) as video:
        pictures = [picture.rgb.numpy() for picture in video.pictures(skip=0)]
    assert len(encoded) == len(pictures) == 3
    for rgb, picture in zip(encoded, pictures, strict=True):
        assert (rgb == savl.upscale(picture, model=Nearest())).all()
        assert np.ptp(picture) > 0.3
