"""Compile kernels for any GPU without having one, and read off registers, stack and shared memory.

A kernel is compiled as `savl.kernels.launch` launches it: with the same constants, and the properties of the other
arguments that Triton specialises on (types, values of 1, multiples of 16). To get them, the launches of small tensors
are recorded instead of executed. Triton includes the assemblers and the tool that reads NVIDIA's machine code; neither
the CUDA toolkit nor ROCm is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from savl.kernels import launch
from savl.kernels.configs import STAGES, KernelConfig, Problem, as_pair, default_config, stages_of
from savl.kernels.launch import Pair
from savl.kernels.targets import Architecture, target_of

KERNELS = (*STAGES, "fold_bias")
"""Names of the attention kernels; ``fold_bias`` has no block sizes."""

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}
_ROWS_AND_COLUMNS = 3
"""Rows and columns of windows in the image whose launches are recorded. With windows of 8 its sides are no multiples of
16, the most general case."""


def shared_memory_limit(architecture: Architecture) -> int:
    """Return the largest shared memory of a program in bytes.

    Args:
        architecture: Architecture of the GPU.
    """
    return target_of(architecture).multiprocessor.shared_of_program


@dataclass(frozen=True)
class Resources:
    """Resources that a program of a compiled kernel uses."""

    registers: int
    """Registers per thread."""
    stack: int
    """Stack per thread in bytes. The kernels have no arrays, so these are spilled registers."""
    shared: int
    """Static and dynamic shared memory in bytes."""
    warps: int
    """Number of warps: more than the block sizes say where Triton specialises warps."""
    tensor_memory: int = 0
    """Columns of tensor memory, on data-centre Blackwell."""

    @property
    def spills(self) -> bool:
        """Whether registers are spilled to memory."""
        return self.stack > 0

    def programs(self, architecture: Architecture) -> int:
        """Return how many programs fit on a multiprocessor at once, as the vendors' occupancy calculators compute it.

        Args:
            architecture: Architecture of the GPU.
        """
        has = target_of(architecture).multiprocessor
        of_scheduler = has.registers // _round_up(max(1, self.registers), has.register_unit)
        fitting = [has.programs, has.warps // self.warps, 4 * of_scheduler // self.warps]
        if shared := _round_up(self.shared, has.shared_unit) + has.shared_reserved:
            fitting.append(has.shared // shared)
        if self.tensor_memory:
            fitting.append(has.tensor_memory // self.tensor_memory)
        return min(fitting)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@dataclass(frozen=True)
class Launch:
    """A recorded launch: a kernel and its arguments."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]
    """Compile-time arguments by name, and options of Triton."""


def resources(
    stage: str,
    problem: Problem,
    config: KernelConfig | None,
    architecture: Architecture,
    *,
    severity: bool,
    shifted: bool,
    heads: int = 6,
    traits: Traits | None = None,
) -> Resources:
    """Compile an attention kernel and return its resources. Triton caches what it has compiled.

    Args:
        stage: One of `KERNELS`.
        problem: The problem. Its dtype is also that of the bias table and the severity.
        config: Block sizes; None for those of the rule, and for ``fold_bias``, which has none.
        architecture: Architecture of the GPU.
        severity: Whether there is a severity map.
        shifted: Whether windows are shifted.
        heads: Attention heads, which decide what strides are multiples of 16.
        traits: As for `launches`.

    Raises:
        RuntimeError: Triton's interpreter is on.
        Exception: An error of Triton, where the kernel does not compile with these block sizes.
    """
    recorded = launches(
        problem,
        architecture,
        severity=severity,
        shifted=shifted,
        heads=heads,
        traits=traits,
        stages=STAGES,
        **{stage: config},
    )
    return read_resources(compile_launch(recorded[stage], architecture))


def recorded(run: Callable[[Callable[..., None]], object]) -> dict[str, Launch]:
    """Return the launches of kernels that process features, by name of the kernel.

    Args:
        run: Function that calls an op's kernels on tensors of the CPU, with its argument in place of a ``launch``.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    found: dict[str, Launch] = {}

    def record(kernel: Any, programs: Any, *arguments: Any, **constants: Any) -> None:
        found[_name(kernel)] = Launch(kernel, arguments, {**constants, **launch.OPTIONS})

    run(record)
    return found


@dataclass(frozen=True)
class Traits:
    """What an attention may have besides its `Problem`, severity and shift; by default what the networks have."""

    overlapping: bool | None = None
    """Whether the windows of keys are around those of queries; None for true where they are larger."""
    dilated: bool = False
    """Whether windows are dilated."""
    mask: float = float("-inf")
    """Value between sides of a shifted image."""


def launches(
    problem: Problem,
    architecture: Architecture,
    *,
    severity: bool,
    shifted: bool,
    heads: int = 6,
    traits: Traits | None = None,
    stages: tuple[str, ...] | None = None,
    **configs: KernelConfig | None,
) -> dict[str, Launch]:
    """Return the launches of a forward and a backward pass on tensors of the CPU, by name of the kernel.

    Without a bias there are no ``backward_bias`` and ``fold_bias``, and with a dense one there is no ``fold_bias``.

    Args:
        problem: The problem.
        architecture: Architecture of the GPU.
        severity: Whether there is a severity map.
        shifted: Whether windows are shifted.
        heads: Attention heads.
        traits: Further traits; None for those of the networks.
        stages: Kernels with block sizes to launch; None for those that run on this GPU.
        configs: Block sizes of some kernels; the others have those of the rule.
    """
    traits = traits or Traits()
    dtype = getattr(torch, problem.dtype)
    channels = heads * problem.head_dim
    window, key_window = as_pair(problem.window), as_pair(problem.key_window)
    larger = min(inner - outer for inner, outer in zip(key_window, window, strict=True))
    overlapping = larger > 0 if traits.overlapping is None else traits.overlapping

    def image(parts: int, step: Pair) -> tuple[Tensor, ...]:
        """Return the parts of a tensor, as the ops pass them."""
        size = [_ROWS_AND_COLUMNS * side for side in step]
        return torch.empty(1, *size, parts * channels, dtype=dtype).chunk(parts, dim=-1)

    def pixels() -> tuple[Tensor, ...]:
        if window == key_window:
            return image(3, window)
        return *image(1, window), *image(2, window if overlapping else key_window)

    bias = None
    if problem.bias == "table":
        spans = [outer + inner - 1 for outer, inner in zip(window, key_window, strict=True)]
        bias = torch.empty(spans[0] * spans[1], heads, dtype=dtype)
    elif problem.bias == "dense":
        bias = torch.empty(heads, problem.queries, problem.keys, dtype=dtype)
    call = _RecordedAttention(
        *pixels(),
        bias,
        torch.empty(1, *(_ROWS_AND_COLUMNS * side for side in window), dtype=dtype) if severity else None,
        window,
        key_window,
        heads,
        torch.empty(heads, dtype=dtype) if problem.cosine else None,
        (window[0] // 2, window[1] // 2) if shifted else (0, 0),
        larger // 2 if overlapping else 0,
        traits.dilated,
        traits.mask,
        recorded_stages=stages or stages_of(problem, architecture),
        configs={stage: configs.get(stage) or default_config(stage, problem, architecture) for stage in STAGES},
    )
    out, lse = launch.forward(call)
    launch.backward(call, out, lse, torch.empty_like(out), *pixels())
    return call.recorded


@dataclass(frozen=True)
class _RecordedAttention(launch.Attention):
    """A call whose launches are recorded instead of executed."""

    recorded_stages: tuple[str, ...] = ()
    configs: Mapping[str, KernelConfig] = field(default_factory=dict)
    recorded: dict[str, Launch] = field(default_factory=dict)

    def stages(self) -> tuple[str, ...]:
        return self.recorded_stages

    def config(self, stage: str) -> KernelConfig:
        return self.configs[stage]

    def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        self.recorded[_name(kernel)] = Launch(kernel, arguments, {**constants, **launch.OPTIONS})


def _name(kernel: Any) -> str:
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("the kernels are interpreted, not compiled: unset TRITON_INTERPRET")
    return str(kernel.fn.__name__)


def source(launched: Launch, architecture: Architecture) -> tuple[ASTSource, dict[str, Any]]:
    """Return what Triton would compile for a launch on a GPU, and the options.

    Args:
        launched: The launch. Its tensors are smaller than 2 GiB, for which AMD's compiler saves registers.
        architecture: Architecture of the GPU.
    """
    backend = make_backend(_gpu_target(architecture))
    kernel = launched.kernel
    values = dict(zip(kernel.arg_names, launched.arguments, strict=False))  # compile-time arguments follow
    options = {}
    for name, value in launched.constants.items():
        (values if name in kernel.arg_names else options)[name] = value
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            if found := backend.parse_attr(backend.get_tensor_specialization(value, align=True)):
                attributes[place,] = found
        elif isinstance(value, float) and not parameter.is_constexpr:
            signature[parameter.name] = "fp32"
            continue
        elif parameter.is_constexpr or value is None or value == 1:  # Triton always compiles None and 1 in
            signature[parameter.name] = "constexpr"
            constants[place,] = value
            continue
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def compile_launch(launched: Launch, architecture: Architecture) -> Any:
    """Compile the kernel of a launch; return Triton's CompiledKernel.

    Args:
        launched: The launch.
        architecture: Architecture of the GPU to compile for.
    """
    what, options = source(launched, architecture)
    return triton.compile(what, target=_gpu_target(architecture), options=options)


def _gpu_target(architecture: Architecture) -> GPUTarget:
    target = target_of(architecture)
    return GPUTarget(target.backend, target.architecture, target.warp)


def read_resources(kernel: Any) -> Resources:
    """Read the resources of a compiled kernel from its machine code.

    Args:
        kernel: Triton's CompiledKernel.
    """
    facts = kernel.metadata
    if "amdgcn" in kernel.asm:
        # Scratch memory holds spilled registers; vector registers include those for the results of matrix products.
        used = {name: int(number) for name, number in re.findall(r"\.(\w+):\s+(\d+)\n", kernel.asm["amdgcn"])}
        stack, shared = used["private_segment_fixed_size"], used["group_segment_fixed_size"]
        return Resources(used["vgpr_count"], stack, shared + facts.shared, facts.num_warps)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [cuobjdump(), "-res-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", output)}
    return Resources(
        registers=used["REG"],
        stack=used["STACK"] + used["LOCAL"],
        shared=used["SHARED"] + facts.shared,
        warps=facts.num_warps,
        tensor_memory=getattr(facts, "tmem_size", 0),
    )


@cache
def cuobjdump() -> str:
    """Return the path of the cuobjdump that Triton includes."""
    return str(Path(nvidia.__file__).parent / "bin" / "cuobjdump")
