"""The command line reports what a format cannot store in one line per file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin

Run = Callable[..., Any]


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pixels = Image.fromarray(np.full((8, 12, 3), 90, np.uint8))
    texts = PngImagePlugin.PngInfo()
    for keyword, text in {"Copyright": "Ada", "workflow": "{}", "prompt": "{}"}.items():
        texts.add_text(keyword, text)
    pixels.save("texts.png", pnginfo=texts)
    places = TiffImagePlugin.ImageFileDirectory_v2()
    places.tagtype.update({33550: 12, 33922: 12})
    places[33550], places[33922] = (1.0, 1.0, 0.0), (0.0, 0.0, 0.0, 4e5, 5e6, 0.0)
    pixels.save("places.tif", tiffinfo=places)
    pixels.save("plain.png")


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "left out" in line]


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("command", ["upscale", "degrade"])
def test_lost_metadata_is_one_line_per_file(savl: Run, command: str) -> None:
    done = savl(command, "texts.png", "places.tif", "plain.png", "-o", "out", "-f", "webp")
    assert done.code == 0, done.text
    assert sorted(line.split(": ", 1)[1] for line in lines(done.text)) == [
        "left out: the PNG texts workflow, prompt",
        "left out: the georeference (GeoTIFF)",
    ]
    assert b"Ada" in Path("out/texts.webp").read_bytes()


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(("command", "factor"), [("upscale", 0.25), ("degrade", 4.0)])
def test_metadata_that_stays_correct_is_kept_without_a_line(savl: Run, command: str, factor: float) -> None:
    done = savl(command, "texts.png", "places.tif", "plain.png", "-o", "out", "-f", "tiff")
    assert done.code == 0, done.text
    assert [line.split(": ", 1)[1] for line in lines(done.text)] == ["left out: the PNG texts workflow, prompt"]
    (out,) = Path("out").glob("places.tif*")
    assert Image.open(out).tag_v2[33550] == (factor, factor, 0.0)
