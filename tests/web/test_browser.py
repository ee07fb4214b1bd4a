"""The page in headless Chromium: pictures are dropped, compared, downloaded, cancelled."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import savl

pytest.importorskip("gradio", reason="needs savl[web]")
pytest.importorskip("selenium", reason="needs selenium")

from browser import CHROMIUM, DRIVER, Browser, Server, serve  # after the check for its packages
from selenium.webdriver.common.by import By

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver"),
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"),
]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples/teddy.webp"


@pytest.fixture(scope="module")
def server(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("server"), "--model", str(model_file), "--tile", "16", "--device", "cpu") as run:
        yield run


@pytest.fixture(scope="module")
def opened(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"), server.url)
    yield browser
    browser.close()


@pytest.fixture
def browser(opened: Browser, server: Server) -> Browser:
    """The page as it is when it is opened."""
    opened.driver.get(server.url)
    opened.wait(lambda: opened.find("#start"))
    return opened


def crop(path: Path, left: int = 100) -> Path:
    path.parent.mkdir(exist_ok=True)
    with Image.open(EXAMPLE) as image:
        image.crop((left, 120, left + 40, 152)).convert("RGB").save(path)
    return path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A picture of so many tiles that there is time to do something meanwhile."""
    with Image.open(EXAMPLE) as image:
        image.convert("RGB").resize((600, 600)).save(tmp_path / "large.jpg")
    return tmp_path / "large.jpg"


def test_a_dropped_photo_is_upscaled_and_downloaded(
    browser: Browser, server: Server, model_file: Path, tmp_path: Path
) -> None:
    photo = crop(tmp_path / "bear.png")
    browser.drop(photo)
    browser.upscale()
    assert browser.errors() == []
    assert "bear.png: 40 × 32 → 160 × 128 pixels" in browser.said()
    result = np.asarray(Image.open(browser.download("bear_x4.png")))
    assert np.array_equal(result, savl.upscale(photo, model=model_file, tile=16, device="cpu"))
    # Both pictures of the slider have arrived, and the right one becomes the severity map.
    before, after = browser.wait(lambda: browser.slider_images(2))
    browser.click("#overlay input")
    browser.wait(lambda: browser.slider_images(2)[1] != after)
    assert browser.slider_images(2)[0] == before
    assert browser.hosts() == {"127.0.0.1"}


def test_two_pictures_of_one_name_have_two_results(browser: Browser, model_file: Path, tmp_path: Path) -> None:
    photos = crop(tmp_path / "one/same.png"), crop(tmp_path / "two/same.png", left=150)
    browser.drop(*photos)
    browser.upscale()
    for photo, name in zip(photos, ("same_x4.png", "same-2_x4.png"), strict=True):
        result = np.asarray(Image.open(browser.download(name)))
        assert np.array_equal(result, savl.upscale(photo, model=model_file, tile=16, device="cpu"))


def test_a_file_that_is_no_image_gives_one_line(browser: Browser, tmp_path: Path) -> None:
    text = tmp_path / "letter.txt"
    text.write_text("Dear reader")
    browser.drop(text)
    browser.upscale()
    lines = browser.errors()
    assert lines == ["letter.txt: not an image savl can read (PNG, JPEG, WebP, TIFF, GIF, BMP, AVIF, HEIC)"]
    assert browser.find("#downloads a") is None


def test_the_page_asks_for_a_picture(browser: Browser) -> None:
    browser.click("#start")
    browser.wait(lambda: browser.errors() == ["Drop a picture into the box first, or click on an example."])


def test_an_example_is_a_picture(browser: Browser) -> None:
    browser.click("#examples .gallery-item")
    browser.wait(lambda: "chairs" in browser.driver.find_element(By.ID, "pictures").text)


def test_the_cancel_button_stops_the_work(browser: Browser, large: Path) -> None:
    browser.drop(large)
    browser.click("#start")
    browser.wait(lambda: "part" in browser.said())
    browser.click("#cancel")
    browser.wait(lambda: "Cancelled: nothing done." in browser.said())
    assert browser.find("#downloads a") is None


def test_a_closed_tab_stops_its_work(browser: Browser, server: Server, large: Path, tmp_path: Path) -> None:
    photo = crop(tmp_path / "next.png")
    first = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    browser.driver.get(server.url)
    browser.wait(lambda: browser.find("#start"))
    browser.drop(large)
    browser.click("#start")
    browser.wait(lambda: "part" in browser.said())
    second = browser.driver.current_window_handle
    browser.driver.switch_to.window(first)
    browser.drop(photo)
    browser.click("#start")
    browser.wait(lambda: "waiting for the pictures of another tab" in browser.said())
    browser.driver.switch_to.window(second)
    browser.driver.close()
    browser.driver.switch_to.window(first)
    browser.wait(lambda: browser.find('#downloads a[download="next_x4.png"]'))


def test_ctrl_c_stops_the_page_and_deletes_its_files(browser: Browser, server: Server, large: Path) -> None:
    assert list(server.folder.glob("savl-web-*/uploads"))
    browser.drop(large)
    browser.click("#start")
    browser.wait(lambda: "part" in browser.said())
    code, said, seconds = server.interrupt()
    assert (code, said) == (130, "savl: interrupted\n")
    assert seconds < 10
    assert list(server.folder.iterdir()) == []
