"""`import savl` registers the ops with torch, whichever is imported first, and does not import torch itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from savl import ops
from savl.ops.library import EXTENSION_UNAVAILABLE

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

WITH_KERNELS = pytest.mark.skipif(EXTENSION_UNAVAILABLE is not None, reason=str(EXTENSION_UNAVAILABLE))


class EveryOp(nn.Module):
    """A program in which every op is called."""

    def forward(self, x: Tensor) -> Tensor:
        """``(1, 4, 4, 6)`` → ``(1, 4, 4, 6)``."""
        severity = ops.gaussian_posterior(x.permute(0, 3, 1, 2), 0.1 * x.permute(0, 3, 1, 2), seed=3).severity
        near = ops.window_attention(torch.cat((x, x, x), dim=-1), x.new_ones(9, 2), severity, window=2, shift=1)
        far = ops.overlapping_window_attention(
            near, torch.cat((x, near), dim=-1), x.new_ones(25, 2), severity, window=2, key_window=4
        )
        modulated = ops.channel_modulation(far, near, None, x)
        return ops.layer_norm(modulated, x.new_ones(6), x.new_zeros(6))


def example() -> Tensor:
    return torch.linspace(-1, 1, 96).sin().reshape(1, 4, 4, 6)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the program exported, traced, and what it gives."""
    folder = tmp_path_factory.mktemp("programs")
    model = EveryOp().eval()
    with ops.use_fused_kernels(), torch.no_grad():
        exported = torch.export.export(model, (example(),))
        traced = torch.jit.trace(model, (example(),))
        torch.save(model(example()), folder / "expected.pt")
    called = {str(node.target) for node in exported.graph.nodes if "savl" in str(node.target)}
    assert len(called) == 5, called
    torch.export.save(exported, folder / "fused.pt2")
    traced.save(folder / "fused.ts")
    return folder


LOAD = """
expected = torch.load("expected.pt")
x = torch.linspace(-1, 1, 96).sin().reshape(1, 4, 4, 6)
assert torch.equal(torch.jit.load("fused.ts")(x), expected)
print("the same")
"""
# torch.export takes seconds to import: one test shows that its files load too.
LOAD_EXPORTED = """
assert torch.equal(torch.export.load("fused.pt2").module()(x), expected)
print("the same")
"""

ORDERS = {
    "torch first": "import torch\nimport savl\n",
    "a failed import before": (
        "import savl, sys\nsys.modules['torch'] = None\ntry:\n    import torch\nexcept ImportError:\n    pass\n"
        "del sys.modules['torch']\nimport torch\n"
    ),
    "in threads": (
        "import threading\nimport savl\n"
        "jobs = [threading.Thread(target=__import__, args=(n,)) for n in ('torch', 'savl.ops', 'torch.export')]\n"
        "[job.start() for job in jobs]\n[job.join() for job in jobs]\nimport torch\n"
    ),
}


def run_python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@WITH_KERNELS
@pytest.mark.parametrize("order", ORDERS)
def test_programs_with_fused_ops_load_after_import_savl(order: str, programs: Path) -> None:
    done = run_python(ORDERS[order] + LOAD, programs)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the same\n"


@WITH_KERNELS
def test_programs_with_fused_ops_load_in_a_module_run_by_name(programs: Path) -> None:
    code = "import savl\nfrom torch.export import load\nimport torch\n" + LOAD + LOAD_EXPORTED
    (programs / "application.py").write_text(code, encoding="utf-8")
    done = run_python("import runpy; runpy.run_module('application', run_name='__main__')", programs)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the same\n" * 2


@WITH_KERNELS
@pytest.mark.slow
def test_an_aotinductor_package_with_fused_ops_loads_after_import_savl(tmp_path: Path) -> None:
    with ops.use_fused_kernels(), torch.no_grad():
        exported = torch.export.export(EveryOp().eval(), (example(),))
        expected = EveryOp()(example())
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "fused.pt2"))
    torch.save(expected, tmp_path / "expected.pt")
    code = f"""
import savl, torch
run = torch._inductor.aoti_load_package({package!r})
found = run(torch.linspace(-1, 1, 96).sin().reshape(1, 4, 4, 6))
torch.testing.assert_close(found, torch.load("expected.pt"))
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


@WITH_KERNELS
def test_without_the_extension_a_program_loads_and_says_what_it_lacks(programs: Path) -> None:
    code = """
import sys
sys.modules["savl._C"] = None
import savl, torch
x = torch.linspace(-1, 1, 96).sin().reshape(1, 4, 4, 6)
for program in (torch.export.load("fused.pt2").module(), torch.jit.load("fused.ts")):
    try:
        program(x)
    except Exception as error:
        assert "savl was installed without its C++ extension" in str(error), error
        assert "savl.use_fused_kernels(False)" in str(error), error
    else:
        raise AssertionError("it ran")
"""
    done = run_python(code, programs)
    assert done.returncode == 0, done.stderr


def test_import_savl_leaves_torch_as_it_is(tmp_path: Path) -> None:
    code = """
import importlib.util, sys
before = list(sys.meta_path)
import savl
assert "torch" not in sys.modules
assert importlib.util.find_spec("no_such_module_anywhere") is None
assert importlib.util.find_spec("torch").loader is not None
import importlib
importlib.reload(savl)
assert len(sys.meta_path) == len(before) + 1, "a reload adds another finder"
import torch, inspect
assert sys.meta_path == before, "the finder stays after its work"
assert type(torch.__loader__).__name__ == "SourceFileLoader"
assert "exec_module" not in vars(torch.__loader__)
assert inspect.getsource(torch)
assert hasattr(torch.ops.savl, "window_attention")
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("variable", ["SAVL_KERNELS", "SAVL_CPU_INSTRUCTION_SET"])
def test_a_malformed_setting_does_not_end_the_import_of_torch(variable: str, tmp_path: Path) -> None:
    if variable == "SAVL_CPU_INSTRUCTION_SET" and EXTENSION_UNAVAILABLE is not None:
        pytest.skip(EXTENSION_UNAVAILABLE)
    code = """
import savl, torch
for attempt in range(2):
    try:
        savl.use_fused_kernels()
    except Exception as error:
        print(type(error).__name__)
"""
    done = run_python(code, tmp_path, **{variable: "nonsense"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["EnvironmentVariableError"] * 2
