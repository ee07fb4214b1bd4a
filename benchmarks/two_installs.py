"""Time the fused kernels of two installations of savl in turn, each in processes of its own.

    python -m benchmarks.two_installs BEFORE/bin/python AFTER/bin/python --json FILE

BEFORE and AFTER are environments in which two versions of savl are installed, for example a release and a change. The
script times the import of savl.ops, every op on an image of savl-base (64×64) and on a small one (16×16), on which the
overhead of a call dominates, and a tile of two networks, all on the CPU in float32. Processes of the two environments
alternate, so that other work on the machine affects both.

The ratio is the time after divided by the time before: the median over rounds of the ratio within a round. The noise is
half of the interquartile range of these ratios. The exit code is 1 if a ratio exceeds 1.05 by more than the noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARGIN = 0.05
SECONDS = 0.4
"""Time that a process spends on one problem, at least three calls."""


def problems() -> dict[str, Callable[[], object]]:
    """Return the calls to time by name. Imports the savl of the environment, and nothing else of this package."""
    import torch

    import savl
    from savl import ops

    savl.use_fused_kernels()
    torch.manual_seed(0)
    found: dict[str, Callable[[], object]] = {}

    def both(name: str, call: Callable[..., Any], *inputs: torch.Tensor) -> None:
        """Add a call, and the call followed by the gradients of all inputs."""
        found[name] = lambda: call(*inputs)
        leaves = [each.clone().requires_grad_() for each in inputs]

        def with_gradients() -> object:
            out = call(*leaves)
            return torch.autograd.grad((out if isinstance(out, torch.Tensor) else out.sample).sum(), leaves)

        found[f"{name} and gradients"] = with_gradients

    def severity(side: int) -> torch.Tensor:
        return 2 * torch.rand(1, side, side)

    for side, suffix in ((64, ""), (16, ", 16×16")):
        both(
            f"window attention{suffix}",
            lambda qkv, table, s: ops.window_attention(qkv, table, s, window=16, shift=8),
            torch.randn(1, side, side, 432), torch.randn(961, 6), severity(side),
        )  # fmt: skip
        both(
            f"overlapping attention{suffix}",
            lambda q, kv, table: ops.overlapping_window_attention(q, kv, table, window=16, key_window=24),
            torch.randn(1, side, side, 144), torch.randn(1, side, side, 288), torch.randn(1521, 6),
        )  # fmt: skip
        both(f"posterior{suffix}", ops.gaussian_posterior, *(0.3 * torch.randn(1, 64, side, side) for _ in range(3)))
        both(
            f"modulation{suffix}",
            lambda attended, gamma, residual: ops.channel_modulation(attended, gamma, None, residual),
            *(torch.randn(1, side, side, 144) for _ in range(3)),
        )
        both(f"layer norm{suffix}", ops.layer_norm, torch.randn(1, side, side, 144), torch.ones(144), torch.zeros(144))

    for name in ("savl-tiny", "savl-base"):
        model, lr = savl.build(name).eval(), torch.rand(1, 3, 64, 64)

        def tile(model: Any = model, lr: torch.Tensor = lr) -> object:
            with torch.inference_mode():
                return model(lr)

        found[f"{name}, tile"] = tile
    return found


def measure() -> dict[str, float]:
    """Return the median seconds of a call for each problem, in this process."""
    found = {}
    for name, call in problems().items():
        call()
        times: list[float] = []
        while len(times) < 3 or sum(times) < SECONDS:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        found[name] = statistics.median(times)
    return found


def measure_in(python: str) -> dict[str, float]:
    """Return the times of the problems in a process of an environment, and those of starting it."""
    start = time.perf_counter()
    subprocess.run([python, "-c", "import savl.ops"], check=True, cwd="/")
    seconds = {"import savl.ops": time.perf_counter() - start}
    result = subprocess.run(
        [python, str(Path(__file__).resolve())], check=True, cwd="/", capture_output=True, text=True
    )
    return seconds | json.loads(result.stdout)


def main() -> int:
    """Time both environments and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="Python of the environment with the savl to compare with")
    parser.add_argument("after", help="Python of the environment with the changed savl")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the times of every round and the ratios to this file")
    arguments = parser.parse_args()
    rounds = []
    for number in range(arguments.rounds):
        order = ("before", "after") if number % 2 == 0 else ("after", "before")
        rounds.append({which: measure_in(getattr(arguments, which)) for which in order})
    slower, results = False, {}
    for name in rounds[0]["before"]:
        ratios = sorted(each["after"][name] / each["before"][name] for each in rounds)
        low, median, high = statistics.quantiles(ratios, n=4)
        noise = (high - low) / 2
        before, after = (statistics.median(each[which][name] for each in rounds) for which in ("before", "after"))
        results[name] = {"before_s": before, "after_s": after, "ratio": median, "noise": noise}
        mark = "  slower" if median > 1 + MARGIN + noise else ""
        slower = slower or bool(mark)
        print(f"{name:45} {before * 1e3:10.3f} ms {after * 1e3:10.3f} ms  {median:5.2f} ± {noise:.2f}{mark}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"results": results, "rounds": rounds}, indent=1) + "\n", encoding="utf-8")
    return 1 if slower else 0


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps(measure()))
    else:
        sys.exit(main())
