"""What the CUDA library says of itself, read off the file: a torch without CUDA could not load it."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import TypedDict

LIBRARY = Path(__file__).with_name("_cuda.so")
"""Where the build puts it."""

_MARK = b"savl_cuda_facts="


class CudaFacts(TypedDict):
    """How the CUDA library was built."""

    version: str
    """Version of savl whose sources it was compiled from."""
    stable_abi: str
    """Oldest torch release that can load it."""
    architectures: list[str]
    """Compute capabilities it has code for, such as ``"90"``; ``"80+PTX"`` where the driver can compile it for newer
    ones."""
    compiler: str
    """Such as ``"nvcc 13.0.88"``."""
    runtime: int
    """Version of CUDA it needs, as CUDA packs it: 13000 is 13.0."""


def cuda_facts() -> CudaFacts | None:
    """Read the facts; None where there is no library, or none that has them."""
    try:
        with LIBRARY.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = content.find(_MARK)
            if start < 0:
                return None
            text = content[start + len(_MARK) : content.find(b"\0", start)]
        facts: CudaFacts = json.loads(text)
        return facts
    except (OSError, ValueError):
        return None
