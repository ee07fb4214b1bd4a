"""How many workers a cluster gets, and which part of it each one uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MOST_THREADS = 4
"""Threads per worker on CPUs unless the user chooses. Of the same cores, several workers with few threads make more
than one with many, because reading, writing and small layers use one thread; each has its own copy of the weights."""


@dataclass(frozen=True)
class Share:
    """The workers, and what each one has of the cluster.

    Attributes:
        workers: Number of workers.
        fitting: How many of them the present nodes can hold; an autoscaler adds nodes for the others.
        cpus: Processors that Ray reserves for each worker.
        gpus: GPUs that Ray reserves for each worker, 0 or 1.
        threads: Number of threads of each worker.
    """

    workers: int
    fitting: int
    cpus: float
    gpus: int
    threads: int

    @property
    def device(self) -> str:
        """Device of each worker, which sees only its own GPU."""
        return "cuda" if self.gpus else "cpu"

    def __str__(self) -> str:
        """Return for example "2 workers with 4 threads each"."""
        each = "each" if self.workers > 1 else ""
        plural = "" if self.workers == 1 else "s"
        has = "a GPU" if self.gpus else f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return f"{self.workers} worker{plural} with {has} {each}".strip()


def share_nodes(
    nodes: Sequence[Mapping[str, float]],
    *,
    device: str = "auto",
    workers: int | None = None,
    threads: int | None = None,
) -> Share:
    """Divide a cluster among workers: one per GPU if there are any, else one per few cores.

    Args:
        nodes: Resources of each node, with the keys "CPU" and "GPU".
        device: "auto", "cpu" or "cuda".
        workers: Number of workers; None for as many as fit. More than fit wait for the nodes of an autoscaler.
        threads: Threads of each worker, and on CPUs the processors that it reserves. None for up to 4 on a CPU, at most
            half of the smallest node, and a GPU's part of the processors of its node.

    Raises:
        ValueError: The cluster has nothing for a worker, and `workers` is None.
    """
    with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
    if device == "cuda" or (device == "auto" and with_gpu):
        per_gpu = [int(node.get("CPU", 1) // node["GPU"]) for node in with_gpu]
        chosen = threads or max(1, min(per_gpu, default=1))
        fitting = sum(int(node["GPU"]) for node in with_gpu)
        lacking, cpus, gpus = "GPU", min([1.0, *(node.get("CPU", 0) / node["GPU"] for node in with_gpu)]), 1
    else:
        processors = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
        chosen = threads or max(1, min(_MOST_THREADS, min(processors, default=1) // 2))
        fitting = sum(count // chosen for count in processors)
        lacking, cpus, gpus = f"node with {chosen} processors", float(chosen), 0
    if workers is None and fitting == 0:
        raise ValueError(f"the cluster has no {lacking}; --workers N waits until an autoscaler adds them")
    return Share(workers or fitting, min(fitting, workers or fitting), cpus, gpus, chosen)
