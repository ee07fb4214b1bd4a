"""The Triton kernels on a machine without a GPU: Triton's interpreter runs them, on tensors of the CPU.

The interpreter must be chosen before savl is imported, so child processes run the cases (interpreted/cases*.py), two at
a time, and every case is a test here.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from savl.ops.triton_kernels import TRITON_MISSING

FOLDER = Path(__file__).with_name("interpreted")
WORKERS = min(2, os.cpu_count() or 1)
PATIENCE = 600
"""Seconds after which a case counts as hung; the longest takes about ten."""

pytestmark = pytest.mark.skipif(TRITON_MISSING is not None, reason=str(TRITON_MISSING))


def case_names() -> list[str]:
    """Of all cases, without running any: their modules find one another as they do in a worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        return list(importlib.import_module("cases").CASES)


CASES = case_names()


class Worker:
    """A process that runs cases, started again when a case takes it down."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._errors = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._process: subprocess.Popen[str] | None = None

    def run(self, name: str) -> str | None:
        """Run a case; returns what is wrong, or None."""
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(name + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            self._process = None
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace")
            return f"the process ended with code {code} in this case; it said at last:\n{said[-4000:]}"
        error: str | None = json.loads(answer)["error"]
        return error

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _start(self) -> subprocess.Popen[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SAVL_")}
        return subprocess.Popen(
            [sys.executable, str(FOLDER / "worker.py")],
            env={**inherited, "TRITON_INTERPRET": "1", "SAVL_CACHE_DIR": str(self._folder)},
            cwd=self._folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What came of each case that is selected, as futures: the workers take them in order."""
    callspecs = [getattr(item, "callspec", None) for item in request.session.items if item.path == Path(__file__)]
    names = [callspec.params["name"] for callspec in callspecs if callspec is not None]
    folder = tmp_path_factory.mktemp("interpreted")
    workers = [Worker(folder) for _ in range(WORKERS)]
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def run(name: str) -> str | None:
        worker = idle.get()
        try:
            return worker.run(name)
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(WORKERS) as pool:
        futures: dict[str, Future[str | None]] = {name: pool.submit(run, name) for name in names}
        try:
            yield futures
        finally:
            for future in futures.values():
                future.cancel()
            for worker in workers:
                worker.close()


@pytest.mark.parametrize("name", CASES)
def test_under_the_interpreter(name: str, verdicts: dict[str, Future[str | None]]) -> None:
    error = verdicts[name].result(timeout=PATIENCE)
    if error is not None:
        pytest.fail(error, pytrace=False)


def test_a_case_that_fails_and_one_that_ends_the_process_are_told(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    try:
        assert "KeyError: 'no such case'" in str(worker.run("no such case"))
        assert worker._process is not None
        worker._process.kill()
        assert "ended with code -9" in str(worker.run("no such case"))
        assert "KeyError" in str(worker.run("no such case")), "it does not start again"
    finally:
        worker.close()
