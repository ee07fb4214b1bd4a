"""docs/environment.md lists every environment variable that savl reads."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("savl/**/*.py", "kernels/**/*.py", "csrc/**/*.cpp", "csrc/**/*.h", "tests/**/*.py", "setup.py")


def test_the_page_lists_every_variable_and_no_other() -> None:
    read = re.compile(r"""(?:environ(?:\.get)?[(\[]|getenv\()\s*"(SAVL_\w+)"|VARIABLE = "(SAVL_\w+)\"""")
    found = {
        name
        for pattern in SOURCES
        for path in ROOT.glob(pattern)
        for match in read.findall(path.read_text(encoding="utf-8"))
        for name in match
        if name
    }
    assert {"SAVL_KERNELS", "SAVL_CPU_INSTRUCTION_SET", "SAVL_NO_EXTENSION"} <= found, "the search finds too little"
    listed = set(
        re.findall(r"^\| `(SAVL_\w+)`", (ROOT / "docs/environment.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert listed == found
