"""Whatever ends `savl upscale` in the middle of writing, no half file is left under the output's name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import savl
from savl.images.format import PNG
from savl.images.read import read_image
from savl.images.write import write_image

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

# The command with a stand-in for the network. With "stuck" the encoder stops for good after half of the file.
PROGRAM = """
import signal, sys, time
# A shell starts what it runs in the background with SIGINT ignored; a user at a terminal does not.
signal.signal(signal.SIGINT, signal.default_int_handler)
from types import SimpleNamespace
import torch
from savl.cli import batch, main
from savl.images import write

class Nearest:
    scale = 4
    def __call__(self, lr, *, on_tile=None):
        sr = torch.nn.functional.interpolate(lr, scale_factor=4, mode="nearest")
        return SimpleNamespace(sr=sr, severity=torch.ones(1, *lr.shape[2:]))

batch.as_upscaler = lambda model, **settings: Nearest()
if sys.argv[1] == "stuck":
    def half(image, file, *rest):
        file.write(b"half a picture")
        print("writing", flush=True)
        time.sleep(60)
    write._encode = half
main(sys.argv[2:])
"""


def start(folder: Path, mode: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, mode, "upscale", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(savl.__file__).parents[1])}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("old", [None, b"the old file"], ids=["new-output", "old-output"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_signal_in_the_middle_of_writing_leaves_the_old_state(
    tmp_path: Path, number: signal.Signals, old: bytes | None
) -> None:
    write_image(tmp_path / "in.png", np.zeros((8, 8, 3), np.uint8), image_format=PNG)
    if old is not None:
        (tmp_path / "out.png").write_bytes(old)
    process = start(tmp_path, "stuck", "in.png", "-o", "out.png", "--overwrite")
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n", process.communicate()
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    expected = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
    assert process.returncode == expected[number]
    assert "Traceback" not in errors
    if old is None:
        assert not (tmp_path / "out.png").exists()
    else:
        assert (tmp_path / "out.png").read_bytes() == old
    left = {path.name for path in tmp_path.iterdir()} - {"in.png", "out.png"}
    if number is signal.SIGKILL:  # cannot be caught: a hidden file that no one takes for a picture may stay
        assert all(name.startswith(".out.png.") and name.endswith((".part", ".claim")) for name in left)
    else:
        assert left == set()
    if number is signal.SIGINT:
        assert "interrupted: 0 of 1 upscaled" in errors


def test_ctrl_c_stops_a_real_encoder_at_once(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    write_image(tmp_path / "in.png", noise, image_format=PNG)
    # Lossless WebP of 13 million noisy pixels takes many seconds.
    process = start(tmp_path, "real", "in.png", "-o", "out.webp", "-q", "100")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.webp.*.part")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.2)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    if process.returncode == 0:
        assert read_image(tmp_path / "out.webp").pixels.shape == (3600, 3600, 3)
    else:
        assert process.returncode == 130
        assert [path.name for path in tmp_path.iterdir()] == ["in.png"]
        assert time.monotonic() - sent < 15
