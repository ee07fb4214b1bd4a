"""Requests to a running service: results, limits, errors, metrics, workers that die, and the end of the service."""

from __future__ import annotations

import io
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import savl

pytest.importorskip("fastapi", reason="needs savl[serve]")
httpx = pytest.importorskip("httpx", reason="needs httpx")

from running_service import LIMITS, TOKEN, Service, start  # noqa: E402  # after the check for its packages

from savl.cli.app import app as cli  # noqa: E402  # after the check for its packages
from savl.service.app import Limits  # noqa: E402  # after the check for its packages
from savl.service.pool import MOST_ATTEMPTS  # noqa: E402  # after the check for its packages


def picture(width: int, height: int, seed: int = 0) -> np.ndarray[Any, Any]:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray[Any, Any], format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, **options)
    return stream.getvalue()


def pixels_of(content: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.fixture(scope="module")
def upscaler(service: Service) -> Any:
    return savl.Upscaler(savl.load(service.model), device="cpu")


def differ(content: bytes, expected: np.ndarray[Any, Any]) -> int:
    """Largest difference in 8-bit levels; passes over several images may round differently than over one."""
    found = pixels_of(content)
    assert found.shape == expected.shape
    return int(np.abs(found.astype(int) - expected.astype(int)).max())


def test_body_is_upscaled_as_by_the_library(service: Service, upscaler: Any) -> None:
    pixels = picture(37, 21)
    with service.client() as client:
        answer = client.post("/upscale", content=encoded(pixels))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    assert differ(answer.content, savl.upscale(pixels, model=upscaler)) <= 1


def test_form_and_options_are_accepted_and_metadata_kept(service: Service, upscaler: Any) -> None:
    pixels = picture(20, 30)
    exif = Image.Exif()
    exif[0x010E] = "a description"
    image = encoded(pixels, "JPEG", quality=95, exif=exif)
    with service.client() as client:
        answer = client.post(
            "/upscale",
            files={"image": ("photo.jpg", image, "image/jpeg")},
            params={"scale": 2, "format": "png", "strength": 0.5},
        )
    assert answer.status_code == 200, answer.text
    expected = savl.upscale(image, model=upscaler, scale=2, strength=0.5)
    assert differ(answer.content, expected) <= 1
    assert Image.open(io.BytesIO(answer.content)).getexif()[0x010E] == "a description"


def test_result_has_the_format_of_the_image_unless_savl_does_not_write_it(service: Service) -> None:
    kinds = {"JPEG": "image/jpeg", "WEBP": "image/webp", "TIFF": "image/tiff", "BMP": "image/png"}
    with service.client() as client:
        for format, wanted in kinds.items():
            answer = client.post("/upscale", content=encoded(picture(8, 8), format))
            assert (answer.status_code, answer.headers["content-type"]) == (200, wanted)


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def tiff_of_two_sizes() -> bytes:
    stream = io.BytesIO()
    large = Image.fromarray(picture(300, 200))
    Image.fromarray(picture(8, 8)).save(stream, "TIFF", save_all=True, append_images=[large])
    return stream.getvalue()


REFUSED: dict[str, tuple[int, str, Callable[[], dict[str, Any]]]] = {
    "not an image": (422, "not an image", lambda: {"content": b"no image at all"}),
    "nothing": (422, "no image", lambda: {"content": b""}),
    "truncated": (422, "", lambda: {"content": encoded(picture(64, 64))[:700]}),
    "decompression bomb": (413, "50000x50000 pixels", lambda: {"content": png_that_claims(50_000, 50_000)}),
    "large page": (413, "300x200 pixels", lambda: {"content": tiff_of_two_sizes(), "params": {"page": 2}}),
    "truncated header": (422, "", lambda: {"content": encoded(picture(8, 8), "BMP")[:20]}),
    "large result": (413, "smaller scale", lambda: {"content": encoded(picture(190, 200)), "params": {"scale": 40}}),
    "long body": (413, "bytes", lambda: {"content": bytes(LIMITS.body_bytes + 1)}),
    "long body of unknown length": (
        413,
        "bytes",
        lambda: {"content": iter([bytes(2**20) for _ in range(4)])},
    ),
    "scale": (400, "scale", lambda: {"content": encoded(picture(4, 4)), "params": {"scale": -1}}),
    "infinite scale": (400, "scale", lambda: {"content": encoded(picture(4, 4)), "params": {"scale": "inf"}}),
    "strength": (400, "strength", lambda: {"content": encoded(picture(4, 4)), "params": {"strength": "strong"}}),
    "format": (400, "format", lambda: {"content": encoded(picture(4, 4)), "params": {"format": "gif"}}),
    "page": (422, "page", lambda: {"content": encoded(picture(4, 4)), "params": {"page": 3}}),
    "form without the field": (400, "'image'", lambda: {"files": {"photo": ("p.png", encoded(picture(4, 4)))}}),
    "form without boundary": (
        400,
        "form",
        lambda: {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
    ),
    "token": (401, "Bearer", lambda: {"content": b"x", "headers": {"Authorization": "Bearer wrong"}}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_request_gets_one_clear_line(service: Service, name: str) -> None:
    status, part, request = REFUSED[name]
    with service.client() as client:
        answer = client.post("/upscale", **request())
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]
    assert part in message
    assert "\n" not in message


def test_unknown_path_and_method_get_an_error_in_the_same_form(service: Service) -> None:
    with service.client() as client:
        for answer, status in ((client.get("/other"), 404), (client.get("/upscale"), 405)):
            assert answer.status_code == status
            assert list(answer.json()) == ["error"]


def begin_body(service: Service) -> socket.socket:
    """Return a connection that has sent the headers and a part of the body of a request."""
    host, port = service.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    headers = f"Host: {host}\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 1000"
    connection.sendall(f"POST /upscale HTTP/1.1\r\n{headers}\r\n\r\nbegin".encode())
    return connection


def test_connection_that_closes_while_the_body_arrives_is_no_failure(service: Service) -> None:
    def count() -> float:
        with service.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith('savl_requests_total{status="400"}'))

    before = count()
    begin_body(service).close()
    wait_until(lambda: count() == before + 1)


def test_bodies_that_arrive_are_limited_in_number(service: Service) -> None:
    image = encoded(picture(4, 4))
    bodies = [begin_body(service) for _ in range(LIMITS.waiting)]
    try:
        with service.client() as client:
            wait_until(lambda: client.post("/upscale", content=image).status_code == 503)
            assert client.get("/health").json()["images"] == 0
    finally:
        for each in bodies:
            each.close()
    with service.client() as client:
        wait_until(lambda: client.post("/upscale", content=image).status_code == 200)


def test_health_and_metrics_report_the_state(service: Service) -> None:
    with service.client() as client:
        client.post("/upscale", content=encoded(picture(5, 5))).raise_for_status()
        assert client.get("/health").json() == {"status": "ok", "workers": 2, "images": 0}
        metrics = client.get("/metrics").text
    assert 'savl_requests_total{status="200"}' in metrics
    assert "savl_workers_ready 2.0" in metrics
    assert "savl_request_seconds_bucket" in metrics
    assert "savl_batch_tiles_count" in metrics
    with httpx.Client(base_url=service.url, trust_env=False) as stranger:
        assert stranger.get("/health").status_code == 200
        assert stranger.get("/metrics").status_code == 401


def test_full_queue_refuses_and_takes_images_again_later(service: Service) -> None:
    image = encoded(picture(190, 190))
    with service.client() as client, ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(lambda _: client.post("/upscale", content=image), range(40)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 503}
        refused = answers[statuses.index(503)]
        assert refused.headers["retry-after"] == "1"
        assert "try again later" in refused.json()["error"]
        assert client.post("/upscale", content=image).status_code == 200


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_no_answer_is_lost_or_mixed_up_when_a_worker_is_killed(service: Service, upscaler: Any) -> None:
    sizes = [(16, 16), (33, 20), (64, 48), (100, 90)]
    images = {(size, seed): picture(*size, seed) for size in sizes for seed in range(3)}
    expected = {key: savl.upscale(pixels, model=upscaler) for key, pixels in images.items()}
    order = random.Random(0).choices(list(images), k=60)
    before = set(service.pool.process_ids)
    done: list[int] = []

    def ask(key: Any) -> int:
        with service.client() as client:
            answer = client.post("/upscale", content=encoded(images[key]))
        assert answer.status_code == 200, answer.text
        done.append(1)
        return differ(answer.content, expected[key])

    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(ask, key) for key in order]
        wait_until(lambda: len(done) > 10)
        os.kill(next(iter(before)), signal.SIGKILL)
        assert max(future.result() for future in futures) <= 1
    wait_until(lambda: service.pool.ready_workers == 2)
    assert len(before & set(service.pool.process_ids)) == 1
    with service.client() as client:
        assert "savl_worker_restarts_total 1.0" in client.get("/metrics").text


def test_image_that_kills_every_worker_fails_and_harms_no_other(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, stop = start(model_file, LIMITS, workers=1)
    try:
        held = encoded(picture(199, 199))
        stopped: set[int] = set()
        folders: list[str] = []

        def kill_each_worker_once() -> None:
            while len(stopped) < MOST_ATTEMPTS:
                for worker in running.pool._workers:
                    pid = worker.process.pid
                    if pid not in stopped and any(each.job.image == held for each in worker.requests.values()):
                        stopped.add(pid)
                        folders.append(worker.folder.name)
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.001)

        killer = threading.Thread(target=kill_each_worker_once, daemon=True)
        killer.start()
        with running.client() as client, ThreadPoolExecutor(3) as threads:
            deadly = threads.submit(client.post, "/upscale", content=held)
            others = [threads.submit(client.post, "/upscale", content=encoded(picture(8, 8))) for _ in range(2)]
            answer = deadly.result()
            assert [other.result().status_code for other in others] == [200, 200]
        assert answer.status_code == 500
        assert answer.json()["error"] == f"{MOST_ATTEMPTS} workers died while they upscaled this image"
        assert not any(map(os.path.exists, folders)), "temporary files of workers that were killed are left"
    finally:
        stop()


def test_time_limit_and_closed_connections_stop_the_work(model_file: Path) -> None:
    limits = Limits(pixels=4_000_000, seconds=1.0)
    running, stop = start(model_file, limits, workers=1)
    try:
        large = encoded(picture(1900, 1900))
        with running.client() as client:
            answer = client.post("/upscale", content=large)
            assert answer.status_code == 504
            assert "in 1 s" in answer.json()["error"]
            wait_until(lambda: running.pool.accepted == 0)
        with running.client() as client, pytest.raises(httpx.TimeoutException):
            client.post("/upscale", content=large, timeout=0.3)
        wait_until(lambda: running.pool.accepted == 0)
        with running.client() as client:
            assert client.post("/upscale", content=encoded(picture(4, 4))).status_code == 200
    finally:
        stop()


@pytest.mark.slow
def test_program_ends_although_its_pool_was_not_stopped(model_file: Path) -> None:
    program = f"""
from savl.service.pool import WorkerPool
from savl.service.worker import WorkerSettings
if __name__ == "__main__":
    WorkerPool([WorkerSettings({str(model_file)!r}, device="cpu")]).start()
"""
    path = model_file.with_name("program.py")
    path.write_text(program)
    assert subprocess.run([sys.executable, str(path)], timeout=120).returncode == 0


@pytest.mark.slow
def test_command_finishes_what_it_began_and_exits(model_file: Path) -> None:
    environment = {**os.environ, "SAVL_SERVE_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "savl", "serve", "--port", "0", "--model", str(model_file), "--device", "cpu"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = ""
        for line in process.stderr:
            if "running on" in line:
                url = line.split("running on ")[1].split()[0]
                break
        assert url.startswith("http://127.0.0.1:")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        with ThreadPoolExecutor(1) as threads, httpx.Client(trust_env=False, timeout=120) as client:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            image = encoded(picture(800, 700))
            answer = threads.submit(client.post, f"{url}/upscale", content=image, headers=headers)
            wait_until(lambda: client.get(f"{url}/health").json()["images"] == 1)
            process.send_signal(signal.SIGTERM)
            assert answer.result().status_code == 200
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()


@pytest.mark.parametrize("option", ["--max-megabytes", "--max-megapixels", "--timeout"])
def test_limit_that_is_not_finite_is_refused(option: str) -> None:
    finished = CliRunner().invoke(cli, ["serve", option, "inf"])
    assert finished.exit_code == 2
    assert "finite" in finished.output


def test_missing_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "uvicorn.py").write_text("raise ImportError('No module named uvicorn')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "savl", "serve"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 2
    assert "pip install 'savl[serve]'" in finished.stderr
