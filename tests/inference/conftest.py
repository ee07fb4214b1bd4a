"""Run the tests of inference with one thread, because their networks and images are small."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """Compute with one thread."""
