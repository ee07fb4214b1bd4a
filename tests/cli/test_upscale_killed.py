"""No incomplete output is left, whatever signal ends `savl upscale` while it writes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from savl.images.format import PNG
from savl.images.read import read_image
from savl.images.write import write_image

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

# The encoder stops for good after half of the file.
STUCK = """
import time
from savl.images import write
def half(image, file, *rest):
    file.write(b"half a picture")
    print("writing", flush=True)
    time.sleep(60)
write._encode = half
main()
"""


@pytest.mark.parametrize("old", [None, b"the old file"], ids=["new-output", "old-output"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_signal_in_the_middle_of_writing_leaves_the_old_state(
    fork: Callable[..., Any], tmp_path: Path, number: signal.Signals, old: bytes | None
) -> None:
    write_image(tmp_path / "in.png", np.zeros((8, 8, 3), np.uint8), image_format=PNG)
    if old is not None:
        (tmp_path / "out.png").write_bytes(old)
    process = fork(STUCK, "upscale", "in.png", "-o", "out.png", "--overwrite")
    process.wait_for(lambda printed: printed == "writing\n")
    os.kill(process.pid, number)
    code, _, errors = process.wait()
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[number]
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


def test_ctrl_c_stops_a_real_encoder_at_once(fork: Callable[..., Any], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    write_image(tmp_path / "in.png", noise, image_format=PNG)
    # Lossless WebP of 13 million noisy pixels takes many seconds.
    process = fork("main()", "upscale", "in.png", "-o", "out.webp", "-q", "100")
    process.wait_for(lambda printed: list(tmp_path.glob(".out.webp.*.part")))
    time.sleep(0.2)
    sent = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    code, _, _ = process.wait()
    if code == 0:
        assert read_image(tmp_path / "out.webp").pixels.shape == (3600, 3600, 3)
    else:
        assert code == 130
        assert [path.name for path in tmp_path.iterdir()] == ["in.png"]
        assert time.monotonic() - sent < 15
