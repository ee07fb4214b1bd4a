"""Run all ops on a GPU, forward and backward, in every dtype of their kernels, for .ci/compute-sanitizer.

Sizes are small, since the tools make kernels hundreds of times slower, and no multiple of any tile. Results are looked
at too: what is NaN, or far from eager, fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from savl.ops import KernelUnavailable
from savl.ops.equivalence import Case
from savl.ops.library import FUSED
from savl.ops.op import OPS, why_unavailable

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1, "float16": 1e-2}
"""Allowed error, as a share of the largest number of a result."""


def cases(dtype: torch.dtype) -> list[Case]:
    """Return the small and quick cases of every op on GPUs, and the small ones with channels-last images."""
    found = []
    for op in OPS.values():
        if op.backend_for("cuda") is None:
            continue
        found += [op.case(dtype, **settings) for settings in (*op.small_cases, *op.quick_cases)]
        for settings in op.small_cases:
            case = op.case(dtype, **settings)
            interleaved = {
                name: value
                if value is None or value.dim() != 4
                else value.contiguous(memory_format=torch.channels_last)
                for name, value in case.arguments.items()
            }
            found.append(replace(case, arguments=interleaved, label=f"{case.label}, channels last"))
    return found


def wrong(case: Case, backend: str, tolerance: float) -> list[str]:
    """Return the errors in the results of a case."""
    found, expected = case.run(backend, device="cuda"), case.run("eager", torch.float64, "cpu")
    problems = []
    for name, value in expected.items():
        error = float((found[name].double() - value).abs().max())
        if not error <= tolerance * max(1.0, float(value.abs().max())):
            problems.append(f"{case.op} ({case.label}): {name} is off by {error:.3g}")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every case once; return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), help="ops to run; all if left out")
    parser.add_argument(
        "--dtype", nargs="+", choices=TOLERANCE, default=list(TOLERANCE), help="dtypes; all if left out"
    )
    given = parser.parse_args(arguments)
    backends = {name: backend for name in given.op if (backend := OPS[name].backend_for("cuda")) is not None}
    missing = {op: why_unavailable(op, backend) for op, backend in backends.items()}
    problems = [f"{op} · {backends[op]} cannot run: {reason}" for op, reason in missing.items() if reason is not None]
    if not problems:
        for name in given.dtype:
            for case in cases(getattr(torch, name)):
                backend = backends.get(case.op)
                if backend is None or name not in FUSED[backend].dtypes:
                    continue
                try:
                    problems += [f"{name}: {problem}" for problem in wrong(case, backend, TOLERANCE[name])]
                except KernelUnavailable:
                    if OPS[case.op].backends[backend] is None:  # it serves every case
                        raise
        torch.cuda.synchronize()
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
