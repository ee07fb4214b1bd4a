"""Tests under Triton's interpreter run in a child process: their outcomes reach the session, whatever they are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from savl.ops.library import TRITON_MISSING

TESTS = """
import os
import pytest

def test_passes():
    assert os.environ["TRITON_INTERPRET"] == "1"

@pytest.mark.parametrize("given", ["with/a slash"])
def test_fails(given):
    assert given == "another"

def test_ends_the_process():
    print("the last words")
    os._exit(3)

def test_is_skipped():
    pytest.skip("for a reason")

def test_passes_after_the_process_has_ended():
    pass
"""


@pytest.mark.skipif(TRITON_MISSING is not None, reason=str(TRITON_MISSING))
def test_outcomes_of_the_child_process_are_those_of_the_session(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "kernels" / "interpreted"
    folder.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    shutil.copy(Path(__file__).with_name("interpreted") / "conftest.py", folder)
    (folder / "test_outcomes.py").write_text(TESTS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests"],
                          cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert "2 failed, 2 passed, 1 skipped" in done.stdout, done.stdout
    assert "AssertionError: assert 'with/a slash' == 'another'" in done.stdout
    assert "the process ended with code 3 in this test" in done.stdout
    assert "for a reason" in done.stdout
