"""Tests of the command `savl upscale`: inputs, outputs, their names, exit codes and messages."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from savl.images.format import READABLE
from savl.images.read import read_image
from savl.images.result_mark import read_mark
from savl.inference.upscale_file import IN_BFLOAT16

Run = Callable[..., Any]
Write = Callable[..., Path]


def files(folder: str = ".") -> list[str]:
    return sorted(path.as_posix() for path in Path(folder).rglob("*") if path.is_file())


def size_of(path: str) -> tuple[int, int]:
    height, width, _ = read_image(path).pixels.shape
    return width, height


def test_an_input_file_is_upscaled_to_the_named_output_file(savl: Run, picture: Write) -> None:
    picture("photo.jpg")
    done = savl("upscale", "photo.jpg", "-o", "out.png")
    assert done.code == 0
    assert size_of("out.png") == (32, 24)
    assert "photo.jpg -> out.png  8x6 -> 32x24" in done.text
    assert files() == ["out.png", "photo.jpg"]


def test_without_an_output_the_result_is_written_beside_the_input(savl: Run, picture: Write) -> None:
    picture("a/photo.JPG")
    picture("a/scan.tif", dtype=np.uint16)
    assert savl("upscale", "a/photo.JPG", "a/scan.tif").code == 0
    assert files() == ["a/photo.JPG", "a/photo_x4.JPG", "a/scan.tif", "a/scan_x4.tif"]
    assert read_image("a/scan_x4.tif").pixels.dtype == np.uint16


def test_the_default_suffix_contains_the_requested_scale(savl: Run, picture: Write) -> None:
    picture("photo.png")
    assert savl("upscale", "photo.png", "--scale", "2.5").code == 0
    assert size_of("photo_x2.5.png") == (20, 15)


@pytest.mark.parametrize(("scale", "size"), [("1", (8, 6)), ("3", (24, 18)), ("0.37", (3, 2)), ("7.3", (58, 44))])
def test_the_output_size_is_rounded_for_any_scale(savl: Run, picture: Write, scale: str, size: tuple[int, int]) -> None:
    picture("photo.png")
    assert savl("upscale", "photo.png", "-o", "out.png", "-s", scale).code == 0
    assert size_of("out.png") == size


def test_a_single_pixel_is_upscaled(savl: Run, picture: Write) -> None:
    picture("dot.png", value=255, shape=(1, 1, 1))
    assert savl("upscale", "dot.png", "-o", "out.png").code == 0
    assert (read_image("out.png").pixels == np.full((4, 4, 1), 255)).all()


@pytest.mark.parametrize("output", ["results", "results/", "results.d/"])
def test_an_output_without_an_image_ending_is_a_folder(savl: Run, picture: Write, output: str) -> None:
    picture("photo.jpg")
    assert savl("upscale", "photo.jpg", "-o", output).code == 0
    assert files(output) == [f"{output.rstrip('/')}/photo.jpg"]


def test_without_recursion_only_visible_images_directly_in_the_folder_are_upscaled(savl: Run, picture: Write) -> None:
    for name in ("in/a.png", "in/b.webp", "in/deep/c.png", "in/.hidden.png"):
        picture(name)
    Path("in/notes.txt").write_text("no image")
    assert savl("upscale", "in", "-o", "out").code == 0
    assert files("out") == ["out/a.png", "out/b.webp"]


def test_recursion_keeps_the_subfolders(savl: Run, picture: Write) -> None:
    for name in ("in/a.png", "in/deep/a.png", "in/deep/deeper/c.jpg", "in/.cache/d.png"):
        picture(name)
    assert savl("upscale", "in", "-r", "-o", "out").code == 0
    assert files("out") == ["out/a.png", "out/deep/a.png", "out/deep/deeper/c.jpg"]


def test_an_output_folder_inside_the_input_folder_is_not_upscaled_again(savl: Run, picture: Write) -> None:
    picture("in/a.png")
    for _ in range(2):
        assert savl("upscale", "in", "-r", "-o", "in/large").code == 0
    assert files() == ["in/a.png", "in/large/a.png"]


def test_quoted_globs_are_expanded(savl: Run, picture: Write) -> None:
    for name in ("a.png", "b.png", "c.jpg", "deep/d.png"):
        picture(name)
    assert savl("upscale", "**/*.png", "-o", "all", "-f", "webp").code == 0
    assert files("all") == ["all/a.webp", "all/b.webp", "all/d.webp"]
    assert savl("upscale", "*.png", "-o", "out").code == 0
    assert files("out") == ["out/a.png", "out/b.png"]


def test_a_file_whose_name_looks_like_a_glob_is_taken_literally(savl: Run, picture: Write) -> None:
    picture("a[1].png")
    picture("a1.png")
    done = savl("upscale", "a[1].png", "-o", "out.png")
    assert done.code == 0
    assert "a[1].png -> out.png" in done.text


@pytest.mark.parametrize(
    ("suffix", "name"),
    [("out", "photo_out.png"), ("_big", "photo_big.png"), ("-hd", "photo-hd.png"), ("", "photo.png")],
)
def test_a_suffix_is_joined_to_the_name_as_real_esrgan_does(savl: Run, picture: Write, suffix: str, name: str) -> None:
    picture("photo.png")
    assert savl("upscale", "photo.png", "-o", "out", "--suffix", suffix).code == 0
    assert files("out") == [f"out/{name}"]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff"])
def test_the_format_can_be_chosen(savl: Run, picture: Write, ending: str) -> None:
    picture("photo.png", dtype=np.uint16, value=40000)
    done = savl("upscale", "photo.png", "-o", "out", "-f", ending)
    assert done.code == 0
    out = read_image(f"out/photo.{ending}")
    assert out.format.name == ending
    assert out.pixels.dtype == (np.uint16 if ending in ("png", "tiff") else np.uint8)
    assert ("8 bits per sample" in done.text) == (ending in ("jpg", "webp"))


def test_transparency_is_flattened_onto_white_for_jpeg_with_a_note(savl: Run, picture: Write) -> None:
    picture("clear.png", value=0, shape=(8, 8, 4))
    done = savl("upscale", "clear.png", "-o", "out.jpg")
    assert done.code == 0
    assert "no transparency: flattened onto white" in done.text
    assert (read_image("out.jpg").pixels == 255).all()


def test_a_lower_quality_gives_a_smaller_file(savl: Run, tmp_path: Path, picture: Write) -> None:
    from savl.images.format import PNG
    from savl.images.write import write_image

    picture("dot.png")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    write_image("photo.png", noise, image_format=PNG)
    for quality in (10, 95):
        assert savl("upscale", "photo.png", "-o", f"q{quality}.jpg", "-q", quality).code == 0
    assert Path("q10.jpg").stat().st_size * 3 < Path("q95.jpg").stat().st_size


def test_existing_outputs_are_kept_with_exit_code_0(savl: Run, picture: Write) -> None:
    picture("a.png")
    Path("out").mkdir()
    Path("out/a.png").write_bytes(b"old")
    done = savl("upscale", "a.png", "-o", "out")
    assert done.code == 0
    assert "kept out/a.png" in done.text
    assert Path("out/a.png").read_bytes() == b"old"
    assert savl("upscale", "a.png", "-o", "out", "--overwrite").code == 0
    assert size_of("out/a.png") == (32, 24)


@pytest.mark.parametrize("arguments", [[], ["--scale", "2"], ["--severity-map"]])
def test_an_existing_output_file_is_an_error_without_overwrite(savl: Run, picture: Write, arguments: list[str]) -> None:
    picture("a.png")
    Path("out.png").write_bytes(b"old")
    done = savl("upscale", "a.png", "-o", "out.png", *arguments)
    assert done.code == 2
    assert "-o out.png exists already; --overwrite replaces it" in done.text
    assert Path("out.png").read_bytes() == b"old"
    assert savl("upscale", "a.png", "-o", "out.png", "--overwrite", *arguments).code == 0
    assert size_of("out.png") == ((16, 12) if "--scale" in arguments else (32, 24))


def test_a_second_run_processes_only_files_without_a_result(savl: Run, picture: Write) -> None:
    picture("in/a.png")
    assert savl("upscale", "in").code == 0
    picture("in/b.png")
    done = savl("upscale", "in")
    assert done.code == 0
    assert "1 upscaled, 1 kept" in done.text
    assert files() == ["in/a.png", "in/a_x4.png", "in/b.png", "in/b_x4.png"], "results must not be upscaled again"


@pytest.mark.parametrize("kind", ["severity", "strength"])
def test_a_map_is_written_beside_the_result(savl: Run, picture: Write, kind: str) -> None:
    picture("photo.jpg")
    assert savl("upscale", "photo.jpg", "-o", "out/large.png", f"--{kind}-map").code == 0
    assert files("out") == ["out/large.png", f"out/large_{kind}.png"]
    assert read_mark(f"out/large_{kind}.png") == f"{kind} map"
    drawn = read_image(f"out/large_{kind}.png").pixels
    assert drawn.shape[2] == 3
    dark, bright = drawn[100, 13].astype(int), drawn[100, 12 + 511].astype(int)
    assert dark[2] > dark[1], "the lowest value of the colour bar must be violet"
    assert bright[1] > bright[2] + 100, "the highest value of the colour bar must be yellow"


def test_inputs_that_differ_only_in_format_get_distinct_maps(savl: Run, picture: Write) -> None:
    for name in ("in/a.png", "in/a.jpg", "in/b.png"):
        picture(name)
    assert savl("upscale", "in", "-o", "out", "--severity-map", "--strength-map").code == 0
    kinds = ("severity", "strength")
    maps = [f"out/{name}_{kind}.png" for name in ("a.jpg", "a.png", "b") for kind in kinds]
    assert files("out") == sorted([*maps, "out/a.jpg", "out/a.png", "out/b.png"])


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("space", [b"RGB ", b"GRAY", b"CMYK"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_only_colour_profiles_that_do_not_fit_are_reported(
    savl: Run, picture: Write, mode: str, space: bytes, ending: str
) -> None:
    picture("dot.png")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile[:16] + space + profile[20:]
    Image.new(mode, (8, 8)).save("photo.tif", icc_profile=profile)
    done = savl("upscale", "photo.tif", "-o", f"out.{ending}")
    assert done.code == 0
    stored = "gray" if mode == "L" and ending != "webp" else "RGB"
    reported = re.search(r"colour profile was left out: it is for (\w+), and \w+ stores this as (\w+)", done.text)
    if read_image(f"out.{ending}").metadata.icc is None:
        assert reported is not None
        assert reported.groups() == (space.decode().strip(), stored)
    else:
        assert reported is None


def test_only_a_missing_map_is_written(savl: Run, picture: Write) -> None:
    picture("photo.png")
    assert savl("upscale", "photo.png").code == 0
    before = Path("photo_x4.png").read_bytes()
    assert savl("upscale", "photo.png", "--strength-map").code == 0
    drawn = Path("photo_x4_strength.png").read_bytes()
    assert not Path("photo_x4_severity.png").exists()
    assert savl("upscale", "photo.png", "--severity-map", "--strength-map").code == 0
    assert Path("photo_x4_severity.png").exists()
    assert read_mark("photo_x4_severity.png") == "severity map"
    assert (Path("photo_x4.png").read_bytes(), Path("photo_x4_strength.png").read_bytes()) == (before, drawn)
    assert "kept" in savl("upscale", "photo.png", "--severity-map", "--strength-map").text


@pytest.mark.parametrize(
    ("arguments", "strength"),
    [([], "auto"), (["auto"], "auto"), (["0"], 0.0), (["1"], 1.0), (["0.25"], 0.25), (["1e-3"], 0.001)],
)
def test_the_strength_reaches_the_upscaler(
    savl: Run, picture: Write, monkeypatch: pytest.MonkeyPatch, arguments: list[str], strength: object
) -> None:
    from savl.inference import upscale_image
    from tests.cli.conftest import FakeUpscaler

    seen = []
    monkeypatch.setattr(upscale_image, "as_upscaler", lambda model, **given: seen.append(given) or FakeUpscaler())
    picture("a.png")
    assert savl("upscale", "a.png", *(f"--strength={text}" for text in arguments)).code == 0
    assert [given["strength"] for given in seen] == [strength]


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [((), None), (("auto",), None), (("float32",), torch.float32), (("bfloat16",), torch.bfloat16)],
)
def test_the_dtype_reaches_the_upscaler(
    savl: Run, picture: Write, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], dtype: torch.dtype | None
) -> None:
    from savl.inference import upscale_image
    from tests.cli.conftest import FakeUpscaler

    seen = []
    monkeypatch.setattr(upscale_image, "as_upscaler", lambda model, **given: seen.append(given) or FakeUpscaler())
    picture("a.png")
    assert savl("upscale", "a.png", *(f"--dtype={text}" for text in arguments)).code == 0
    assert [given["dtype"] for given in seen] == [dtype]


@pytest.mark.parametrize(("deep", "options", "times"), [(False, (), 1), (True, (), 0), (True, ("-f", "webp"), 1)])
def test_one_line_says_that_eight_bit_results_are_computed_in_bfloat16(
    savl: Run, picture: Write, monkeypatch: pytest.MonkeyPatch, deep: bool, options: tuple[str, ...], times: int
) -> None:
    from savl.inference import upscale_image
    from savl.inference.enlarge import ByBitDepth
    from tests.cli.conftest import FakeUpscaler

    both = ByBitDepth(eight_bit=FakeUpscaler(), other=FakeUpscaler())
    monkeypatch.setattr(upscale_image, "as_upscaler", lambda model, **given: both)
    for name in ("a.png", "b.png"):
        picture(name, dtype=np.uint16 if deep else np.uint8)
    done = savl("upscale", "a.png", "b.png", *options)
    assert done.code == 0
    assert [line for line in done.text.splitlines() if "bfloat16" in line] == [IN_BFLOAT16] * times
    assert "--dtype float32" in IN_BFLOAT16


@pytest.mark.parametrize(
    ("text", "got"), [("1.5", "1.5"), ("-0.1", "-0.1"), ("nan", "nan"), ("strong", "'strong'"), ("", "''")]
)
def test_a_bad_strength_is_a_usage_error(savl: Run, picture: Write, text: str, got: str) -> None:
    picture("a.png")
    done = savl("upscale", "a.png", f"--strength={text}")
    assert done.code == 2
    text = re.sub(r"[\s│]+", " ", done.text)
    assert f"--strength: strength must be 'auto' or a number from 0 to 1, got {got}" in text
    assert files() == ["a.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument"),
        ([""], "IN number 1 is an empty string"),
        (["a.png", ""], "IN number 2 is an empty string"),
        (["a.png", "-o", ""], "-o is an empty string"),
        (["a.png", "--suffix", "a/b"], "--suffix must not contain a slash or backslash, got a/b"),
        (["a.png", "--suffix", "/../../y"], "must not contain a slash"),
        (["a.png", "-o", "out", "--suffix", "a\\b"], "must not contain a slash"),
        (["a.png", "--dtype", "float16"], "overflow in float16"),
        (["a.png", "--dtype", "half"], "dtype must be auto or float32 or bfloat16, got 'half'"),
        (["a.png", "--scale", "0"], "above 0"),
        (["a.png", "--tile", "-1"], "--tile"),
        (["a.png", "--quality", "101"], "--quality"),
        (["a.png", "--format", "bmp"], "--format"),
        (["a.png", "-o", "out.bmp"], ".bmp is not a format that savl writes"),
        (["a.png", "-o", "out.png", "--format", "jpg"], "contradict"),
        (["a.png", "b.png", "-o", "out.png"], "name a folder"),
        ([".", "-o", "out.png"], "name a folder"),
        (["*.jpg"], f"no {READABLE} image matches"),
        (["void"], "use -r to search its subfolders"),
        (["a.png", "-o", "b.png/"], "must be a folder, but it is a file"),
        (["a.png", "b.png", "-o", "plain"], "must be a folder, but it is a file"),
    ],
)
def test_usage_errors_have_exit_code_2_and_write_nothing(
    savl: Run, picture: Write, arguments: list[str], message: str
) -> None:
    picture("a.png")
    picture("b.png")
    Path("void").mkdir()
    Path("plain").write_text("a file")
    done = savl("upscale", *arguments)
    assert done.code == 2
    assert message in re.sub(r"[\s│]+", " ", done.text)
    assert files() == ["a.png", "b.png", "plain"]


def test_a_damaged_model_is_reported_once(picture: Write, capsys: pytest.CaptureFixture[str]) -> None:
    from savl.cli import main

    picture("a.png")
    Path("bad.safetensors").write_bytes(b"damaged")
    with pytest.raises(SystemExit) as stop:
        main(["upscale", "a.png", "--model", "bad.safetensors"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("bad.safetensors") == 1


@pytest.mark.parametrize("arguments", [["--model", "no-such-model"], ["--device", "cuda:99"]])
def test_an_unknown_model_or_device_is_a_usage_error(
    picture: Write, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    from savl.cli import main

    picture("a.png")
    with pytest.raises(SystemExit) as stop:
        main(["upscale", "a.png", *arguments])
    assert stop.value.code == 2
    assert arguments[1] in capsys.readouterr().err
    assert files() == ["a.png"]


def test_a_file_that_cannot_be_upscaled_is_reported_and_has_no_output(
    savl: Run, picture: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from savl.inference import upscale_image

    class Exhausted:
        scale = 4

        def __call__(self, lr: object, **_: object) -> object:
            raise MemoryError("out of memory")

    monkeypatch.setattr(upscale_image, "as_upscaler", lambda model, **settings: Exhausted())
    picture("a.png")
    done = savl("upscale", "a.png", "-o", "out/a.png")
    assert done.code == 1
    assert "a.png: out of memory; free some" in done.text
    assert files() == ["a.png"]


def test_lines_are_not_wrapped_and_file_names_are_not_markup(savl: Run, picture: Write) -> None:
    name = "[red]" + "long-" * 40 + ".png"
    picture(name)
    done = savl("upscale", name, "-o", "out/")
    assert done.code == 0
    assert f"{name} -> out/{name}" in done.text


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["upscale", "--help"]])
def test_help_is_printed(savl: Run, arguments: list[str]) -> None:
    done = savl(*arguments)
    assert done.code == 0
    assert "Usage: savl" in done.text


def test_upscale_help_names_every_option_and_gives_examples(savl: Run) -> None:
    text = savl("upscale", "--help").text
    options = "output model scale tile tile-pad dtype device suffix format quality overwrite recursive severity-map"
    options += " strength strength-map"
    for option in options.split():
        assert f"--{option}" in text
    lines = [line.strip() for line in text.splitlines()]
    first = lines.index("Examples")
    assert all(line.startswith("savl upscale") for line in lines[first + 1 : first + 6])


def test_the_version_is_printed(savl: Run) -> None:
    done = savl("--version")
    assert done.code == 0
    assert re.fullmatch(r"savl \S+\n", done.text)
