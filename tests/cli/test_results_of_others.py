"""An existing file that was made from another image is not kept as a result."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from savl.images.read import read_image
from savl.images.result_mark import read_origin

Run = Callable[..., Any]
Write = Callable[..., Path]


def save(name: str, *values: int) -> None:
    """Write a picture, or an animation with one frame per value, by Pillow."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    frames = [Image.fromarray(np.full((6, 8, 3), value, np.uint8)) for value in values]
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:]} if frames[1:] else {}
    frames[0].save(name, **options)


def value_of(name: str) -> int:
    return round(float(read_image(name).pixels[..., :3].mean()))


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_result_of_an_image_with_the_same_stem_gets_its_extension(savl: Run) -> None:
    save("a.gif", 40)
    save("a.bmp", 90)
    assert savl("upscale", "a.gif").code == 0
    for words in ("a.bmp -> a.bmp_x4.png", "a.bmp: kept a.bmp_x4.png"):
        done = savl("upscale", "a.bmp", "--severity-map")
        assert done.code == 0
        assert words in done.text
    assert (value_of("a_x4.png"), value_of("a.bmp_x4.png")) == (40, 90)
    assert sorted(os.listdir()) == ["a.bmp", "a.bmp_x4.png", "a.bmp_x4_severity.png", "a.gif", "a_x4.png"]


def test_pages_of_two_animations_have_separate_results(savl: Run) -> None:
    save("a.gif", 40, 50)
    save("a.webp", 70, 80)
    for name in ("a.gif", "a.webp"):
        assert savl("upscale", name, "--page", "2", "-f", "png").code == 0
    assert (value_of("a_p2_x4.png"), value_of("a.webp_p2_x4.png")) == (50, 80)


@pytest.mark.parametrize("command", ["upscale", "degrade"])
def test_another_page_under_the_same_name_fails(savl: Run, command: str) -> None:
    save("a.tif", 40, 50)
    assert savl(command, "a.tif", "--page", "2", "--suffix", "k", "-f", "tiff").code == 0
    assert savl(command, "a.tif", "--page", "2", "--suffix", "k", "-f", "tiff").code == 0, "kept"
    done = savl(command, "a.tif", "--suffix", "k", "-f", "tiff")
    assert done.code == 1
    assert "a.tif: a_k.tif exists already and was made from another image, page" in done.text


@pytest.mark.parametrize("command", ["upscale", "degrade"])
def test_the_same_name_in_another_folder_fails_unless_it_is_the_same_picture(savl: Run, command: str) -> None:
    save("one/a.png", 40)
    save("two/a.png", 90)
    assert savl(command, "one", "-o", "out").code == 0
    before = Path("out/a.png").read_bytes()
    done = savl(command, "two", "-o", "out")
    assert done.code == 1
    assert "two/a.png: out/a.png exists already and was made from another image" in done.text
    assert Path("out/a.png").read_bytes() == before
    os.rename("one", "moved")
    done = savl(command, "moved", "-o", "out", *(["--seed", "5"] if command == "degrade" else ["--scale", "2"]))
    assert done.code == 0, "the same image in another place, with other settings"
    assert "kept out/a.png" in done.text
    assert savl(command, "two", "-o", "out", "--overwrite").code == 0
    assert savl(command, "two", "-o", "out").code == 0, "now it is its own"


@pytest.mark.parametrize(("command", "mark"), [("upscale", "x4"), ("degrade", "lr")])
def test_a_picture_that_is_added_later_is_reported(savl: Run, command: str, mark: str) -> None:
    save("in/a.jpg", 40)
    assert savl(command, "in", "-f", "png").code == 0
    save("in/a.png", 90)
    done = savl(command, "in", "-f", "png")
    assert done.code == 1
    assert f"in/a.png: in/a_{mark}.png exists already and was made from another image" in done.text
    assert os.path.exists(f"in/a.jpg_{mark}.png")


def test_results_without_a_digest_of_their_source_are_kept(savl: Run, picture: Write) -> None:
    picture("a.png")
    picture("a_x4.png", value=7)
    done = savl("upscale", "a.png")
    assert done.code == 0
    assert "kept a_x4.png" in done.text


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp", "tiff"])
def test_every_format_stores_the_same_digest_and_no_name(savl: Run, image_format: str) -> None:
    save("secret.png", 40)
    os.mkdir("other")
    assert savl("upscale", "secret.png", "-f", image_format, "--suffix", "r", "--severity-map").code == 0
    os.rename("secret.png", "other/name.png")
    assert savl("upscale", "other/name.png", "-o", "n.png").code == 0
    result = next(Path().glob("secret_r.*"))
    origin = read_origin(result)
    assert origin is not None
    assert len(origin) == 8
    assert origin == read_origin("n.png") == read_origin("secret_r_severity.png")
    assert b"secret" not in result.read_bytes()


def overtake(monkeypatch: pytest.MonkeyPatch, output: str, source: str) -> None:
    """Let another process write an output from a source image while the network is loaded."""
    from savl.images.format import PNG
    from savl.images.result_mark import UPSCALED, digest_origin
    from savl.images.write import write_image
    from savl.inference import upscale_image
    from tests.cli.conftest import FakeUpscaler

    def load(model: str, **settings: Any) -> FakeUpscaler:
        Path(output).parent.mkdir(exist_ok=True)
        pixels = np.full((6, 8, 3), 7, np.uint8)
        write_image(output, pixels, image_format=PNG, mark=UPSCALED, origin=digest_origin(source), overwrite=True)
        return FakeUpscaler()

    monkeypatch.setattr(upscale_image, "as_upscaler", load)


def test_an_output_file_that_another_process_wrote_is_an_error(savl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save("a.png", 40)
    overtake(monkeypatch, "x.png", "a.png")
    done = savl("upscale", "a.png", "-o", "x.png")
    assert done.code == 1
    assert "x.png exists already: another process has just written it (--overwrite replaces it)" in done.text
    assert value_of("x.png") == 7


def test_overwrite_replaces_an_output_file_that_another_process_wrote(
    savl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("a.png", 40)
    overtake(monkeypatch, "x.png", "a.png")
    assert savl("upscale", "a.png", "-o", "x.png", "--overwrite").code == 0
    assert value_of("x.png") == 40


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_result_that_another_process_made_from_another_image_is_an_error(
    savl: Run, monkeypatch: pytest.MonkeyPatch, overwrite: list[str]
) -> None:
    save("a/1.png", 40)
    save("b/1.png", 90)
    overtake(monkeypatch, "out/1.png", "b/1.png")
    done = savl("upscale", "a", "-o", "out", *overwrite)
    assert done.code == 1
    assert "from another image" in done.text
    assert value_of("out/1.png") == 7
