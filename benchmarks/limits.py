"""Measure the limits of upscaling: time for a small photo, time and memory for a large one, and tiled output.

    python -m benchmarks.limits benchmarks/results/MACHINE/limits.json

docs/models.md shows the results. The time for the small photo is the median of several runs in this process. The large
photo is upscaled in its own process, whose peak memory the operating system reports. This needs Linux.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import savl
from benchmarks import machine
from savl.atomic_write import write_atomically
from savl.inference.process_settings import keep_freed_memory

MODEL = "savl-tiny"


def small_photo(runs: int = 7) -> dict[str, Any]:
    """Measure the time for 128×128 pixels in seconds: minimum, median and maximum of the runs after a warm-up."""
    upscaler = savl.Upscaler(savl.load(MODEL))
    image = torch.rand(1, 3, 128, 128)
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        upscaler(image)
        seconds.append(time.perf_counter() - start)
    counted = seconds[1:]
    return {"seconds": {"min": min(counted), "median": statistics.median(counted), "max": max(counted)}, "runs": runs}


def large_photo() -> dict[str, Any]:
    """Measure time and peak memory of `savl upscale` in float32: a synthetic image of 2000×1500 pixels, as JPEG."""
    y, x = np.mgrid[0:1500, 0:2000]
    waves = np.stack([np.sin(x / 7), np.cos(y / 11), np.sin((x + y) / 13)], axis=-1) * 90 + 128
    pixels = (waves + np.random.default_rng(0).normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(pixels).save(Path(folder) / "photo.png")
        command = [sys.executable, "-c", "from savl.cli import main; main()", "upscale", "photo.png", "-o", "out.jpg"]
        start = time.perf_counter()
        subprocess.run([*command, "--dtype", "float32"], cwd=folder, check=True, capture_output=True)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"pixels": "2000x1500", "seconds": seconds, "peak_gib": peak}


def seams(photo: Path) -> list[dict[str, Any]]:
    """Compare tiled with untiled output on a photograph: PSNR, and the largest difference in 8-bit levels."""
    with Image.open(photo) as image:
        pixels = np.asarray(image.convert("RGB")).copy()
    lr = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    model = savl.load(MODEL)
    untiled = savl.Upscaler(model, tile=0)(lr).sr
    rows = []
    for tile, tile_pad in ((64, 32), (128, 16), (128, 32)):
        difference = savl.Upscaler(model, tile=tile, tile_pad=tile_pad)(lr).sr - untiled
        psnr = -10 * math.log10(difference.square().mean().item())
        levels = difference.abs().max().item() * 255
        rows.append({"photo": photo.name, "tile": tile, "tile_pad": tile_pad, "psnr_db": psnr, "max_levels": levels})
    return rows


def main() -> None:
    """Measure, write and print."""
    out = Path(sys.argv[1])
    photo = Path(__file__).resolve().parents[1] / "examples" / "chairs.webp"
    keep_freed_memory()
    savl.use_fused_kernels()  # `savl upscale` does both
    report = {
        "machine": machine.facts() | {"kernels": "fused"},
        "small_photo": small_photo(),
        "seams": seams(photo),
        "large_photo": large_photo(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, (json.dumps(report, indent=1) + "\n").encode())
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
