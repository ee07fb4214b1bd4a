"""Every kernel compiles for GPUs that need not be there, spills no register and fits into shared memory.

`python -m benchmarks.predicted.triton_resources` compiles all kernels for all architectures. The committed figures must
keep the limits, and their hash must be that of the current source. To check that the figures are those of the compiler,
every test run compiles each kernel of savl-base at least once, among them those that need the most registers.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.predicted import feature_rows, resource_page, triton_resources
from benchmarks.predicted.feature_rows import FeatureRow
from benchmarks.predicted.triton_resources import COMMITTED, Row
from savl.kernels import configs
from savl.kernels.configs import STAGES, KernelConfig, Problem, default_config, kernels_hash, stages_of
from savl.kernels.targets import AMD, Architecture, named_target, target_of
from savl.network import CONFIGS
from savl.ops.library import INTERPRETED

COMPILED_HERE = {
    ((8, 0), "forward", "float16", 16),
    ((8, 0), "backward_q", "float16", 16),
    ((9, 0), "forward", "bfloat16", 16),
    ((9, 0), "backward_qkv", "bfloat16", 16),
    ((9, 0), "backward_kv", "bfloat16", 24),
    ((9, 0), "fold_bias", "bfloat16", 24),
    ((10, 0), "forward", "bfloat16", 24),
    ((10, 0), "backward_bias", "bfloat16", 24),
    ("gfx942", "forward", "bfloat16", 16),
    ("gfx942", "backward_kv", "bfloat16", 16),
    ("gfx1100", "forward", "bfloat16", 24),
    ("gfx1100", "backward_q", "bfloat16", 24),
}
"""Architecture, kernel, dtype and key window of the compilations; the head dimension is that of savl-base."""
REWRITE = f"run `python -m benchmarks.predicted.triton_resources --json {COMMITTED.relative_to(triton_resources.ROOT)}`"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or INTERPRETED, reason="needs Triton's compiler"
)


def compiled_here(row: Row) -> bool:
    base = CONFIGS["savl-base"]
    if row.source != triton_resources.RULE or row.heads != base.heads:
        return False
    problem = row.problem
    if (problem.head_dim, problem.window) != (base.channels // base.heads, base.window):
        return False
    return (row.architecture, row.kernel, problem.dtype, problem.key_window) in COMPILED_HERE


FEATURES_COMPILED_HERE = {
    ((9, 0), "float16"): {"normalise_pixels", "linear", "contract", "sums", "project_guided"},
    ((9, 0), "float32"): {"contract"},
    ("gfx942", "bfloat16"): {"normalise_pixels_backward", "expand", "finish_block"},
    ("gfx1100", "bfloat16"): {"linear", "contract", "pack", "gates"},
}
"""Kernels of the compilations by architecture and dtype; each kernel with the first shape that it has."""


def feature_compiled_here(row: FeatureRow) -> bool:
    first = next(shape for shape in feature_rows.SHAPES if row.kernel in shape.kernels)
    return row.shape == first and row.kernel in FEATURES_COMPILED_HERE.get((row.architecture, row.dtype), ())


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(COMMITTED.read_text(encoding="utf-8"))
    return content


def facts_of(row: dict[str, Any]) -> str:
    measured = ("registers", "stack", "shared", "tensor_memory", "programs", "warps")
    return json.dumps({name: value for name, value in row.items() if name not in measured})


@pytest.mark.slow
@needs_triton
def test_shipped_block_sizes_neither_spill_nor_exceed_shared_memory(committed: dict[str, Any]) -> None:
    import triton

    wanted = triton_resources.rows(wanted=compiled_here)
    assert len(wanted) == len(COMPILED_HERE)
    assert {row.kernel for row in wanted} == {*STAGES, "fold_bias"}
    others = feature_rows.rows(triton_resources.ARCHITECTURES, triton_resources.DTYPES, feature_compiled_here)
    assert {row.kernel for row in others} == {kernel for shape in feature_rows.SHAPES for kernel in shape.kernels}
    measured = triton_resources.compile_rows([*wanted, *others])
    assert triton_resources.faults(measured) == []
    if triton.__version__ == committed["triton"]:
        known = {facts_of(row): row for row in committed["rows"]}
        changed = [
            f"{triton_resources.named(row)} on {row['gpu']}" for row in measured if row != known.get(facts_of(row))
        ]
        assert not changed, f"the committed figures are others for {changed}: {REWRITE}"


def test_committed_table_has_every_shipped_configuration_and_no_other(committed: dict[str, Any]) -> None:
    wanted = [json.dumps(row.facts()) for row in triton_resources.all_rows()]
    assert [facts_of(row) for row in committed["rows"]] == wanted, REWRITE


def test_committed_table_is_of_these_kernels(committed: dict[str, Any]) -> None:
    assert committed["hashes"] == triton_resources.hashes(), f"the kernels have changed: {REWRITE}"


def test_committed_table_of_triton_3_6_is_of_these_kernels_and_has_no_spill() -> None:
    content = json.loads(triton_resources.OF_TRITON_3_6.read_text(encoding="utf-8"))
    assert content["triton"].startswith("3.6.")
    assert content["hashes"] == triton_resources.hashes(), "measure again with Triton 3.6"
    wanted = [row.facts() for row in triton_resources.all_rows()]
    wanted = [row for row in wanted if (row["gpu"], row["dtype"]) == ("sm_90", "bfloat16")]
    assert [facts_of(row) for row in content["rows"]] == [json.dumps(row) for row in wanted]
    assert not [row for row in content["rows"] if row["stack"]]


def test_hashes_cover_the_files_of_all_kernels() -> None:
    names = {name for files in feature_rows.FILES.values() for name in files} | set(configs.ATTENTION_FILES)
    kernels = {
        path.stem for path in feature_rows.KERNELS.glob("*.py") if "@triton.jit" in path.read_text(encoding="utf-8")
    }
    assert kernels <= names
    assert feature_rows.FILES.keys() == {shape.op for shape in feature_rows.SHAPES}


@needs_triton
def test_committed_table_has_no_spill_and_room_for_two_programs_or_eight_warps_everywhere(
    committed: dict[str, Any],
) -> None:
    assert triton_resources.faults(committed["rows"]) == []
    crowded = [triton_resources.named(row) for row in committed["rows"] if row["programs"] < 2 and row["warps"] < 8]
    assert not crowded, "one program of few warps alone on a multiprocessor has nothing to hide its latency"


def test_page_agrees_with_the_committed_figures() -> None:
    page = resource_page.PAGE.read_text(encoding="utf-8")
    assert resource_page.filled(page) == page, "run `python -m benchmarks.predicted.resource_page`"
    assert "| `backward_kv` |" in page


def test_configurations_shipped_for_single_gpus_are_in_the_set(tmp_path: Path) -> None:
    from savl.kernels.configs import Tuned, dump_store

    problem = Problem("bfloat16", 24, 16, 24)
    tuned = Tuned("forward", problem, KernelConfig(32, 64, 2, 3), 1.0, 2.0, kernels_hash(), "3.9.0", "2026-01-31")
    (tmp_path / "gpu.json").write_bytes(dump_store("NVIDIA H100 80GB HBM3", [tuned]))
    expected = Row("forward", problem, 6, (9, 0), tuned.config, "NVIDIA H100 80GB HBM3")
    assert list(triton_resources.shipped(tmp_path)) == [expected]

    (tmp_path / "gpu.json").write_bytes(dump_store("NVIDIA Unheard-of 9000", [tuned]))
    with pytest.raises(ValueError, match="Unheard-of"):
        list(triton_resources.shipped(tmp_path))


@needs_triton
@pytest.mark.parametrize(
    ("capability", "kib"),
    [((8, 0), 163), ((8, 6), 99), ((8, 9), 99), ((9, 0), 227), ((10, 0), 227), ((12, 0), 99)],
)
def test_shared_memory_of_a_program_is_limited_as_cuda_says(capability: tuple[int, int], kib: int) -> None:
    from savl.kernels.compile_ahead_of_time import shared_memory_limit

    assert shared_memory_limit(capability) == kib * 1024


@needs_triton
def test_unknown_gpus_count_as_the_least_of_their_relatives() -> None:
    from savl.kernels.compile_ahead_of_time import shared_memory_limit

    assert shared_memory_limit((9, 7)) == 227 * 1024
    assert shared_memory_limit((99, 0)) == 64 * 1024


@needs_triton
@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [
        (128, 0, 4, 4),  # 65536 / (128 · 128)
        (129, 0, 4, 3),  # registers come in eights a thread
        (255, 0, 8, 1),
        (32, 0, 4, 16),  # 64 warps
        (32, 0, 1, 32),  # 32 programs
        (32, 100 * 1024, 4, 2),
        (32, 227 * 1024, 4, 1),
    ],
)
def test_programs_a_multiprocessor_are_what_the_scarcest_resource_allows(
    registers: int, shared: int, warps: int, programs: int
) -> None:
    from savl.kernels.compile_ahead_of_time import Resources

    assert Resources(registers, 0, shared, warps).programs((9, 0)) == programs


@needs_triton
def test_tensor_memory_limits_programs_on_blackwell() -> None:
    from savl.kernels.compile_ahead_of_time import Resources

    assert Resources(32, 0, 0, 4, tensor_memory=256).programs((10, 0)) == 2


@needs_triton
@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "warps", "programs"),
    [
        ("gfx942", 128, 0, 4, 4),  # 512 registers a thread, and a program has a warp on each of four SIMDs
        ("gfx942", 129, 0, 4, 3),  # registers come in eights
        ("gfx942", 512, 0, 4, 1),
        ("gfx942", 32, 0, 1, 16),
        ("gfx942", 32, 33 * 1024, 4, 1),
        ("gfx1100", 250, 0, 4, 5),  # 1536 registers a thread, which come in 24s
        ("gfx1100", 64, 0, 4, 16),
        ("gfx1100", 64, 64 * 1024, 4, 2),
    ],
)
def test_programs_of_a_unit_of_amd_are_what_the_scarcest_resource_allows(
    architecture: str, registers: int, shared: int, warps: int, programs: int
) -> None:
    from savl.kernels.compile_ahead_of_time import Resources

    assert Resources(registers, 0, shared, warps).programs(architecture) == programs


def test_architectures_that_are_not_in_the_table_are_refused() -> None:
    with pytest.raises(ValueError, match="one of gfx942, gfx1100, got 'gfx803'"):
        target_of("gfx803")


def test_targets_are_found_by_their_names() -> None:
    assert [named_target(name) for name in AMD] == list(AMD.values())
    assert named_target("sm_90") == target_of((9, 0))
    assert named_target("sm_120") == target_of((12, 0))


@needs_compiler
@pytest.mark.parametrize("architecture", list(AMD))
def test_kernels_for_amd_have_no_ptx_and_the_occupancy_that_llvm_computes(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from savl.kernels import compile_ahead_of_time

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    problem = Problem("float16", 24, 8, 8)
    recorded = compile_ahead_of_time.launches(problem, architecture, severity=True, shifted=True)
    kernel = compile_ahead_of_time.compile_launch(recorded["forward"], architecture)
    used = compile_ahead_of_time.read_resources(kernel)
    assert "ld.global.nc" not in kernel.asm["llir"]
    assert kernel.asm["hsaco"].startswith(b"\x7fELF")
    assert used.stack == 0
    waves = re.search(r"; Occupancy: (\d+)", kernel.asm["amdgcn"])  # of a SIMD; each program has one on each
    assert waves is not None
    assert used.warps == 4
    assert used.programs(architecture) == int(waves[1])


@needs_compiler
@pytest.mark.filterwarnings("error::UserWarning:triton")
@pytest.mark.parametrize(
    ("kernel", "dtype", "large", "architecture"),
    [
        ("backward_kv", "bfloat16", KernelConfig(64, 64, 2, 1), (9, 0)),
        ("forward", "float32", KernelConfig(32, 32, 2, 1), "gfx1100"),
    ],
)
def test_a_spill_is_seen(
    kernel: str,
    dtype: str,
    large: KernelConfig,
    architecture: Architecture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from savl.kernels.compile_ahead_of_time import resources

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    used = resources(kernel, Problem(dtype, 24, 16, 16), large, architecture, severity=True, shifted=True)
    assert used.spills
    assert used.stack > 0


@needs_compiler
@pytest.mark.parametrize("architecture", [(9, 0), *AMD])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "window", "key_window"),
    [("bfloat16", 24, 16, 16), ("float32", 30, 16, 24), ("float16", 30, 8, 8), ("bfloat16", 30, (4, 16), (4, 16))],
)
def test_kernels_are_compiled_with_the_specialisations_of_a_launch(
    dtype: str,
    head_dim: int,
    window: int | tuple[int, int],
    key_window: int | tuple[int, int],
    architecture: Architecture,
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from savl.kernels import compile_ahead_of_time

    target = target_of(architecture)
    backend = make_backend(GPUTarget(target.backend, target.architecture, target.warp))
    problem = Problem(dtype, head_dim, window, key_window)
    recorded = compile_ahead_of_time.launches(problem, architecture, severity=True, shifted=window == key_window)
    assert list(recorded) == [*stages_of(problem, architecture), "fold_bias"]
    for launched in recorded.values():
        kernel, constants = launched.kernel, dict(launched.constants)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialisation, options = bind(*launched.arguments, **constants)
        _, signature, constexprs, attributes = kernel._pack_args(backend, constants, bound, specialisation, options)
        ours, ours_options = compile_ahead_of_time.source(launched, architecture)
        assert ours.signature == signature
        assert ours.constants == constexprs
        assert ours.attrs == {place: value for place, value in attributes.items() if value}
        assert ours_options == options


@needs_compiler
@pytest.mark.parametrize(
    ("stage", "problem", "mask", "capability"),
    [
        ("forward", Problem("bfloat16", 30, 8, 8, cosine=True), -math.inf, (9, 0)),
        ("backward_kv", Problem("float16", 30, 16, 16, cosine=True), -100.0, (8, 0)),
        ("backward_kv", Problem("float16", 30, 16, 16), -100.0, (9, 0)),
        ("backward_qkv", Problem("bfloat16", 24, 16, 16), -100.0, (9, 0)),
        ("backward_qkv", Problem("float16", 30, 8, 8), -100.0, (9, 0)),
        ("backward_q", Problem("bfloat16", 15, (8, 32), (8, 32), "none"), -math.inf, (8, 9)),
        ("backward_kv", Problem("float32", 53, 24, 12, "dense"), -math.inf, (12, 0)),
        ("backward_bias", Problem("float16", 122, 32, 32, "dense"), -100.0, (10, 0)),
    ],
)
def test_kernels_with_other_traits_neither_spill_nor_exceed_shared_memory(
    stage: str,
    problem: Problem,
    mask: float,
    capability: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from savl.kernels.compile_ahead_of_time import Traits, resources, shared_memory_limit

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    severity, traits = problem.window == problem.key_window, Traits(mask=mask)
    used = resources(stage, problem, None, capability, severity=severity, shifted=True, traits=traits)
    assert not used.spills
    assert used.shared <= shared_memory_limit(capability)
    assert used.programs(capability) >= 1


@needs_compiler
def test_a_kernel_runs_for_each_gradient_that_is_wanted() -> None:
    from savl.kernels.compile_ahead_of_time import Traits, launches

    missing_for: dict[str, set[str]] = {"table": set(), "dense": {"fold_bias"}, "none": {"backward_bias", "fold_bias"}}
    for bias, missing in missing_for.items():
        problem = Problem("bfloat16", 16, (4, 8), (2, 8), bias)
        recorded = launches(problem, (9, 0), severity=False, shifted=False, traits=Traits(overlapping=False))
        assert recorded.keys() == {*STAGES, "fold_bias"} - {"backward_qkv"} - missing


@pytest.mark.parametrize(
    ("block_n", "key_window", "margin", "tile"),
    [
        (128, (16, 16), 0, (8, 16)),
        (64, (24, 24), 4, (8, 8)),
        (64, (12, 12), 2, (8, 8)),
        (64, (4, 16), 0, (4, 16)),
        (128, (32, 8), 0, (16, 8)),
        (32, (1, 32), 0, (1, 32)),
        (32, (5, 5), 0, (4, 8)),
        (16, (4, 2), 0, (4, 4)),
    ],
)
@needs_triton
def test_tiles_of_keys_meet_few_windows(
    block_n: int, key_window: tuple[int, int], margin: int, tile: tuple[int, int]
) -> None:
    from savl.kernels.launch import key_tile

    assert key_tile(block_n, key_window, margin) == tile


@needs_triton
@pytest.mark.parametrize(
    ("tile", "key_window", "margin", "seen", "unaligned"),
    [(8, 24, 4, 1.5, 2.0), (4, 12, 2, 1.5, 2.0), (16, 24, 4, 2.0, 3.0), (16, 16, 0, 1.0, 1.0), (8, 24, 0, 1.0, 1.0)],
)
def test_tiles_of_keys_that_begin_at_the_margin_meet_fewer_windows(
    tile: int, key_window: int, margin: int, seen: float, unaligned: float
) -> None:
    from savl.kernels.launch import windows_seen

    def mean(numbers: list[int]) -> float:
        return sum(numbers) / len(numbers)

    def meets(first: int) -> int:
        step = key_window - 2 * margin
        return sum(row * step - margin < first + tile and first < (row + 1) * step + margin for row in range(-2, 200))

    step = key_window - 2 * margin
    assert windows_seen(tile, key_window, margin) == [
        meets(first) for first in range(margin, margin + math.lcm(tile, step), tile)
    ]
    assert mean(windows_seen(tile, key_window, margin)) == seen
    assert mean([meets(first) for first in range(0, math.lcm(tile, step), tile)]) == unaligned


@pytest.mark.parametrize(
    ("problem", "capability", "together"),
    [
        (Problem("bfloat16", 24, 16, 16), (9, 0), True),
        (Problem("float16", 30, 8, 8), (9, 0), True),
        (Problem("bfloat16", 24, 16, 24), (9, 0), False),  # keys that several windows see
        (Problem("bfloat16", 24, 16, 16), (8, 0), False),
        (Problem("float32", 24, 16, 16), (9, 0), False),
        (Problem("bfloat16", 24, 24, 24), (9, 0), False),
        (Problem("bfloat16", 122, 16, 16), (9, 0), False),
    ],
)
def test_one_kernel_computes_the_gradients_of_equal_windows_where_it_spills_nothing(
    problem: Problem, capability: tuple[int, int], together: bool
) -> None:
    stages = stages_of(problem, capability)
    assert ("backward_qkv" in stages) is together
    assert ("backward_q" in stages) is ("backward_kv" in stages) is not together
    assert stages[0] == "forward"
    assert stages[-1] == "backward_bias"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 64, 128])
def test_the_rule_has_block_sizes_for_every_head_dimension(dtype: str, head_dim: int) -> None:
    for stage in STAGES:
        for window, key_window in ((2, 3), (8, 12), (16, 24)):
            config = default_config(stage, Problem(dtype, head_dim, window, key_window), (9, 0))
            assert config.block_m >= 16
            assert config.block_n >= 16


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
@pytest.mark.parametrize(("op", "channels"), [("linear", 144), ("guided", 144), ("end", 144), ("end", 180)])
def test_kernels_of_linear_layers_neither_spill_nor_exceed_shared_memory(
    op: str, channels: int, capability: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from savl.kernels import convolution, guided_projection, launch, projection_mlp
    from savl.kernels.compile_ahead_of_time import Launch, compile_launch, read_resources, shared_memory_limit

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    recorded: list[Launch] = []

    def record(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        recorded.append(Launch(kernel, arguments, {**constants, **launch.OPTIONS}))

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    image, wide = (1, 48, 48), 2 * channels
    x, square, line = numbers(*image, channels), numbers(channels, channels), numbers(channels)
    if op == "linear":
        normed = (numbers(3 * channels, channels), numbers(3 * channels), line, line)
        convolution.convolution(x, *normed, *[None] * 4, 1, 0, 0.0, 1e-5, False, False, launch=record)
    elif op == "guided":
        guide = (numbers(*image, 64), numbers(wide, 64), numbers(wide))
        guided_projection.guided_projection(x, square, line, x, *guide, launch=record)
    else:
        convolved = (numbers(*image, 6), numbers(channels, 6, 3, 3), line, numbers(1, 3, 3, channels))
        mlp = (line, line, numbers(wide, channels), numbers(wide), numbers(channels, wide), line)
        projection_mlp.projection_mlp(x, square, line, x, *convolved, *mlp, 1e-5, launch=record)
    used = read_resources(compile_launch(recorded[0], capability))
    assert not used.spills
    assert used.shared <= shared_memory_limit(capability)
    assert used.programs(capability) >= 1
