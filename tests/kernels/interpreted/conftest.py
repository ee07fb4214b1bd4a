"""Run the tests of this folder under Triton's interpreter, which executes the kernels on tensors of the CPU.

Triton reads TRITON_INTERPRET when it is imported, and the other tests of a session need its compiler. So the session
starts a child process, which is pytest for this folder with TRITON_INTERPRET=1, hands it one test after the other and
takes over the outcomes. Where the variable is already set the tests run in the session itself, such as for a debugger:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CONNECTION = "INTERPRETER_CONNECTION"
"""Environment variable with the file descriptor over which a child process is told what to run."""
TIMEOUT = 600
"""Seconds after which a test counts as hung; the longest takes about ten of an idle processor."""

sys.path.append(str(FOLDER))  # for kernel_checks.py


class ChildProcess:
    """A process that runs tests of this folder; it is started again after a test that ends it.

    Args:
        folder: Where its caches and its output go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, test: str) -> tuple[str, str]:
        """Run a test.

        Args:
            test: Its node ID.

        Returns:
            ``"passed"``, ``"skipped"`` or ``"failed"``, and what pytest reports of it.
        """
        if self._process is None:
            self._start()
        assert self._process is not None
        try:
            self._connection.send(test)
            if not self._connection.poll(TIMEOUT):
                self.stop()
                return "failed", f"the test has not ended after {TIMEOUT} s"
            outcome, report = self._connection.recv()
            return outcome, report
        except (EOFError, OSError):
            code = self._process.wait()
            self._process = None
            output = (self._folder / "output").read_text(encoding="utf-8", errors="replace")
            return (
                "failed",
                f"the process ended with code {code} in this test; the end of its output:\n{output[-4000:]}",
            )

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("SAVL_", "PYTEST_", "TRITON_"))
        }
        self._connection, end = Pipe()
        with end, (self._folder / "output").open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)],
                env={
                    **inherited,
                    "TRITON_INTERPRET": "1",
                    "SAVL_CACHE_DIR": str(self._folder),
                    CONNECTION: str(end.fileno()),
                },
                cwd=FOLDER.parents[2],  # the root of the repository, as node IDs are relative to it
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[end.fileno()],
            )


@pytest.fixture(scope="session", autouse=True)
def child_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChildProcess | None]:
    """The child process of this session, None where the tests run in the session itself."""
    if find_spec("triton") is None:
        pytest.skip("the kernels need Triton")
    if INTERPRETED:
        yield None
        return
    child = ChildProcess(tmp_path_factory.mktemp("interpreted"))
    yield child
    child.stop()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Let the child process run the test in place of this session."""
    child = pyfuncitem.funcargs["child_process"]
    if child is None:
        return None
    outcome, report = child.run(pyfuncitem.nodeid)
    if outcome == "skipped":
        pytest.skip(report)
    if outcome == "failed":
        pytest.fail(report, pytrace=False)
    return True


# In the process that runs the tests


def pytest_collection_finish() -> None:
    """Prepare the interpreter, where tests that import torch were collected."""
    if INTERPRETED and "torch" in sys.modules:
        import torch
        from triton.runtime import interpreter

        torch.set_num_threads(1)
        interpreter.InterpreterBuilder.create_dot = _dot
        interpreter._convert_float = partial(_convert_bfloat16, interpreter._convert_float)
        interpreter._patch_lang = partial(_patch_language, interpreter._patch_lang)


def _patch_language(patch: Callable[[Any], Any], function: Any) -> Any:
    """Replace the functions of Triton's language, unless they are replaced already.

    The interpreter does so at every call of one jitted function by another, which takes a third of all time.
    """
    import triton.language as tl

    modules = [each for each in function.__globals__.values() if each is tl or each is tl.core]
    return patch(function) if any(tl.core.is_builtin(module.load) for module in modules) else None


def _dot(builder: Any, a: Any, b: Any, accumulator: Any, precision: Any, *others: Any) -> Any:
    """Multiply matrices as a GPU does: float32 products are added to the accumulator one after another.

    The interpreter leaves the product to numpy, whose float32 sums have another order for every shape and operand: a
    score would get other bits in the backward pass than in the forward pass. Moreover it takes the bits of bfloat16 for
    integers, and multiplies float32 operands exactly that tensor cores cut to tf32.
    """
    rows, columns = (_factor(x, str(precision).endswith("TF32")) for x in (a, b))
    total = accumulator.data
    for index in range(rows.shape[1]):
        total = (total + rows[:, index, None] * columns[index]).astype(np.float32)  # the product itself is exact
    return type(accumulator)(total, accumulator.dtype.scalar)


def _factor(operand: Any, tf32: bool) -> Any:
    """Return an operand of a product in float64, where ``tf32`` without the last 13 bits of the mantissa of float32."""
    import triton.language as tl

    data = operand.data
    if operand.dtype.scalar == tl.bfloat16:
        data = (data.astype(np.uint32) << 16).view(np.float32)
    elif tf32 and data.dtype == np.float32:
        data = (data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return data.astype(np.float64)


def _convert_bfloat16(convert: Any, data: Any, given: Any, wanted: Any, rounding: Any) -> Any:
    """Convert between float32 and bfloat16 as a GPU does, to the nearest even number.

    The interpreter loses the carry into the exponent, and rounds halves up.
    """
    import torch
    import triton.language as tl

    if (given, wanted) == (tl.bfloat16, tl.float32):
        return data.astype(np.uint32) << 16
    if (given, wanted) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.array(data, dtype=np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return convert(data, given, wanted, rounding)


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run the tests that the parent process asks for, until it closes the connection."""
    if CONNECTION not in os.environ:
        return None
    connection = Connection(int(os.environ[CONNECTION]))
    tests = {item.nodeid: item for item in session.items}
    while True:
        try:
            test = connection.recv()
        except EOFError:
            return True
        if test not in tests:
            connection.send(("failed", f"the child process has collected no {test}"))
            continue
        _reports.clear()
        tests[test].ihook.pytest_runtest_protocol(item=tests[test], nextitem=None)
        decisive = next((each for each in _reports if not each.passed), _reports[-1])
        sections = [f"{title}:\n{content}" for title, content in decisive.sections]
        connection.send((decisive.outcome, "\n".join([decisive.longreprtext, *sections])))


_reports: list[pytest.TestReport] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the reports of the test at hand for the parent process."""
    _reports.append(report)
