"""`savl upscale --ray` and `upscale_dataset` on a local cluster with two workers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import savl
from savl.cli import main
from savl.images.read import read_image

REASON = "needs pip install 'savl[cluster]'"
pytest.importorskip("fsspec", reason=REASON)
ray = pytest.importorskip("ray.data", reason=REASON) and pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")

pytestmark = pytest.mark.slow

Pictures = Callable[..., list[Path]]

CONFIG = """
[model]
channels = 6
depths = [1]
heads = 1
window = 4
cab_compress = 3
cab_squeeze = 3
latent = 4
estimator_width = 6
estimator_dilations = [1]
decoder_width = 6
decoder_depth = 2
[data]
patch = 8
batch = 2
margin = 1
pool = 4
fresh = 1
[run]
log_every = 1
device = "cpu"
"""


SHELF = """
from fsspec.implementations.local import LocalFileSystem

class Shelf(LocalFileSystem):
    protocol = "shelf"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("shelf://"))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two processors, of which each worker gets one; the address. Its workers know a file system shelf://."""
    package = tmp_path_factory.mktemp("shelf")
    (package / "shelf.py").write_text(SHELF)
    (package / "shelf-1.dist-info").mkdir()
    (package / "shelf-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: shelf\nVersion: 1\n")
    (package / "shelf-1.dist-info/entry_points.txt").write_text("[fsspec.specs]\nshelf = shelf:Shelf\n")
    folders = [str(package), str(Path(savl.__file__).parents[1])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(folders))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        context = ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**27
        )
        sys.path.append(str(package))
        import fsspec

        fsspec.register_implementation("shelf", "shelf.Shelf", clobber=True)
        yield context.address_info["gcs_address"]
        sys.path.remove(str(package))
        ray.shutdown()


@pytest.fixture
def run(cluster: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs `savl upscale --ray` in this process, with its connection; returns exit code and text."""
    monkeypatch.setenv("COLUMNS", "200")

    def upscale(*arguments: object) -> tuple[Any, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["upscale", *map(str, arguments), "--ray", cluster])
        captured = capsys.readouterr()
        return stop.value.code, captured.out + captured.err

    return upscale


def worker_processes() -> list[Any]:
    """Return the processes of the workers on this machine."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.cmdline()[:1]
                and process.cmdline()[0].startswith("ray::")
                and "TaskWorker" in str(process.cmdline())
            ):
                found.append(process)
    return found


def assert_same_pixels(source: Path, result: Path) -> None:
    """Check that a result is what `savl.upscale` gives."""
    assert np.array_equal(read_image(result).pixels, savl.upscale(source))


def test_200_files_with_a_corrupt_one_while_a_worker_is_killed(
    run: Callable[..., Any], pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = pictures(200)
    sources[7].write_bytes(sources[7].read_bytes()[:60])
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if (tmp_path / "out").exists() and len(os.listdir("out")) > 20 and (workers := worker_processes()):
                workers[0].kill()
                killed.append(workers[0].pid)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    code, text = run("in", "-o", "out")
    thread.join()
    assert killed, text
    assert code == 1
    assert "in/007.png: truncated or corrupt PNG" in text
    expected = [path.name for path in sources if path is not sources[7]]
    # What the killed process was writing is hidden.
    assert sorted(name for name in os.listdir("out") if not name.startswith(".")) == expected
    assert len([name for name in os.listdir("out") if name.startswith(".")]) <= 2
    upscaled, kept = (sum(word in line for line in text.splitlines()) for word in (" -> out/", ": kept out/"))
    assert upscaled + kept == 199
    assert kept <= 1, "a worker was killed between a result and its report"
    for source in sources[::23]:
        assert_same_pixels(source, tmp_path / "out" / source.name)

    before = {path.name: path.stat() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out/005.png").unlink()
    code, text = run("in", "-o", "out")
    assert code == 1
    assert "1 upscaled, 198 kept, 1 failed" in text
    after = {path.name: path.stat() for path in (tmp_path / "out").iterdir()}
    assert sorted(name for name in after if not name.startswith(".")) == expected
    changed = {name for name, status in before.items() if after.get(name) != status and not name.startswith(".")}
    assert {name for name in changed if not os.path.samestat(after[name], before[name])} == {"005.png"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk with 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_fails_the_files_that_do_not_fit(
    run: Callable[..., Any], pictures: Pictures, tmp_path: Path, small_disk: Path
) -> None:
    sources = pictures(8, side=32)
    code, text = run(tmp_path / "in", "-o", small_disk, "--workers", 1)
    assert code == 1
    assert "cannot be written: No space left on device" in text
    written = sorted(small_disk.iterdir())
    assert 0 < len(written) < 8, "no partial or hidden file either"
    for path in written:
        assert_same_pixels(sources[int(path.stem)], path)
    assert f"{len(written)} upscaled, {8 - len(written)} failed" in text


def test_a_dataset_of_contents_is_written_to_a_url(cluster: str, pictures: Pictures, tmp_path: Path) -> None:
    from savl.distributed import upscale_dataset

    sources = [*pictures(3, "in/one"), *pictures(2, "in/two")]
    sources[1].write_bytes(b"no image")
    dataset = ray.data.read_binary_files(str(tmp_path / "in"), include_paths=True, file_extensions=["png"])
    url = f"shelf://{tmp_path}/out"
    rows = upscale_dataset(dataset, url, root=tmp_path / "in").take_all()
    rows.sort(key=lambda row: row["path"])
    assert [row["status"] for row in rows] == ["upscaled", "failed", "upscaled", "upscaled", "upscaled"]
    assert "not a" in rows[1]["error"]
    for source, row in zip(sources, rows, strict=True):
        if row["status"] == "upscaled":
            name = source.relative_to(tmp_path / "in")
            assert row["output"] == f"{url}/{name}"
            assert (row["width"], row["height"]) == (48, 32)
            assert_same_pixels(source, tmp_path / "out" / name)


def test_training_under_torchrun_and_upscaling_with_its_weights_share_a_machine(
    run: Callable[..., Any], pictures: Pictures, tmp_path: Path
) -> None:
    pictures(4)
    pictures(1, "hr", side=64)
    (tmp_path / "config.toml").write_text(CONFIG)
    arguments = ["train", tmp_path / "config.toml", "--hr", tmp_path / "hr", "-o", tmp_path / "run", "--steps", "4"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "savl"]
    with subprocess.Popen(
        [*launcher, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(savl.__file__).parents[1])},
    ) as training:
        code, text = run(tmp_path / "in", "-o", f"shelf://{tmp_path}/before")
        _, errors = training.communicate(timeout=240)
    assert code == 0, text
    assert training.returncode == 0, errors
    weights = tmp_path / "run/model.safetensors"
    code, text = run(tmp_path / "in", "-o", tmp_path / "after", "--model", weights)
    assert code == 0, text
    for source in sorted((tmp_path / "in").iterdir()):
        assert_same_pixels(source, tmp_path / "before" / source.name)
        after = read_image(tmp_path / "after" / source.name).pixels
        assert np.array_equal(after, savl.upscale(source, model=weights))


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
from savl.cli import main
main()
"""


def test_ctrl_c_stops_the_workers_and_leaves_no_partial_file(cluster: str, pictures: Pictures, tmp_path: Path) -> None:
    pictures(24, side=96)
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, "upscale", "in", "-o", "out", "--ray", cluster, "--tile", "32"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(savl.__file__).parents[1])},
    ) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out").exists() or len(list((tmp_path / "out").glob("*.png"))) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        _, text = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert "interrupted:" in text
    assert "Traceback" not in text, text
    names = os.listdir(tmp_path / "out")
    assert not [name for name in names if name.startswith(".")]
    assert 2 <= len(names) < 24
    for name in names:
        assert read_image(tmp_path / "out" / name).pixels.shape == (384, 400, 3)
