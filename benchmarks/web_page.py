"""Time the page of `savl web` against `savl upscale` on the same photograph, in alternation.

    python -m benchmarks.web_page                        # examples/chairs.webp, five rounds
    python -m benchmarks.web_page --json benchmarks/results/web.json

A round is one run of the command `savl upscale`, from its start to its end, and one click on the button of the page,
from the click to the link of the result, by which time the pictures of the comparison are there too. Headless Chromium
clicks; the page is loaded once. The command prints how long the picture itself took, without the start of Python, which
is given as `shell_picture`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import machine
from savl.atomic_write import write_atomically

ROOT = Path(__file__).resolve().parents[1]
PHOTO = ROOT / "examples/chairs.webp"


def shell(folder: Path) -> tuple[float, float]:
    """Return the seconds of `savl upscale`, and those that it prints for the picture."""
    command = [sys.executable, "-m", "savl", "upscale", str(PHOTO), "-o", str(folder / "out.webp"), "--overwrite"]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    printed = re.search(r"([\d.]+) ?s\b", done.stdout + done.stderr)
    assert printed is not None, done.stdout + done.stderr
    return seconds, float(printed[1])


def measure(rounds: int) -> dict[str, Any]:
    """Return the seconds of all rounds, their medians, and how much more the page took."""
    sys.path.append(str(ROOT / "tests/web"))
    from browser import Browser, serve

    found: dict[str, list[float]] = {"shell": [], "shell_picture": [], "page": []}
    with TemporaryDirectory() as name, serve(Path(name)) as server:
        folder = Path(name)
        browser = Browser(folder / "browser", server.url)
        try:
            browser.drop(PHOTO)
            browser.upscale()  # not timed, as the first call of the command is not
            shell(folder)
            for _ in range(rounds):
                for key, seconds in zip(("shell", "shell_picture"), shell(folder), strict=True):
                    found[key].append(round(seconds, 3))
                began = time.perf_counter()
                browser.click("#start")
                browser.wait(lambda: browser.find("#cancel"))
                browser.wait(lambda: browser.find("#downloads a"), poll=0.2)
                found["page"].append(round(time.perf_counter() - began, 3))
                browser.wait(lambda: browser.find("#start"))
        finally:
            browser.close()
    medians = {key: statistics.median(values) for key, values in found.items()}
    return {
        "photo": PHOTO.name,
        "seconds": found,
        "medians": medians,
        "page_over_shell": round(medians["page"] / medians["shell"], 3),
        "page_over_shell_picture": round(medians["page"] / medians["shell_picture"], 3),
    }


def main() -> None:
    """Measure, print, and write the figures if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    arguments = parser.parse_args()
    content = {"machine": machine.device_facts(torch.device("cpu")), **measure(arguments.rounds)}
    text = json.dumps(content, indent=1) + "\n"
    print(text, end="")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.json, text.encode())


if __name__ == "__main__":
    main()
