"""The machine code of `attention.forward`: instructions, registers, and what the interpreter does not show.

Everything is compiled ahead of time for sm_90; no GPU is needed.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

from savl.kernels import machine_code
from savl.kernels.configs import Problem, stages_of
from savl.ops.library import INTERPRETED

HOPPER = (9, 0)
ODD = Problem("bfloat16", 30, 16, 16)
"""A problem whose rows are not whole vectors of 16 bytes."""
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or INTERPRETED, reason="needs Triton's compiler"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile anew."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@needs_compiler
@pytest.mark.parametrize(
    ("key_window", "shifted", "limit"),
    [(16, False, 540), (16, True, 540), (24, False, 620)],
    ids=["window", "window, shifted", "overlapping"],
)
def test_forward_of_savl_base_stays_below_its_limits(key_window: int, shifted: bool, limit: int) -> None:
    found = machine_code.count_forward(Problem("bfloat16", 24, 16, key_window), None, HOPPER, shifted=shifted)
    assert found.loop <= limit, "instructions per 64 scores in the loop over keys"
    assert found.resources.registers <= 128
    assert not found.resources.spills
    assert found.warps >= 16, "resident warps of a multiprocessor"
    assert found.seconds["exponentials"] < found.predicted < 1e-3


@needs_compiler
@pytest.mark.parametrize("shifted", [False, True])
def test_the_bias_is_loaded_through_the_read_only_cache(shifted: bool) -> None:
    from savl.kernels import compile_ahead_of_time

    problem = Problem("bfloat16", 24, 16, 16)
    launches = compile_ahead_of_time.launches(problem, HOPPER, severity=True, shifted=shifted)
    compiled = compile_ahead_of_time.compile_launch(launches["forward"], HOPPER)
    (program,) = machine_code.disassemble(compiled.asm["cubin"]).values()
    loops = machine_code.loops(program)
    assert len(loops) == 1 + shifted
    for first, last in loops:
        opcodes = [each.opcode for each in program[first : last + 1]]
        # A tile of 128×64 with 8 warps has 32 scores per thread, some with the same offset.
        assert 16 <= opcodes.count("LDG.E.CONSTANT") <= 32
        # Loads by tl.load would go through shared memory, with a barrier each.
        assert sum(opcode.startswith("BAR") for opcode in opcodes) <= 3


@needs_compiler
@pytest.mark.parametrize("stage", stages_of(ODD, HOPPER))
@pytest.mark.parametrize("heads", [6, 4])
def test_offsets_of_keys_that_are_not_whole_vectors_do_not_spill(stage: str, heads: int) -> None:
    """With 6 heads of 30 channels k begins 360 bytes after q, not a multiple of 16; with 4 heads 240 bytes."""
    from savl.kernels import compile_ahead_of_time

    launches = compile_ahead_of_time.launches(ODD, HOPPER, severity=True, shifted=True, heads=heads)
    source, _ = compile_ahead_of_time.source(launches[stage], HOPPER)
    place = launches[stage].kernel.arg_names.index("k")
    assert ((place,) in source.attrs) is (heads == 4), "whether k is compiled for addresses of whole 16 bytes"
    used = compile_ahead_of_time.read_resources(compile_ahead_of_time.compile_launch(launches[stage], HOPPER))
    assert not used.spills
    assert used.programs(HOPPER) >= 1


@pytest.mark.parametrize("along", [1, 2, 3, 32])
@pytest.mark.parametrize("overlapping", [False, True])
def test_the_share_of_windows_at_the_edge_is_counted(along: int, overlapping: bool) -> None:
    edges = {along - 1, 0} if overlapping else {along - 1}
    at_edge = sum(row in edges or column in edges for row in range(along) for column in range(along))
    assert math.isclose(machine_code.share_at_edge(along, overlapping), at_edge / along**2)
