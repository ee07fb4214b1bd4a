"""How much memory a forward pass takes on top of the network: run as a process of its own, it prints bytes.

    python -m benchmarks.peak_memory savl-base fused

Linux only: it resets the high-water mark of resident memory that the kernel keeps.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def measure(network: str, variant: str) -> int:
    """Peak resident bytes of one 64×64 tile over what was resident before, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", network, variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[1])
    return int(done.stdout.split()[-1])


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def main() -> None:
    """Measure in this process."""
    import torch

    import savl
    from benchmarks.peers import sdpa

    network, variant = sys.argv[1:3]
    model = savl.build(network).eval()
    with torch.no_grad():
        model(torch.rand(1, 3, 16, 16))  # what libraries set up on first use is not the network's
        savl.use_fused_kernels(variant == "fused")
        lr = torch.rand(1, 3, 64, 64)
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        if variant == "sdpa":
            with sdpa.in_every_network():
                model(lr)
        else:
            model(lr)
    print(_resident("VmHWM") - before)


if __name__ == "__main__":
    main()
