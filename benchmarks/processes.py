"""Run a command for a limited time, so that neither it nor a process that it started can hang."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

GRACE = 5.0
"""Seconds between the interrupt and the kill of a command that is cut off; both are within its limit."""
OK, FAILED, CUT_OFF, MISSING = "ok", "failed", "cut off", "missing"


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    state: str
    """`OK`, `FAILED`, `CUT_OFF`, or `MISSING` where the program was not found."""
    code: int | None
    """Exit code; None if there is none."""
    seconds: float


def run(
    command: Sequence[str],
    seconds: float,
    *,
    output: IO[bytes] | int | None = None,
    environment: Mapping[str, str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    grace: float = GRACE,
) -> Outcome:
    """Run a command, and all that it starts, for at most ``seconds``.

    Before the end, its process group is interrupted, as by Ctrl+C, so that it can report what it has; at the end it is
    killed. A process that even then does not end, because it waits in the kernel of the operating system, is left.

    Args:
        command: The program and its arguments.
        seconds: Limit of the time.
        output: Where standard output and errors go; those of this process by default.
        environment: Changes of the environment.
        folder: Folder to run in.
        grace: Time between interrupt and kill, at most a third of ``seconds``.
    """
    start = time.monotonic()
    grace = min(grace, seconds / 3)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            cwd=folder,
            process_group=0,
        )
    except OSError:
        return Outcome(MISSING, None, time.monotonic() - start)
    cut_off = False
    try:
        process.wait(seconds - grace)
    except subprocess.TimeoutExpired:
        cut_off = True
        _signal(process, signal.SIGINT)
        _wait(process, grace)
    finally:
        # Also what the command has started and left running.
        _signal(process, signal.SIGKILL)
        _wait(process, 1)
    code = process.poll()
    state = CUT_OFF if cut_off else OK if code == 0 else FAILED
    return Outcome(state, code, time.monotonic() - start)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
