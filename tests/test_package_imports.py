"""Imports between the packages of savl go one way, as docs/architecture.md says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ALLOWED = {
    "images": set(),
    "kernels": set(),
    "ops": {"kernels"},
    "network": {"ops"},
    "weights": {"network", "ops"},
    "inference": {"images", "network", "ops", "weights"},
    "degradation": {"images"},
    "evaluation": {"degradation", "images", "inference", "network"},
    "training": {"degradation", "evaluation", "images", "network", "ops", "weights"},
    "analysis": {"degradation", "evaluation", "images", "inference", "network", "ops", "weights"},
}
"""Packages that each package may import. Modules directly under savl/ are open to all; those of cli to none."""


def imported_packages(path: Path) -> set[str]:
    """Return the packages of savl that a file imports, anywhere in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "savl":
            names += [f"savl.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            names.append(node.module)
    packages = (name.split(".")[1] for name in names if name.startswith("savl."))
    return {package for package in packages if (ROOT / "savl" / package).is_dir() or package == "kernels"}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_those_below_it(package: str) -> None:
    folder = ROOT / "kernels" if package == "kernels" else ROOT / "savl" / package
    files = sorted(folder.rglob("*.py"))
    assert files
    wrong = {
        str(path.relative_to(ROOT)): sorted(imported)
        for path in files
        if (imported := imported_packages(path) - ALLOWED[package] - {package})
    }
    assert not wrong, f"{package} may import only {sorted(ALLOWED[package])}"


def test_nothing_imports_the_command_line() -> None:
    files = [path for path in (ROOT / "savl").rglob("*.py") if path.parent.name != "cli" and path.name != "__main__.py"]
    wrong = [str(path.relative_to(ROOT)) for path in files if "cli" in imported_packages(path)]
    assert not wrong
