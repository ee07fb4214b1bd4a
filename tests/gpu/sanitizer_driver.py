"""All ops on a GPU, forward and backward, in every dtype of their kernels: what .ci/compute-sanitizer watches.

Sizes are small, since the tools make kernels hundreds of times slower, and no multiple of any tile. Results are looked
at too: what is NaN, or far from eager, fails.
"""

from __future__ import annotations

import sys

import torch

from savl.ops.channel_modulation import channel_modulation_case
from savl.ops.equivalence import Case
from savl.ops.gaussian_posterior import gaussian_posterior_case
from savl.ops.layer_norm import layer_norm_case
from savl.ops.library import FUSED
from savl.ops.op import OPS, why_unavailable
from savl.ops.overlapping_window_attention import overlapping_window_attention_case
from savl.ops.window_attention import window_attention_case

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1, "float16": 1e-2}
"""Of the largest number of a result."""


def cases(dtype: torch.dtype) -> list[Case]:
    """Every op, each optional argument given and left out, each layout that kernels tell apart."""
    window, overlapping = window_attention_case, overlapping_window_attention_case
    field = gaussian_posterior_case(dtype, channels=9, height=7, width=9)
    interleaved = {
        name: None if value is None else value.contiguous(memory_format=torch.channels_last)
        for name, value in field.arguments.items()
    }
    return [
        window(dtype, batch=2, window=5, shift=2, rows=1, columns=2, heads=2, head_dim=7),
        window(dtype, window=16, shift=8, rows=1, columns=2, heads=2, head_dim=24),
        window(dtype, window=8, rows=2, columns=1, heads=1, head_dim=30, severity=False),
        overlapping(dtype, batch=2, window=5, key_window=9, rows=1, columns=2, heads=2, head_dim=7),
        overlapping(dtype, window=16, key_window=24, rows=1, columns=2, heads=1, head_dim=24),
        overlapping(dtype, window=8, key_window=12, rows=2, columns=1, heads=1, head_dim=30, severity=False),
        field,
        Case(field.op, interleaved, field.options, field.terms, "channels last", field.outputs),
        gaussian_posterior_case(dtype, channels=64, height=16, width=20, noise="seed"),
        gaussian_posterior_case(dtype, channels=5, height=17, width=13, noise="none"),
        channel_modulation_case(dtype, height=5, width=7, channels=19),
        channel_modulation_case(dtype, height=4, width=8, channels=144, beta=False),
        layer_norm_case(dtype, height=5, width=7, channels=19),
        layer_norm_case(dtype, height=9, width=8, channels=144),
    ]


def wrong(case: Case, backend: str, tolerance: float) -> list[str]:
    """What is wrong with the results of a case."""
    found, expected = case.run(backend, device="cuda"), case.run("eager", torch.float64, "cpu")
    problems = []
    for name, value in expected.items():
        error = float((found[name].double() - value).abs().max())
        if not error <= tolerance * max(1.0, float(value.abs().max())):
            problems.append(f"{case.op} ({case.label}): {name} is off by {error:.3g}")
    return problems


def main() -> int:
    """Run every case once; returns an exit code."""
    backends = {name: op.backend_for("cuda") or "none" for name, op in OPS.items()}
    missing = {op: why_unavailable(op, backend) for op, backend in backends.items()}
    problems = [f"{op} · {backends[op]} cannot run: {reason}" for op, reason in missing.items() if reason is not None]
    if not problems:
        for name, tolerance in TOLERANCE.items():
            for case in cases(getattr(torch, name)):
                if name in FUSED[backends[case.op]].dtypes:
                    problems += [f"{name}: {problem}" for problem in wrong(case, backends[case.op], tolerance)]
        torch.cuda.synchronize()
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
