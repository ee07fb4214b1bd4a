"""Exiting waits for the threads that still hold a tensor of a reduction, since they abort the process otherwise."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from weakref import ref

import pytest
import torch

from savl.training import processes


@pytest.fixture
def exit_while_held(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], float]:
    """Return the seconds that exiting waits while a thread holds a tensor for the given time."""
    monkeypatch.setattr(processes, "_last_sums", deque(maxlen=4))

    def seconds(held: float) -> float:
        tensor = torch.ones(1)
        processes._last_sums.append(ref(tensor))
        thread = threading.Timer(held, [tensor].clear)
        del tensor
        thread.start()
        start = time.monotonic()
        processes._wait_until_tensors_are_freed()
        waited = time.monotonic() - start
        thread.cancel()
        thread.join()
        return waited

    return seconds


def test_exiting_waits_until_a_thread_has_freed_its_tensor(exit_while_held: Callable[[float], float]) -> None:
    assert 0.2 <= exit_while_held(0.25) < 5


def test_exiting_does_not_wait_forever(
    exit_while_held: Callable[[float], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((0.0, 1.0, 6.0))
    monkeypatch.setattr(processes, "monotonic", lambda: next(clock))
    assert exit_while_held(60) < 10


def test_exiting_does_not_wait_if_no_thread_holds_a_tensor() -> None:
    start = time.monotonic()
    processes._wait_until_tensors_are_freed()
    assert time.monotonic() - start < 1
