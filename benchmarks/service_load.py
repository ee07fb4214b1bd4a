"""Load a service with many requests at once, kill one of its workers, and check every answer.

    python -m benchmarks.service_load                       # 500 requests, 8 clients, two workers, savl-tiny
    python -m benchmarks.service_load --requests 40 --json benchmarks/results/service.json

The service runs in a process of its own on the loopback interface. Each client posts images of mixed sizes, one at a
time, and compares the pixels of its answers with those of `savl.upscale`. After half of the requests, one worker is
killed. The exit code is 1 if an answer is missing, has an error, or differs by more than one 8-bit level.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

import savl
from benchmarks import machine
from savl.atomic_write import write_atomically

SIZES = ((24, 24), (48, 32), (64, 64), (96, 72), (128, 128), (33, 57))
"""Widths and heights of the images in pixels."""


@dataclass(frozen=True)
class Answer:
    """The answer to one request."""

    seconds: float
    problem: str | None
    """What is wrong with it, or None."""


def picture(width: int, height: int, seed: int) -> np.ndarray[Any, Any]:
    """Return a smooth random image ``(height, width, 3)`` uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    """Encode an image."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def ask(client: httpx.Client, image: bytes, expected: np.ndarray[Any, Any]) -> Answer:
    """Post an image and check the answer."""
    start = time.perf_counter()
    try:
        answer = client.post("/upscale", content=image)
    except httpx.HTTPError as error:
        return Answer(time.perf_counter() - start, f"no answer: {error!r}")
    seconds = time.perf_counter() - start
    if answer.status_code != 200:
        return Answer(seconds, f"status {answer.status_code}: {answer.text}")
    found = np.asarray(Image.open(io.BytesIO(answer.content)))
    if found.shape != expected.shape:
        return Answer(seconds, f"{found.shape} instead of {expected.shape}")
    difference = int(np.abs(found.astype(int) - expected.astype(int)).max())
    return Answer(seconds, f"differs by {difference} levels" if difference > 1 else None)


def start_service(workers: int) -> tuple[subprocess.Popen[str], str]:
    """Start `savl serve` on a free port; return the process and its URL."""
    command = [sys.executable, "-m", "savl", "serve", "--port", "0", "--workers", str(workers)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "running on " in line:
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, line.split("running on ")[1].split()[0]
    raise RuntimeError("the service did not start")


def workers_of(process: int) -> list[int]:
    """Return the workers of the service, which are its child processes with a connection to it."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [pid for pid in map(int, children) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def measure(requests: int, clients: int, workers: int) -> dict[str, Any]:
    """Run the load and return the figures.

    Args:
        requests: Number of requests.
        clients: Number of clients that post at the same time.
        workers: Number of workers of the service.
    """
    images = [picture(*size, seed) for size in SIZES for seed in range(2)]
    upscaler = savl.Upscaler(savl.load("savl-tiny"), device="cpu")
    expected = [savl.upscale(pixels, model=upscaler) for pixels in images]
    files = [png(pixels) for pixels in images]
    order = random.Random(0).choices(range(len(images)), k=requests)
    process, url = start_service(workers)
    answers: list[Answer] = []
    try:
        with httpx.Client(base_url=url, timeout=600, trust_env=False) as client, ThreadPoolExecutor(clients) as threads:
            start = time.perf_counter()
            futures = [threads.submit(ask, client, files[index], expected[index]) for index in order]
            for count, future in enumerate(futures):
                if count == requests // 2:
                    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
                answers.append(future.result())
            total = time.perf_counter() - start
            while client.get("/health").json()["workers"] < workers:
                time.sleep(0.1)
            metrics = client.get("/metrics").text
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    seconds = sorted(answer.seconds for answer in answers)
    pixels = sum(16 * images[index].shape[0] * images[index].shape[1] for index in order)
    return {
        "requests": requests,
        "clients": clients,
        "workers": workers,
        "killed_workers": 1,
        "restarts": int(float(metrics.split("\nsavl_worker_restarts_total ")[1].split()[0])),
        "problems": [answer.problem for answer in answers if answer.problem is not None],
        "seconds": {
            "p50": round(statistics.median(seconds), 3),
            "p95": round(seconds[int(0.95 * (len(seconds) - 1))], 3),
            "max": round(seconds[-1], 3),
        },
        "requests_per_second": round(requests / total, 2),
        "result_megapixels_per_second": round(pixels / total / 1e6, 3),
    }


def main() -> int:
    """Run, print, and write if asked to."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    arguments = parser.parse_args()
    facts = machine.device_facts(torch.device("cpu"))
    content = {"machine": facts, **measure(arguments.requests, arguments.clients, arguments.workers)}
    text = json.dumps(content, indent=1) + "\n"
    print(text, end="")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.json, text.encode())
    return 1 if content["problems"] or content["restarts"] != 1 else 0


if __name__ == "__main__":
    sys.exit(main())
