"""The page of `savl web` in a process of its own, and headless Chromium that uses it as a person does.

``python tests/web/browser.py FOLDER`` writes the pictures of docs/web.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--window-size=1280,1000",
)  # fmt: skip
SECONDS = 60

# Files reach the page as a drop of them does: as the data of an event on the element under the pointer.
_DROP = """
const input = document.createElement('input');
input.type = 'file'; input.multiple = true; input.id = 'dropped'; input.style.display = 'none';
input.onchange = () => {
    const target = document.querySelector('#pictures button');
    const data = new DataTransfer();
    for (const file of input.files) data.items.add(file);
    for (const name of ['dragenter', 'dragover', 'drop'])
        target.dispatchEvent(new DragEvent(name, {dataTransfer: data, bubbles: true, cancelable: true}));
    input.remove();
};
document.body.append(input);
"""


@dataclass
class Server:
    """A running `savl web`."""

    process: subprocess.Popen[str]
    url: str
    folder: Path
    errors: IO[str]

    def interrupt(self) -> tuple[int, str, float]:
        """Press Ctrl-C; return the exit code, what was printed to standard error, and the seconds until the end."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        code, seconds = self.process.wait(30), time.monotonic() - began
        self.errors.seek(0)
        return code, self.errors.read(), seconds


@contextlib.contextmanager
def serve(folder: Path, *arguments: str) -> Iterator[Server]:
    """Run `savl web` on a free port, with temporary files in a folder."""
    # A shell that starts a program in the background lets it ignore SIGINT, which is inherited.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import savl.cli as c; c.main()"
    with TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", program, "web", "--no-browser", *arguments],
            env={**os.environ, "TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        with process.stdout:
            try:
                line = process.stdout.readline()
                found = re.search(r"http://\S+/", line)
                errors.seek(0)
                assert found, f"no address in {line!r}; {errors.read()}"
                yield Server(process, found[0], folder, errors)
            finally:
                process.kill()
                process.wait()


class Browser:
    """A tab of headless Chromium with the page."""

    def __init__(self, folder: Path, url: str) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for option in (*OPTIONS, f"--user-data-dir={folder / 'profile'}"):
            options.add_argument(option)
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True)
        options.add_experimental_option("prefs", {"download.default_directory": str(self.downloads)})
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
        self.driver.set_script_timeout(SECONDS)
        self.driver.get(url)
        self.wait(lambda: self.find("#start"))

    def close(self) -> None:
        self.driver.quit()

    def find(self, selector: str) -> WebElement | None:
        """Return the first element that is displayed, or None."""
        return next(
            (each for each in self.driver.find_elements(By.CSS_SELECTOR, selector) if each.is_displayed()), None
        )

    def click(self, selector: str) -> None:
        self.wait(lambda: self.find(selector)).click()

    def wait(self, condition: Callable[[], Any], seconds: float = SECONDS, poll: float = 0.05) -> Any:
        """Wait until a condition is true, which is checked every ``poll`` seconds, and return its value."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(Exception):  # an element that is being replaced
                if value := condition():
                    return value
            assert time.monotonic() < end, f"not within {seconds} s; the page says: {self.said()}"
            time.sleep(poll)

    def said(self) -> str:
        """Return the text of the status."""
        return "\n".join(each.text for each in self.driver.find_elements(By.CSS_SELECTOR, "#status"))

    def errors(self) -> list[str]:
        return [each.text for each in self.driver.find_elements(By.CSS_SELECTOR, "#status .savl-error")]

    def drop(self, *paths: Path) -> None:
        """Drop files onto the page, and wait until they have arrived."""
        self.driver.execute_script(_DROP)
        self.driver.find_element(By.ID, "dropped").send_keys("\n".join(map(str, paths)))
        self.wait(lambda: all(path.stem in self.driver.find_element(By.ID, "pictures").text for path in paths))

    def upscale(self) -> None:
        """Press the button, and wait for the end."""
        before = self.said()
        self.click("#start")  # which disappears, perhaps for a moment only
        self.wait(lambda: self.said() not in ("", before) and self.find("#start"), 10 * SECONDS)

    def slider_images(self, count: int) -> list[str]:
        """Return the addresses of the pictures of the slider; an empty list if they have not arrived."""
        images = self.driver.find_elements(By.CSS_SELECTOR, "#slider img")
        arrived = [str(each.get_property("src")) for each in images if each.get_property("naturalWidth")]
        return arrived if len(arrived) == count else []

    def download(self, name: str) -> Path:
        """Click on the link of a result, and return the file that the browser stores."""
        self.click(f'#downloads a[download="{name}"]')
        target = self.downloads / name
        self.wait(lambda: target.exists() and not list(self.downloads.glob("*.crdownload")))
        return target

    def hosts(self) -> set[str]:
        """Return the hosts that have been asked for something over the network since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        return {str(urlsplit(url).hostname) for url in urls if urlsplit(url).scheme in ("http", "https", "ws", "wss")}

    def screenshot(self, path: Path) -> None:
        """Write what the tab shows as a WebP file."""
        from PIL import Image

        self.driver.save_screenshot(str(path.with_suffix(".png")))
        with Image.open(path.with_suffix(".png")) as shot:
            shot.convert("RGB").save(path, quality=80, method=6)
        path.with_suffix(".png").unlink()


def write_pictures(target: Path) -> None:
    """Write the pictures of docs/web.md: the start, the comparison, the severity map, an error, the progress."""
    photo = Path(__file__).resolve().parents[2] / "examples/chairs.webp"
    with TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "letter.txt"
        text.write_text("Dear reader")
        with serve(folder, "--tile", "128") as server:
            browser = Browser(folder / "browser", server.url)
            try:
                time.sleep(1)
                browser.screenshot(target / "web-start.webp")
                browser.drop(photo)
                browser.upscale()
                time.sleep(1)
                browser.screenshot(target / "web-result.webp")
                browser.click("#overlay input")
                time.sleep(2)
                browser.screenshot(target / "web-severity.webp")
                browser.driver.refresh()
                browser.wait(lambda: browser.find("#start"))
                browser.drop(text, photo)
                browser.upscale()
                time.sleep(1)
                browser.screenshot(target / "web-error.webp")
                browser.driver.refresh()
                browser.wait(lambda: browser.find("#start"))
                browser.drop(photo)
                browser.click("#start")
                browser.wait(lambda: "part 3 of" in browser.said())
                browser.screenshot(target / "web-progress.webp")
                browser.click("#cancel")
                browser.wait(lambda: "Cancelled" in browser.said())
                print("hosts:", browser.hosts())
            finally:
                browser.close()
            print("Ctrl-C:", server.interrupt(), list(folder.glob("savl-web-*")))


if __name__ == "__main__":
    write_pictures(Path(sys.argv[1]))
