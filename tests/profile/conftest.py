"""Run the tests of profiling with one thread, because more threads are slower on a busy machine."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """Compute with one thread."""
