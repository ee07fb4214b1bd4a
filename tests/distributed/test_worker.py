"""One worker, without Ray: stopping, files that no worker survives, errors of writing, and outputs at a URL."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from savl import atomic_write
from savl.distributed.coordinator import MOST_ATTEMPTS, Coordinator
from savl.distributed.dataset import RowWorker
from savl.distributed.storage import UrlPlace
from savl.distributed.worker import Stopped, Task, Worker
from savl.images.format import PNG
from savl.images.job import Done, Failed, Job, Kept, signatures_of
from savl.images.read import read_image
from tests.cli.conftest import FakeUpscaler

Make = Callable[..., Worker]
Pictures = Callable[..., list[Path]]


def task_of(source: Path, target: Path, place: UrlPlace | None = None) -> Task:
    job = Job(source, target, PNG, ())
    return Task(str(source), job, signatures_of([job], place))


def test_a_job_is_done_once_and_then_kept(
    make_worker: Make, coordinator: Coordinator, pictures: Pictures, tmp_path: Path
) -> None:
    [source] = pictures(1)
    worker = make_worker()
    first = worker.process(task_of(source, tmp_path / "out/a.png"))
    second = worker.process(task_of(source, tmp_path / "out/a.png"))
    assert isinstance(first, Done)
    assert first.result.new_size == (48, 32)
    assert second == Kept(str(tmp_path / "out/a.png"), written_meanwhile=False)
    assert [outcome for _, outcome in coordinator.take().finished] == [first, second]
    assert coordinator.take().finished == []
    assert os.listdir(tmp_path / "out") == ["a.png"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_result_that_was_written_before_its_worker_ended_is_not_written_again(
    make_worker: Make, pictures: Pictures, tmp_path: Path, overwrite: bool
) -> None:
    [source] = pictures(1)
    target = tmp_path / "out/a.png"
    task = task_of(source, target)
    assert isinstance(make_worker(overwrite=overwrite).process(task), Done)
    written = target.stat()
    assert make_worker(overwrite=overwrite).process(task) == Kept(str(target), written_meanwhile=True)
    assert os.path.samestat(target.stat(), written)


def test_a_stopped_worker_leaves_no_partial_file(
    make_worker: Make, coordinator: Coordinator, pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [source] = pictures(1)
    worker = make_worker()
    upscale = FakeUpscaler.__call__

    def stop(self: FakeUpscaler, lr: Any, *, on_tile: Any) -> Any:
        worker._stopping.set()
        return upscale(self, lr, on_tile=on_tile)

    monkeypatch.setattr(FakeUpscaler, "__call__", stop)
    with pytest.raises(Stopped):
        worker.process(task_of(source, tmp_path / "out/a.png"))
    assert not (tmp_path / "out/a.png").exists()
    assert not list((tmp_path / "out").glob(".*")) if (tmp_path / "out").exists() else True
    assert coordinator.take().active == {}
    with pytest.raises(Stopped):  # nor does it begin another file
        worker.process(task_of(source, tmp_path / "out/b.png"))


def test_the_coordinator_stops_a_worker(make_worker: Make, coordinator: Coordinator) -> None:
    worker = make_worker()
    coordinator.stop()
    assert worker._stopping.wait(10)


def test_a_file_that_no_worker_survives_fails(
    make_worker: Make, coordinator: Coordinator, pictures: Pictures, tmp_path: Path
) -> None:
    [source] = pictures(1)
    for number in range(MOST_ATTEMPTS):
        coordinator.begin(f"dead {number}", str(source))
    outcome = make_worker().process(task_of(source, tmp_path / "a.png"))
    assert isinstance(outcome, Failed)
    assert f"its worker ended {MOST_ATTEMPTS} times" in outcome.reason
    assert not (tmp_path / "a.png").exists()


def test_a_full_disk_fails_the_file_and_leaves_nothing(
    make_worker: Make, pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [source] = pictures(1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic_write.os, "fsync", full)
    outcome = make_worker().process(task_of(source, tmp_path / "out/a.png"))
    assert isinstance(outcome, Failed)
    assert outcome.reason == f"{tmp_path}/out/a.png: cannot be written: No space left on device"
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


class TestUrl:
    @pytest.fixture(params=["memory://bucket/large", "other"])
    def url(self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        """A file system where files appear when they are complete, and one where they are renamed."""
        fsspec = pytest.importorskip("fsspec", reason="needs pip install 'savl[cluster]'")
        if request.param != "other":
            fsspec.filesystem("memory").store.clear()
            return str(request.param)
        from fsspec.implementations.local import LocalFileSystem

        class Shelf(LocalFileSystem):  # type: ignore[misc]
            protocol = "shelf"
            root_marker = "/"

            @classmethod
            def _strip_protocol(cls, path: str) -> str:
                return str(super()._strip_protocol(str(path).removeprefix("shelf://")))

        fsspec.register_implementation("shelf", Shelf, clobber=True)
        return f"shelf://{tmp_path}/shelf"

    def test_outputs_are_complete_kept_and_replaced(
        self, url: str, make_worker: Make, pictures: Pictures, tmp_path: Path
    ) -> None:
        import fsspec

        one, other = pictures(2)
        place = UrlPlace(url)
        target = place.root / "sub/a.png"
        first = make_worker(output_url=url).process(task_of(one, target, place))
        assert isinstance(first, Done)
        assert first.written == f"{url}/sub/a.png"
        again = make_worker(output_url=url).process(task_of(one, target, place))
        assert again == Kept(f"{url}/sub/a.png", written_meanwhile=False)
        conflict = make_worker(output_url=url).process(task_of(other, target, place))
        assert isinstance(conflict, Failed)
        assert conflict.reason.startswith(f"{url}/sub/a.png exists already and was made from another image")
        with fsspec.open(f"{url}/sub/a.png") as file:
            before = read_image(file.read()).pixels
        assert (before[::4, ::4] == read_image(one).pixels).all()
        replaced = make_worker(output_url=url, overwrite=True).process(task_of(other, target, place))
        assert isinstance(replaced, Done)
        with fsspec.open(f"{url}/sub/a.png") as file:
            assert (read_image(file.read()).pixels[::4, ::4] == read_image(other).pixels).all()
        filesystem, folder = fsspec.core.url_to_fs(url)
        assert [name.rpartition("/")[2] for name in filesystem.find(folder)] == ["a.png"], "no partial file"

    def test_a_file_that_cannot_be_sent_fails_and_leaves_nothing(
        self, url: str, make_worker: Make, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import fsspec

        filesystem, folder = fsspec.core.url_to_fs(url)

        def fail(self: object, *arguments: object, **options: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(type(filesystem), "put_file", fail)
        [source] = pictures(1)
        outcome = make_worker(output_url=url).process(task_of(source, UrlPlace(url).root / "a.png"))
        assert isinstance(outcome, Failed)
        assert outcome.reason == f"{url}/a.png: cannot be written: No space left on device"
        assert filesystem.find(folder) == []


class TestRows:
    def test_rows_keep_their_subfolders_and_say_what_became_of_them(
        self, make_worker: Make, pictures: Pictures, tmp_path: Path
    ) -> None:
        sources = [*pictures(1, "in/one"), *pictures(2, "in/two", ".webp"), tmp_path / "in/none.png"]
        worker = make_worker(RowWorker, str(tmp_path / "out"), str(tmp_path / "in"), "path", "bytes", None, "_large")
        rows = worker({"path": list(map(str, sources))})  # type: ignore[operator]
        assert rows["status"] == ["upscaled", "upscaled", "upscaled", "failed"]
        assert rows["output"] == [
            f"{tmp_path}/out/one/000_large.png",
            f"{tmp_path}/out/two/000_large.webp",
            f"{tmp_path}/out/two/001_large.webp",
            "",
        ]
        assert rows["error"] == ["", "", "", "no such file"]
        assert (rows["width"][0], rows["height"][0]) == (48, 32)

    def test_contents_are_used_instead_of_the_paths(
        self, make_worker: Make, pictures: Pictures, tmp_path: Path
    ) -> None:
        [source] = pictures(1)
        worker = make_worker(RowWorker, str(tmp_path / "out"), None, "name", "data", "webp", "")
        rows = worker({"name": ["s3://bucket/a.png", "b.png"], "data": [source.read_bytes(), b"no image"]})  # type: ignore[operator]
        assert rows["status"] == ["upscaled", "failed"]
        assert rows["output"][0] == f"{tmp_path}/out/a.webp"
        assert rows["error"][1].startswith("not a")

    def test_a_missing_column_is_named(self, make_worker: Make, tmp_path: Path) -> None:
        worker = make_worker(RowWorker, str(tmp_path), None, "path", "bytes", None, "")
        with pytest.raises(KeyError, match="no column 'path' with paths; its columns are: image"):
            worker({"image": [0]})  # type: ignore[operator]
