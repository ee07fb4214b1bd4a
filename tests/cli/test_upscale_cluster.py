"""The options of `savl upscale` for clusters, before anything is started. tests/distributed starts workers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from savl.cli.cluster import ClusterLoop
from savl.cli.progress import WorkersEstimate
from savl.command_line import UsageError
from savl.distributed.storage import UrlPlace
from savl.images.format import PNG
from savl.images.job import Job

Run = Callable[..., Any]
Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-", "-o", "out.png", "--ray"], "--ray: the workers of a cluster have no standard input and output"),
        (["a.png", "-o", "-", "--ray", "auto"], "--ray: the workers of a cluster have no standard input and output"),
        (["a.png", "--device", "mps", "--ray"], "--device takes cpu, cuda or auto, got mps"),
        (["a.png", "--ray", "ray://head:10001"], "--ray ray://head:10001: Ray's client is not supported"),
        (["a.png", "--ray=nowhere"], "--ray nowhere is not an address"),
        (["a.png", "--workers", "2"], "--workers needs --ray"),
        (["a.png", "-o", "s3://bucket/large"], "-o s3://bucket/large is a URL, to which only --ray writes"),
    ],
)
def test_what_workers_cannot_do_is_refused_by_name(
    savl: Run, picture: Write, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    from savl.inference import device

    monkeypatch.setattr(device, "checked_device", lambda name: name)
    picture("a.png")
    done = savl("upscale", *arguments)
    assert done.code == 2
    assert message in done.text


@pytest.mark.parametrize("arguments", [["--ray", "a.png"], ["a.png", "--ray"], ["a.png", "--ray", "head:6379"]])
def test_without_ray_one_line_says_what_to_install(
    savl: Run, picture: Write, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    picture("a.png")
    done = savl("upscale", *arguments)
    assert done.code == 1
    assert done.text.startswith("error: clusters need Ray, which cannot be imported")
    assert done.text.endswith("pip install 'savl[cluster]' brings it\n")
    assert done.text.count("\n") == 1


def test_the_memory_of_one_process_is_no_place_for_results(savl: Run, picture: Write) -> None:
    for name in ("ray.data", "fsspec"):
        pytest.importorskip(name, reason="needs pip install 'savl[cluster]'")
    picture("a.png")
    done = savl("upscale", "a.png", "-o", "memory://large", "--ray")
    assert done.code == 2
    assert "-o memory://large is the memory of one process" in done.text


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_existing_file_at_a_url_is_refused_unless_it_is_replaced(picture: Write, overwrite: bool) -> None:
    fsspec = pytest.importorskip("fsspec", reason="needs pip install 'savl[cluster]'")
    fsspec.filesystem("memory").pipe_file("/large/b.png", b"another image")
    place = UrlPlace("memory://large")
    job = Job(picture("a.png"), place.root / "b.png", PNG, (), exact=True)
    loop = ClusterLoop([job], start=lambda files: pytest.fail("started"), place=place, overwrite=overwrite, debug=False)
    if overwrite:
        assert [task.job.source.is_absolute() for task in loop._tasks()] == [True]
    else:
        with pytest.raises(UsageError, match="-o memory://large/b.png exists already; --overwrite replaces it"):
            loop._tasks()


def test_the_help_names_the_extra(savl: Run) -> None:
    assert "savl upscale --ray needs pip install 'savl[cluster]'" in savl("--help").text
    assert "pip install 'savl[cluster]'" in " ".join(savl("upscale", "--help").text.replace("│", " ").split())


def test_the_remaining_time_of_several_workers_is_that_of_all_bytes() -> None:
    now = [0.0]
    a, b, c = Path("a"), Path("b"), Path("c")
    estimate = WorkersEstimate({a: 100, b: 100, c: 200}, lambda: now[0])
    assert estimate.seconds is None
    estimate.update([(a, 0, 0), (b, 0, 0)])
    now[0] = 10.0
    estimate.update([(a, 1, 2), (b, 1, 2)])  # 100 of 400 bytes in 10 s
    assert estimate.seconds == pytest.approx(30)
    estimate.finish(a, worked=True)
    estimate.finish(b, worked=True)
    estimate.update([])
    assert estimate.seconds == pytest.approx(10)
    estimate.finish(c, worked=False)
    assert estimate.seconds == 0
