"""A service that runs in this process, with workers of its own, and clients for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs savl[serve]")
pytest.importorskip("httpx", reason="needs httpx")
import httpx
import uvicorn

from savl.service.app import Limits, create_service
from savl.service.pool import WorkerPool
from savl.service.worker import WorkerSettings

LIMITS = Limits(body_bytes=2 * 2**20, pixels=40_000, result_pixels=900_000, waiting=24, seconds=60.0)
TOKEN = "a secret"


@dataclass
class Service:
    """A service that answers on the loopback interface."""

    url: str
    pool: WorkerPool
    model: Path

    def client(self, **settings: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {TOKEN}", **settings.pop("headers", {})}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False, **settings)


class ServerInThread(uvicorn.Server):
    def install_signal_handlers(self) -> None:
        """Threads cannot have any."""


def start(model: Path, limits: Limits, workers: int = 2) -> tuple[Service, Callable[[], None]]:
    settings = WorkerSettings(model=str(model), device="cpu", threads=1, images=2)
    app, pool = create_service([settings] * workers, limits=limits, token=TOKEN)
    pool.start()
    server = ServerInThread(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]

    def stop() -> None:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()

    return Service(f"http://127.0.0.1:{port}", pool, model), stop
