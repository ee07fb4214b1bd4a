"""Connect to a cluster, or start one on this machine; and start what a run needs there."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from savl.distributed.coordinator import Coordinator
from savl.distributed.ray_import import import_ray
from savl.distributed.share import Share, share_nodes

if TYPE_CHECKING:
    import torch

    Model = str | os.PathLike[str] | torch.nn.Module

LOCAL = "local"
"""Address that starts an instance of Ray on this machine."""

_OBJECT_STORE = 256 * 2**20
"""Bytes of the object store of a local instance. Names of files pass through it and weights, but no images."""


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to a cluster for the duration of a `with` block; yield the module ``ray``.

    A connection that the process has already is used, and stays.

    Args:
        address: "local" starts an instance on this machine's cores and GPUs; "auto" is the cluster that this machine
            belongs to; otherwise host:port.

    Raises:
        RayUnavailable: Ray is not installed.
        ConnectionError: There is no cluster at the address.
    """
    ray = import_ray()
    own = not ray.is_initialized()
    if own:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # The C++ part of Ray writes warnings about its own internals to standard error.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        local: dict[str, Any] = {"num_cpus": _processors(), "object_store_memory": _OBJECT_STORE}
        with _without_standard_error():
            ray.init(
                address=address,
                include_dashboard=False if address == LOCAL else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(local if address == LOCAL else {}),
            )
    context = ray.data.DataContext.get_current()
    shows_progress, context.enable_progress_bars = context.enable_progress_bars, False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield ray
    finally:
        if own:
            ray.shutdown()
        logger.setLevel(level)
        context.enable_progress_bars = shows_progress


@contextlib.contextmanager
def _without_standard_error() -> Iterator[None]:
    """Discard what C++ code writes to standard error: Ray confirms the log level there. Its errors are exceptions."""
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def share_cluster(ray: Any, *, device: str, workers: int | None, threads: int | None) -> Share:
    """Divide the nodes of the cluster among workers; see `share_nodes`."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return share_nodes(nodes, device=device, workers=workers, threads=threads)


def start_coordinator(ray: Any, content: Any, *, keeps_outcomes: bool = True) -> Any:
    """Start the coordinator of a run on this machine; return its handle, with which it ends.

    Args:
        ray: The module ``ray``.
        content: The model, if the workers cannot load it by its name: a module, or the content of a file.
        keeps_outcomes: Keep the outcomes for the command.
    """
    model = None if content is None else [ray.put(content)]
    node = ray.get_runtime_context().get_node_id()
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here)(Coordinator)
    return actor.remote(model, keeps_outcomes=keeps_outcomes)


def worker_arguments(ray: Any, share: Share, *, reserved_cpus: float | None = None) -> dict[str, Any]:
    """Return arguments of ``Dataset.map_batches`` that place one worker per share of the cluster.

    Args:
        ray: The module ``ray``.
        share: The workers.
        reserved_cpus: Processors that Ray reserves for each worker; None for those of the share.
    """
    pool = ray.data.ActorPoolStrategy(
        min_size=max(1, share.fitting),
        max_size=share.workers,
        # Otherwise a worker has files waiting while another one has none. Nor is more needed: reading a file takes less
        # time than upscaling it.
        max_tasks_in_flight_per_actor=1,
    )
    # Variables of this process that change results; workers on other nodes do not inherit them.
    variables = {name: value for name, value in os.environ.items() if name.startswith("SAVL_")}
    return {
        "compute": pool,
        "num_cpus": share.cpus if reserved_cpus is None else reserved_cpus,
        "num_gpus": share.gpus,
        "batch_size": 1,
        "zero_copy_batch": True,
        **({"runtime_env": {"env_vars": variables}} if variables else {}),
    }


def model_for_workers(model: Model) -> tuple[str, Any]:
    """Return the name of a model, and what workers load it from.

    Returns:
        The name of shipped weights and None; the name of a file and its content; or "" and a module.

    Raises:
        TypeError: `model` is none of these, for example an `Upscaler`, which belongs to one process.
        OSError, ValueError: There is no such file.
    """
    from savl.inference.network import as_network
    from savl.weights.files import find_weights, shipped

    if isinstance(model, (str, os.PathLike)):
        path = find_weights(model, "model")
        if path in shipped().values():
            return path.stem, None
        return path.name, Path(path).read_bytes()
    if as_network(model) is None:
        raise TypeError(f"model: {type(model).__name__}; a name, a path or a model is accepted")
    return "", model


def _processors() -> int:
    """Return the number of processors that this process may use."""
    from savl.inference.limits import processor_quota

    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = processor_quota()
    return max(1, available if quota is None else min(available, round(quota)))
