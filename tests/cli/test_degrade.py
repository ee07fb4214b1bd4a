"""`savl degrade` as typed: files, names, seeds, settings, errors and exit codes."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms
from typer.testing import CliRunner, Result

from savl.cli.app import app
from savl.degradation import Degradation, DegradationConfig
from savl.degradation.config import CameraConfig, SpatialConfig
from savl.images.errors import UnwritableImage
from savl.images.format import PNG, READABLE, format_of_suffix
from savl.images.read import read_image
from savl.images.write import write_image

ROOT = Path(__file__).resolve().parents[2]

Write = Callable[..., Path]


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["degrade", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), "a traceback reached the user"
    return result


def message(result: Result) -> str:
    return " ".join(result.stderr.replace("│", " ").split())


def files(folder: str = ".") -> list[str]:
    return sorted(path.as_posix() for path in Path(folder).rglob("*") if path.is_file())


def pixels(path: str) -> NDArray[Any]:
    return read_image(path).pixels


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes pictures, all with the same noise, into a folder that is the current one."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, shape: tuple[int, ...] = (24, 32, 3), dtype: Any = np.uint8) -> Path:
        random = np.random.default_rng(0)
        return save(name, random.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True))

    return write


def save(name: str, samples: NDArray[Any]) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    image_format = format_of_suffix(path)
    assert image_format is not None
    write_image(path, samples, image_format=image_format, overwrite=True)
    return path


def test_a_picture_becomes_what_the_python_interface_makes_of_it(picture: Write) -> None:
    picture("photo.png")
    result = run("photo.png", "--seed", 7)
    assert result.exit_code == 0, result.stderr
    assert "photo.png -> photo_lr.png 32x24 -> 8x6" in message(result)
    x = torch.from_numpy(pixels("photo.png")).permute(2, 0, 1)[None].float() / 255
    y = Degradation(DegradationConfig())(x, (7, zlib.crc32(b"photo"))).y
    written = pixels("photo_lr.png")
    assert written.dtype == np.uint8
    np.testing.assert_array_equal(written, (255 * y[0]).round().byte().permute(1, 2, 0))
    assert files() == ["photo.png", "photo_lr.png"]


def test_a_result_depends_on_seed_and_name_only(picture: Write) -> None:
    for name in ("in/a.png", "in/b.png", "other/deep/a.webp"):
        picture(name)
    picture("in/c.png", shape=(40, 8, 3))
    Path("other/deep/a.webp").unlink()
    picture("other/deep/a.tiff")
    assert run("in", "-o", "all").exit_code == 0
    assert run("other/deep/a.tiff", "-o", "alone.png").exit_code == 0
    assert run("in/a.png", "-o", "seed.png", "--seed", 1).exit_code == 0
    assert np.array_equal(pixels("all/a.png"), pixels("alone.png"))
    assert not np.array_equal(pixels("all/a.png"), pixels("all/b.png")), "the same content under another name"
    assert not np.array_equal(pixels("all/a.png"), pixels("seed.png"))


def test_folders_keep_their_subfolders_and_results_are_png(picture: Write) -> None:
    for name in ("in/a.jpg", "in/deep/a.png", "in/deep/deeper/c.webp", "in/.cache/d.png"):
        picture(name)
    result = run("in", "-r", "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert files("out") == ["out/a.png", "out/deep/a.png", "out/deep/deeper/c.png"]
    assert message(result).endswith("3 degraded")


def test_globs_are_expanded(picture: Write) -> None:
    for name in ("a.png", "b.png", "c.jpg"):
        picture(name)
    assert run("*.png", "-o", "out").exit_code == 0
    assert files("out") == ["out/a.png", "out/b.png"]


@pytest.mark.parametrize("ending", ["png", "webp", "tiff"])
def test_all_formats_hold_the_same_samples(picture: Write, ending: str) -> None:
    picture("a.png")
    assert run("a.png", "-o", "out/a.png").exit_code == 0
    assert run("a.png", "-o", f"named.{ending}").exit_code == 0
    assert run("a.png", "-o", "folder", "-f", ending).exit_code == 0
    for name in (f"named.{ending}", f"folder/a.{ending}"):
        assert read_image(name).format.name == ending
        np.testing.assert_array_equal(pixels(name), pixels("out/a.png"))


def test_existing_outputs_are_kept(picture: Write) -> None:
    picture("in/a.png")
    assert run("in").exit_code == 0
    before = Path("in/a_lr.png").read_bytes()
    picture("in/b.png")
    result = run("in", "--seed", 3)
    assert result.exit_code == 0
    assert "1 degraded, 1 kept" in message(result)
    assert "skipped 1 result of an earlier run, in/a_lr.png; use --include-results to process it" in message(result)
    assert Path("in/a_lr.png").read_bytes() == before
    assert run("in", "--seed", 3, "--overwrite").exit_code == 0
    assert Path("in/a_lr.png").read_bytes() != before
    assert files() == ["in/a.png", "in/a_lr.png", "in/b.png", "in/b_lr.png"]


def test_a_named_output_that_exists_is_an_error_unless_it_is_to_be_replaced(picture: Write) -> None:
    picture("a.png")
    assert run("a.png", "-o", "out.png").exit_code == 0
    before = Path("out.png").read_bytes()
    result = run("a.png", "-o", "out.png", "--seed", 3)
    assert result.exit_code == 2
    assert "-o out.png exists already; --overwrite replaces it" in message(result)
    assert Path("out.png").read_bytes() == before
    assert run("a.png", "-o", "out.png", "--seed", 3, "--overwrite").exit_code == 0
    assert Path("out.png").read_bytes() != before


@pytest.mark.parametrize(("suffix", "name"), [("small", "a_small.png"), ("-s", "a-s.png"), ("", "a.png")])
def test_a_suffix_can_be_given(picture: Write, suffix: str, name: str) -> None:
    picture("a.png")
    assert run("a.png", "-o", "out", "--suffix", suffix).exit_code == 0
    assert files("out") == [f"out/{name}"]


@pytest.mark.parametrize(
    ("shape", "scale", "size", "cut"),
    [((25, 35), 4, (6, 8), "32x24"), ((24, 33), 4, (6, 8), "32x24"), ((24, 32), 3, (8, 10), "30x24")],
)
def test_pixels_beyond_a_multiple_of_the_scale_are_cropped_with_a_note(
    picture: Write, shape: tuple[int, int], scale: int, size: tuple[int, int], cut: str
) -> None:
    whole = pixels(str(picture("a.png", shape=(*shape, 3))))
    result = run("a.png", "-o", "out.png", "--scale", scale)
    assert result.exit_code == 0
    assert f"a.png: cut at the right and bottom to {cut}, for scale {scale}" in message(result)
    assert pixels("out.png").shape == (*size, 3)
    save("a.png", whole[: size[0] * scale, : size[1] * scale])
    again = run("a.png", "-o", "again.png", "--scale", scale)
    assert "cut at" not in message(again)
    np.testing.assert_array_equal(pixels("out.png"), pixels("again.png"))


@pytest.mark.parametrize("bands", [1, 2, 4])
def test_gray_and_transparent_pictures_become_rgb(picture: Write, bands: int) -> None:
    picture("a.png", shape=(24, 32, bands))
    result = run("a.png", "-o", "out.png")
    assert result.exit_code == 0
    assert pixels("out.png").shape == (6, 8, 3)
    assert ("the transparency was dropped" in message(result)) == (bands in (2, 4))


def test_colours_under_transparent_pixels_do_not_show(picture: Write) -> None:
    shades = np.full((32, 32, 4), 90, np.uint8)
    shades[..., 3] = 255
    for name, hidden in (("black/a.png", 0), ("white/a.png", 255)):
        shades[:, 16:, :3], shades[:, 16:, 3] = hidden, 0
        save(name, shades)
    assert run("black", "-o", "out1").exit_code == run("white", "-o", "out2").exit_code == 0
    np.testing.assert_array_equal(pixels("out1/a.png"), pixels("out2/a.png"))


def test_16_bits_are_rounded_to_8_with_a_note(picture: Write) -> None:
    picture("a.png", dtype=np.uint16)
    result = run("a.png", "-o", "out.tiff")
    assert result.exit_code == 0
    assert "rounded from 16 bits per sample to 8" in message(result)
    assert pixels("out.tiff").dtype == np.uint8


@pytest.mark.parametrize("space", [b"RGB ", b"GRAY"])
def test_colour_profiles_of_rgb_are_kept_and_others_left_out_with_a_note(picture: Write, space: bytes) -> None:
    picture("a.png")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile[:16] + space + profile[20:]
    Image.new("L" if space == b"GRAY" else "RGB", (16, 16)).save("photo.tif", icc_profile=profile)
    result = run("photo.tif", "-o", "out.png")
    assert result.exit_code == 0
    assert (read_image("out.png").metadata.icc == profile) == (space == b"RGB ")
    assert ("colour profile was left out: it is for GRAY" in message(result)) == (space == b"GRAY")


def test_the_severity_is_drawn_and_written_as_numbers(picture: Write) -> None:
    picture("a.png", shape=(64, 96, 3))
    result = run("a.png", "-o", "out/", "--spatial", "--severity-map")
    assert result.exit_code == 0
    assert files("out") == ["out/a.png", "out/a_severity.npy", "out/a_severity.png"]
    assert "everywhere" not in message(result)
    severity = np.load("out/a_severity.npy")
    x = torch.from_numpy(pixels("a.png")).permute(2, 0, 1)[None].float() / 255
    config = DegradationConfig(spatial=SpatialConfig(probability=1.0))
    expected = Degradation(config)(x, (0, zlib.crc32(b"a"))).degradation_mask[0]
    assert severity.dtype == np.float32
    np.testing.assert_array_equal(severity, expected)
    drawn = pixels("out/a_severity.png").astype(int)
    factor = round(512 / 24)
    assert drawn.shape[2] == 3
    # Viridis: the most degraded pixel is the one with the most red and green and the least blue.
    yellow = drawn[12:, 12:][: 16 * factor : factor, : 24 * factor : factor]
    score = yellow[..., 0] + yellow[..., 1] - yellow[..., 2]
    place = np.unravel_index(score.argmax(), score.shape)
    assert severity[place] > severity.max() - 0.02


def test_a_uniform_mask_is_reported(picture: Write) -> None:
    picture("a.png")
    result = run("a.png", "-o", "out/", "--severity-map")
    assert "the severity map is 1 everywhere: nothing varies within the image" in message(result)
    assert (np.load("out/a_severity.npy") == 1).all()


@pytest.mark.parametrize("missing", ["a.png", "a_severity.npy", "a_severity.png"])
def test_a_picture_and_its_severity_are_never_from_two_draws(picture: Write, missing: str) -> None:
    picture("a.png", shape=(48, 48, 3))
    arguments = ("a.png", "-o", "out/", "--spatial", "--severity-map")
    assert run(*arguments).exit_code == 0
    assert "kept out/a.png" in message(run(*arguments))
    Path("out", missing).unlink()
    left = files("out")
    result = run(*arguments, "--seed", 1)
    assert result.exit_code == 1
    assert f"exists already without {missing}, which belongs to it; --overwrite writes both" in message(result)
    assert files("out") == left
    assert run(*arguments, "--seed", 1, "--overwrite").exit_code == 0
    assert len(files("out")) == 3


def test_of_two_pictures_of_one_name_the_first_is_done(picture: Write) -> None:
    for name in ("in/a.png", "in/b.png", "more/a.png"):
        picture(name)
    result = run("in", "more", "-o", "out", "--severity-map")
    assert result.exit_code == 1
    assert "more/a.png: would be written to out/a.png, as in/a.png is" in message(result)
    maps = ["a_severity.npy", "a_severity.png", "b_severity.npy", "b_severity.png"]
    assert files("out") == sorted(f"out/{name}" for name in [*maps, "a.png", "b.png"])


def test_settings_come_from_a_file_which_may_be_a_training_configuration(picture: Write) -> None:
    picture("a.png")
    Path("none.toml").write_text(
        "[model]\nname = 'unknown'\n[run]\nseed = 'x'\n[degradation]\nstrength = [0, 0]\n"
        "[degradation.first.resize]\nup = 0\ndown = 0\nkeep = 1\n"
        "[degradation.second.resize]\nup = 0\ndown = 0\nkeep = 1\n"
    )
    assert run("a.png", "-o", "out.png", "--config", "none.toml").exit_code == 0
    x = torch.from_numpy(pixels("a.png")).permute(2, 0, 1)[None].float()
    resized = [torch.nn.functional.interpolate(x, size=(6, 8), mode=mode) for mode in ("area", "bilinear", "bicubic")]
    written = torch.from_numpy(pixels("out.png")).permute(2, 0, 1)[None]
    assert min((written - each.clamp(0, 255)).abs().max().item() for each in resized) <= 0.501
    assert run("a.png", "-o", "from.png", "--config", ROOT / "configs/savl_tiny.toml").exit_code == 0


def test_a_camera_is_applied_if_the_file_asks_for_it(picture: Write) -> None:
    picture("a.png")
    Path("camera.toml").write_text("[degradation.camera]\nprobability = 1.0\n")
    assert run("a.png", "-o", "out.png", "--config", "camera.toml").exit_code == 0
    x = torch.from_numpy(pixels("a.png")).permute(2, 0, 1)[None].float() / 255
    expected = Degradation(DegradationConfig(camera=CameraConfig(probability=1.0)))(x, (0, zlib.crc32(b"a"))).y
    assert torch.equal(torch.from_numpy(pixels("out.png")).permute(2, 0, 1)[None], (expected * 255).round().byte())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "--config mine.toml: no such file or directory"),
        ("[degradation", "--config mine.toml: Expected"),
        ("[degradations]", "--config mine.toml: unknown tables ['degradations']; [degradation] is read"),
        ("degradation = 3", "mine.toml: [degradation] must be a table of settings, got 3"),
        ("[degradation]\nnoise = 1", "mine.toml: [degradation] has unknown settings ['noise']"),
        ("[degradation.first.blur]\nsigma = [3, 2]", "[degradation.first.blur]: blur.sigma must be (low, high)"),
        ("[degradation.first.jpeg]\nquality = 5", "[degradation.first.jpeg]: jpeg.quality must be a tuple of float"),
    ],
)
def test_mistakes_in_the_settings_are_reported_with_the_file(picture: Write, text: str | None, words: str) -> None:
    picture("a.png")
    if text is not None:
        Path("mine.toml").write_text(text)
    result = run("a.png", "--config", "mine.toml")
    assert result.exit_code == 2
    assert words in message(result)
    assert not Path("a_lr.png").exists()


def test_unreadable_files_are_named_skipped_and_make_the_exit_code_1(picture: Write) -> None:
    for name in ("in/a.png", "in/z.png"):
        picture(name)
    Path("in/broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    picture("in/small.png", shape=(3, 9, 3))
    result = run("in", "missing.png", "-o", "out")
    assert result.exit_code == 1
    assert files("out") == ["out/a.png", "out/z.png"]
    assert "in/broken.jpg: truncated or corrupt JPEG" in message(result)
    assert "in/small.png: measures 9x3 pixels; scale 4 needs 4 on both sides" in message(result)
    assert "missing.png: no such file" in message(result)
    assert message(result).endswith("2 degraded, 3 failed")
    assert "not degraded" in message(result), "the title of the table"


@pytest.mark.parametrize("name", ["_severity.npy", "_severity.png", ".png"])
def test_an_output_that_cannot_be_written_is_reported_before_the_work(
    picture: Write, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    picture("a.png")
    Path(f"out/a{name}").mkdir(parents=True)
    monkeypatch.setattr(Degradation, "__call__", lambda *_: pytest.fail("the pipeline ran"))
    result = run("a.png", "-o", "out", "--severity-map")
    assert result.exit_code == 1
    assert f"out/a{name}: cannot be written: exists and is not a regular file" in message(result)
    assert files("out") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing argument"),
        ([""], "IN number 1 is an empty string"),
        (["a.png", "-o", ""], "-o is an empty string"),
        (["a.png", "--scale", "0"], "--scale"),
        (["a.png", "--seed", "-1"], "--seed"),
        (["a.png", "--format", "jpg"], "--format"),
        (["a.png", "-o", "out.jpg"], "-o out.jpg: JPEG would compress the result once more"),
        (["a.png", "-o", "out.bmp"], ".bmp is not a format that savl writes"),
        (["a.png", "-o", "out.png", "--format", "webp"], "contradict"),
        (["a.png", "b.png", "-o", "out.png"], "name a folder"),
        (["*.jpg"], f"no {READABLE} image matches"),
        (["void"], "use -r to search its subfolders"),
        (["a.png", "-o", "a.png"], "a.png would be written over itself"),
        (["a.png", "--suffix", "x/y"], "--suffix must not contain a slash or backslash, got x/y"),
    ],
)
def test_usage_errors_have_exit_code_2_and_write_nothing(picture: Write, arguments: list[str], words: str) -> None:
    picture("a.png")
    picture("b.png")
    Path("void").mkdir()
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in message(result)
    assert files() == ["a.png", "b.png"]


def test_without_kornia_the_command_to_install_it_is_printed(picture: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    picture("a.png")
    monkeypatch.setitem(sys.modules, "kornia.enhance", None)
    result = run("a.png")
    assert result.exit_code == 2
    assert "pip install 'savl[train]'" in message(result)
    assert files() == ["a.png"]


def test_an_unexpected_error_fails_only_its_file(picture: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png"):
        picture(name)
    degrade = Degradation.__call__

    def exhausted(self: Degradation, x: torch.Tensor, seed: Any) -> Any:
        if seed[1] == zlib.crc32(b"a"):
            raise MemoryError("out of memory")
        return degrade(self, x, seed)

    monkeypatch.setattr(Degradation, "__call__", exhausted)
    result = run("a.png", "b.png", "-o", "out/")
    assert result.exit_code == 1
    assert "a.png: out of memory; free some" in message(result)
    assert files("out") == ["out/b.png"]


def test_ctrl_c_leaves_nothing_behind(picture: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    picture("a.png")
    monkeypatch.setattr(Degradation, "__call__", interrupt)
    result = run("a.png", "-o", "out/", "--severity-map")
    assert result.exit_code == 130
    assert "interrupted: 0 of 1 degraded, no partial output left" in message(result)
    assert files() == ["a.png"]


def test_help_names_every_option() -> None:
    text = run("--help").stdout
    options = "output recursive seed config scale spatial severity-map format suffix overwrite"
    for option in options.split():
        assert f"--{option}" in text


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_picture_that_cannot_be_written_leaves_no_map_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: list[str]
) -> None:
    from savl.degradation import degrade_file

    def full(path: Any, *arguments: Any, mark: str, **options: Any) -> None:
        if mark == "degraded":
            raise UnwritableImage(path, "cannot be written: No space left on device")
        write_image(path, *arguments, mark=mark, **options)

    monkeypatch.chdir(tmp_path)
    write_image("a.png", np.full((16, 16, 3), 90, np.uint8), image_format=PNG)
    with monkeypatch.context() as patched:
        patched.setattr(degrade_file, "write_image", full)
        done = CliRunner().invoke(app, ["degrade", "a.png", "-o", "out/a.png", "--severity-map", *overwrite])
        assert done.exit_code == 1
        assert "No space left on device" in done.stderr
    assert list(Path("out").glob("*")) == []
    done = CliRunner().invoke(app, ["degrade", "a.png", "-o", "out/a.png", "--severity-map"])
    assert done.exit_code == 0, "nothing is in the way of another run"
    assert sorted(os.listdir("out")) == ["a.png", "a_severity.npy", "a_severity.png"]
