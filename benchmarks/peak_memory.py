"""Measure the memory that a forward pass uses in addition to the network, in its own process, and print the bytes.

    python -m benchmarks.peak_memory savl-base fused

It needs Linux, where it resets the peak of resident memory that the operating system records.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def measure(network: str, variant: str) -> int:
    """Return the peak memory of one 64×64 tile in bytes, in addition to the network, measured in a new process.

    Args:
        network: A configuration, such as ``"savl-base"``, or a name in `benchmarks.architectures`, such as ``"HAT-S"``.
        variant: ``"eager"``, ``"sdpa"`` or ``"fused"``; ``"accelerated"`` for other authors' architectures.
    """
    command = [sys.executable, "-m", "benchmarks.peak_memory", network, variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[1])
    return int(done.stdout.split()[-1])


def resident_bytes(key: str) -> int:
    """Return ``"VmRSS"``, the resident memory of this process in bytes, or ``"VmHWM"``, its peak; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def main() -> None:
    """Measure in this process and print the result."""
    import torch

    import savl
    from benchmarks import architectures
    from benchmarks.peers import sdpa

    network, variant = sys.argv[1:3]
    model = architectures.network(network) if network in architectures.ARCHITECTURES else savl.build(network).eval()
    if variant == "accelerated":
        savl.accelerate(model, verify=False)
    with torch.no_grad():
        model(torch.rand(1, 3, 16, 16))  # memory that libraries allocate on first use does not count
        savl.use_fused_kernels(variant in ("fused", "accelerated"))
        lr = torch.rand(1, 3, 64, 64)
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        if variant == "sdpa":
            with sdpa.in_every_network():
                model(lr)
        else:
            model(lr)
    print(resident_bytes("VmHWM") - before)


if __name__ == "__main__":
    main()
