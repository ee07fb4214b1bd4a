"""What a tile may take, and that freed memory is kept for the next."""

from __future__ import annotations

import subprocess
import sys

import pytest

from savl.inference.process_settings import keep_freed_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted as Linux counts them")
def test_kept_memory_soon_costs_no_page_faults() -> None:
    code = """
import resource, sys, torch
from savl.inference.process_settings import keep_freed_memory

if not keep_freed_memory():
    sys.exit(77)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
print(first, min(faults() for _ in range(8)))  # pieces left by other allocations may not fit at once
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 77:
        pytest.skip("this C library cannot be told to keep memory")
    assert done.returncode == 0, done.stderr
    first, again = map(int, done.stdout.split())
    assert again < first / 10, f"{first} page faults the first time, {again} later"


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
