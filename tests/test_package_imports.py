"""Check that each part of savl imports only the parts that a table allows. The table has no cycles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("savl/**/*.py"), *ROOT.glob("kernels/**/*.py")])

# Modules that import nothing of savl except each other. Every part may import them.
BASE = {"atomic_write", "bicubic", "interrupts", "out_of_memory", "printable", "settings", "version"}
# For each part (a package or module directly under savl/), the parts that it may import besides BASE.
ALLOWED = {
    "kernels": set(),
    "build_info": set(),
    "ops": {"build_info", "kernels"},
    "images": set(),
    "network": {"ops"},
    "weights": {"network", "ops"},
    "accelerate": {"network", "ops", "weights"},
    "degradation": {"images"},
    "inference": {"accelerate", "images", "network", "ops", "weights"},
    "evaluation": {"degradation", "images", "inference", "network", "ops", "weights"},
    "training": {"degradation", "evaluation", "images", "inference", "network", "ops", "weights"},
    "analysis": {"degradation", "evaluation", "images", "inference", "network", "ops", "weights"},
    "export": {"inference", "network", "ops", "weights"},
    "service": {"images", "inference", "network", "ops", "weights"},
    "distributed": {"images", "inference", "network", "ops", "weights"},
    "video": {"images", "inference", "network", "ops", "weights"},
    "command_line": set(),
    "profile": {"command_line", "inference", "network", "ops", "training", "weights"},
    "torch_import": {"ops"},
    "__init__": {"accelerate", "export", "inference", "network", "ops", "torch_import", "weights"},
}
# The commands and the local page may import everything below them. Nothing imports these two, except savl/__main__.py.
ALLOWED["web"] = {"video"}.union(*ALLOWED.values())
ALLOWED["cli"] = {"analysis", "distributed", "evaluation", "export", "profile", "service", "training", "video", "web"}
ALLOWED["cli"] |= ALLOWED["web"]
ALLOWED["__main__"] = {"cli"}


def part_of(path: Path) -> str:
    """Return the part that a file belongs to."""
    first, *rest = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if first == "kernels" else rest[0]


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full name of every import in a file, also in functions and under TYPE_CHECKING.

    After ``import savl``, every use of an attribute ``savl.name`` counts as an import of ``savl.name``.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name != "savl":
                    yield node.lineno, alias.name
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "savl":
            yield node.lineno, f"savl.{node.attr}"
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


def forbidden_imports(path: Path) -> Iterator[str]:
    """Yield file, line, and importing and imported part of every import that the table does not allow."""
    part = part_of(path)
    allowed = BASE if part in BASE else ALLOWED[part] | BASE
    for line, name in imported_modules(path):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package != "savl" or target in (part, "__version__") or target.startswith("_C"):
            continue
        if target not in allowed:
            yield f"{path.relative_to(ROOT)}:{line}: {part} -> {target} ({name})"


def test_every_part_is_in_the_table() -> None:
    assert {part_of(path) for path in SOURCES} <= {*ALLOWED, *BASE}


def test_the_table_has_no_cycle() -> None:
    below: dict[str, set[str]] = {}
    while len(below) < len(ALLOWED):
        ready = [part for part, targets in ALLOWED.items() if part not in below and targets <= below.keys()]
        assert ready, f"a cycle among {sorted(ALLOWED.keys() - below.keys())}"
        below |= {part: ALLOWED[part] for part in ready}


def test_imports_follow_the_table() -> None:
    found = [line for path in SOURCES for line in forbidden_imports(path)]
    assert not found, "\n".join(["imports that the table in tests/test_package_imports.py does not allow:", *found])


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("savl/network/hab.py", "def f():\n    import savl\n    savl.load('x')", "network -> load (savl.load)"),
        ("savl/images/write.py", "from savl.inference import tiling", "images -> inference (savl.inference.tiling)"),
        ("savl/ops/switch.py", "from savl import cli", "ops -> cli (savl.cli)"),
        ("savl/network/hab.py", "import savl.kernels.attention", "network -> kernels (savl.kernels.attention)"),
        ("savl/settings.py", "if TYPE_CHECKING:\n    from savl.ops import switch", "settings -> ops (savl.ops.switch)"),
    ],
)
def test_a_forbidden_import_is_reported_with_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, source: str, expected: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    last = len(source.splitlines())
    assert list(forbidden_imports(path)) == [f"{file}:{last}: {expected}"]
