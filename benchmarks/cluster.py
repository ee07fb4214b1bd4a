"""Measure the throughput of `savl upscale --ray` with two workers against one process with the same processors.

    python -m benchmarks.cluster [--files 24] [--side 256] [--rounds 3] [--json FILE]

Both commands upscale the same photographs, in turn. Ray takes some seconds to start, whatever the number of files, so
that throughput is measured between results: from the end of the first file of each worker to the end of the last file.
The time of the whole command is recorded too. It needs ``pip install 'savl[cluster]'``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from savl.images.format import PNG
from savl.images.read import read_image
from savl.images.write import write_image

ROOT = Path(__file__).resolve().parents[1]
WANTED = 0.9
"""Least throughput of two workers, relative to one process."""


def write_inputs(folder: Path, files: int, side: int) -> None:
    """Write different crops of the photograph in examples/, enlarged by mirroring where it is too small."""
    photograph = read_image(ROOT / "examples" / "chairs.webp").pixels
    random = np.random.default_rng(0)
    padded = np.pad(photograph, ((0, side), (0, side), (0, 0)), mode="symmetric")
    for number in range(files):
        top, left = (int(random.integers(0, length)) for length in photograph.shape[:2])
        write_image(folder / f"{number:03d}.png", padded[top : top + side, left : left + side], image_format=PNG)


def measure(inputs: Path, options: Sequence[str], workers: int) -> dict[str, float]:
    """Run the command once.

    Returns:
        Input megapixels per second, and the seconds of the whole command.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "savl", "upscale", str(inputs), "-o", f"{folder}/out", *options]
        begin = time.monotonic()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.monotonic() - begin
        ends = sorted(path.stat().st_mtime for path in Path(folder, "out").iterdir())
    height, width, _ = read_image(next(inputs.iterdir())).pixels.shape
    finished = len(ends) - workers
    return {
        "megapixels_per_second": finished * height * width / 1e6 / (ends[-1] - ends[workers - 1]),
        "seconds": seconds,
    }


def run(files: int, side: int, rounds: int) -> dict[str, Any]:
    """Return facts about the machine, the settings and the measurements."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = 2
    threads = max(1, processors // workers)
    variants = {
        "one process": ["--threads", str(threads * workers)],
        "two workers": ["--ray", "--workers", str(workers), "--threads", str(threads)],
    }
    records: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), files, side)
        for _ in range(rounds):
            for name, options in variants.items():
                records[name].append(measure(Path(folder), options, workers))
                print(f"{name}: {records[name][-1]['megapixels_per_second']:.4f} MP/s", flush=True)
    medians = {
        name: {key: statistics.median(record[key] for record in own) for key in own[0]} for name, own in records.items()
    }
    ratio = statistics.median(
        two["megapixels_per_second"] / one["megapixels_per_second"]
        for one, two in zip(records["one process"], records["two workers"], strict=True)
    )
    return {
        "machine": machine.device_facts(torch.device("cpu")),
        "settings": {"model": "savl-tiny", "files": files, "side": side, "rounds": rounds, "threads": threads},
        "medians": medians,
        "rounds": records,
        "ratio": ratio,
        "wanted": WANTED,
        "met": ratio >= WANTED,
    }


def main() -> int:
    """Measure, print, and write the results; return 1 if the throughput is lower than wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=24)
    parser.add_argument("--side", type=int, default=256, help="LR pixels along a side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="default: results/<machine>/cluster.json")
    arguments = parser.parse_args()
    result = run(arguments.files, arguments.side, arguments.rounds)
    path = arguments.json or machine.folder_of(result["machine"]) / "cluster.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"two workers / one process: {result['ratio']:.2f}, wanted {WANTED}; {path}")
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
