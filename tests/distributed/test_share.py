"""How a cluster is divided among workers, and files among groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from savl.distributed.run import _groups
from savl.distributed.share import Share, share_nodes
from savl.distributed.worker import Task
from savl.images.format import PNG
from savl.images.job import Job


@pytest.mark.parametrize(
    ("nodes", "arguments", "expected"),
    [
        ([{"CPU": 2}], {}, Share(2, 2, 1, 0, 1)),
        ([{"CPU": 1}], {}, Share(1, 1, 1, 0, 1)),
        ([{"CPU": 64}, {"CPU": 16}], {}, Share(20, 20, 4, 0, 4)),
        ([{"CPU": 64}, {"CPU": 16}], {"threads": 16}, Share(5, 5, 16, 0, 16)),
        ([{"CPU": 64}, {"CPU": 16}], {"workers": 3}, Share(3, 3, 4, 0, 4)),
        ([{"CPU": 32, "GPU": 4}, {"CPU": 16}], {}, Share(4, 4, 1, 1, 8)),
        ([{"CPU": 32, "GPU": 4}, {"CPU": 16}], {"device": "cpu"}, Share(12, 12, 4, 0, 4)),
        ([{"CPU": 2, "GPU": 4}], {}, Share(4, 4, 0.5, 1, 1)),
        ([{"CPU": 4}], {"device": "cuda", "workers": 8}, Share(8, 0, 1, 1, 1)),
        ([{"CPU": 0}], {"workers": 8}, Share(8, 0, 1, 0, 1)),
    ],
)
def test_workers_use_the_gpus_or_else_the_cores(
    nodes: list[dict[str, float]], arguments: dict[str, object], expected: Share
) -> None:
    assert share_nodes(nodes, **arguments) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("device", "lacking"), [("cuda", "GPU"), ("auto", "node with 8 processors")])
def test_a_cluster_without_room_is_refused(device: str, lacking: str) -> None:
    with pytest.raises(ValueError, match=f"the cluster has no {lacking}"):
        share_nodes([{"CPU": 4}], device=device, threads=8)


def test_a_share_is_named_in_words() -> None:
    assert str(Share(1, 1, 1, 0, 1)) == "1 worker with 1 thread"
    assert str(Share(3, 3, 4, 0, 4)) == "3 workers with 4 threads each"
    assert str(Share(2, 2, 1, 1, 8)) == "2 workers with a GPU each"


@pytest.mark.parametrize(
    ("count", "size", "workers", "sizes"),
    [
        (5, 1, 2, [1] * 5),
        (200, 1, 2, [3] * 66 + [2]),
        (10_000, 1, 2, [32] * 312 + [16]),
        (10_000, 2**23, 2, [4] * 2500),
        (3, 2**30, 1, [1] * 3),
        (0, 1, 2, []),
    ],
)
def test_small_files_are_grouped_and_large_ones_are_not(count: int, size: int, workers: int, sizes: list[int]) -> None:
    tasks = [Task(key, Job(Path("a.png"), Path("b.png"), PNG, ()), {}) for key in range(count)]
    groups = list(_groups(tasks, dict.fromkeys(range(count), size), workers))
    assert [task for group in groups for task in group] == tasks
    assert [len(group) for group in groups] == sizes
