"""Settings of a process: threads, how they wait, memory of the C library, and limits of the system."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from savl.cli import main
from savl.inference import limits, process_settings
from savl.inference.limits import control_group_folders, processor_quota
from savl.inference.process_settings import MAX_THREADS, SPIN_COUNT, keep_freed_memory, limit_spinning, use_threads

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are set as Linux sets them")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "VIPS_CONCURRENCY")


def run(code: str, **environment: str) -> str:
    """Run a program in a new process, with no other variables of OpenMP than those given; return its output."""
    kept = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SPINNING = """
import os
from savl.inference.process_settings import limit_spinning
limit_spinning()
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("KMP_BLOCKTIME"), os.environ.get("OMP_WAIT_POLICY"))
"""


def test_commands_limit_the_spinning_of_idle_threads() -> None:
    assert run(SPINNING) == f"{SPIN_COUNT} 1 None"


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")])
def test_settings_of_the_user_for_waiting_threads_are_kept(name: str, value: str) -> None:
    expected = {"OMP_WAIT_POLICY": "None None ACTIVE", "GOMP_SPINCOUNT": "7 None None"}
    assert run(SPINNING, **{name: value}) == expected[name]


def test_the_environment_is_not_changed_after_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    limit_spinning()
    assert not any(name in os.environ for name in WAITING)


def test_importing_the_upscaler_changes_no_setting_of_the_process() -> None:
    code = """
import os
before = dict(os.environ)
import torch, savl
threads = torch.get_num_threads()
savl.Upscaler(savl.build("savl-tiny"))(torch.rand(1, 3, 8, 8))
print(dict(os.environ) == before, torch.get_num_threads() == threads)
"""
    assert run(code) == "True True"


def test_the_number_of_threads_is_that_of_torch_and_libvips() -> None:
    code = """
import torch
from savl.inference.process_settings import use_threads
assert use_threads(3) == torch.get_num_threads() == 3
import pyvips
assert pyvips.vips_lib.vips_concurrency_get() == 3
use_threads(2)
print(torch.get_num_threads(), pyvips.vips_lib.vips_concurrency_get())
"""
    assert run(code) == "2 2"


# Limits of control groups and ulimit


def test_a_container_that_may_take_one_and_a_half_processors_gets_two_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("savl.inference.process_settings.processor_quota", lambda: 1.5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("VIPS_CONCURRENCY", "1")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert use_threads() == 2
        torch.set_num_threads(4)
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        assert use_threads() == 4, "what the user says counts"
        assert use_threads(3) == 3
    finally:
        torch.set_num_threads(before)


def test_fewer_threads_are_used_if_some_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIPS_CONCURRENCY", "1")  # so that the value set by the test is removed afterwards
    before = torch.get_num_threads()
    started: list[object] = []

    def start(self: object) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(self)

    monkeypatch.setattr("threading.Thread.start", start)
    monkeypatch.setattr("threading.Thread.join", lambda self: None)
    try:
        assert use_threads(8) == 3
    finally:
        torch.set_num_threads(before)


def groups(monkeypatch: pytest.MonkeyPatch, root: Path, listing: str, files: dict[str, str]) -> None:
    """Replace /sys/fs/cgroup and /proc/self/cgroup by files in a folder."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "listing").write_text(listing)
    monkeypatch.setattr(limits, "MOUNT", root)
    monkeypatch.setattr(limits, "LISTING", root / "listing")


@pytest.mark.parametrize(
    ("listing", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4.0),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        ("3:cpu,cpuacct:/d\n", {"cpu/d/cpu.cfs_quota_us": "50000", "cpu/d/cpu.cfs_period_us": "100000"}, 0.5),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        # A container with version 1: the listing contains the path outside the container, where it is the root.
        ("3:cpu:/docker/1f\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ("", {}, None),
    ],
)
def test_the_quota_is_the_minimum_over_all_control_groups(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listing: str, files: dict[str, str], quota: float | None
) -> None:
    groups(monkeypatch, tmp_path, listing, files)
    assert processor_quota() == quota


@pytest.mark.parametrize(
    ("listing", "prefix", "names"),
    [
        ("0::/job\n", "job", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:memory:/job\n",
            "memory/job",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_available_memory_is_limited_by_control_groups(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listing: str, prefix: str, names: tuple[str, str, str]
) -> None:
    limit, used, cached = names
    files = {f"{prefix}/{limit}": "300000000", f"{prefix}/{used}": "280000000"}
    groups(monkeypatch, tmp_path, listing, {**files, f"{prefix}/memory.stat": f"anon 7\n{cached} 30000000\n"})
    assert [folder.name for folder in control_group_folders("memory")][:1] == ["job"]
    assert limits.available_bytes() == 50_000_000


@linux
def test_available_memory_is_limited_by_ulimit() -> None:
    code = """
import resource
from savl.inference.limits import available_bytes
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))
print(available_bytes() <= 2**26)
"""
    assert run(code) == "True"


# Too little memory


@linux
@pytest.mark.parametrize("megabytes", [300, 640, 3000])
def test_a_command_with_little_memory_writes_the_result_or_one_error_line(tmp_path: Path, megabytes: int) -> None:
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({megabytes} * 2**20,) * 2)
from savl.cli import main
main(["upscale", "in.png", "-o", "out.png", "--tile", "0", "--threads", "1"])
"""
    pyvips = pytest.importorskip("pyvips")
    pyvips.Image.black(24, 16, bands=3).pngsave(str(tmp_path / "in.png"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    lines = done.stderr.splitlines()
    if done.returncode == 0:
        assert pyvips.Image.new_from_file(str(tmp_path / "out.png")).width == 96
        return
    assert megabytes < 3000, done.stderr
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1, done.stderr
    assert "out of memory" in lines[0], done.stderr
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("command", "count"),
    [("upscale", 0), ("upscale", MAX_THREADS + 1)]
    + [(command, 99999999999) for command in ("upscale", "degrade", "evaluate", "analyze", "train")],
)
def test_an_invalid_number_of_threads_is_a_usage_error(
    command: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--threads", str(count)])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--threads" in said
    assert str(1 if count < 1 else MAX_THREADS) in said


def test_the_number_of_started_threads_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(process_settings, "_startable", lambda count: asked.append(count) or 1)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99999999)  # as set by OMP_NUM_THREADS
    monkeypatch.setattr(process_settings, "_use_vips_threads", asked.append)
    assert use_threads() == 1
    assert asked == [MAX_THREADS, 1, 1]


def test_the_number_of_libvips_threads_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    pyvips = pytest.importorskip("pyvips")
    before = pyvips.vips_lib.vips_concurrency_get()
    try:
        process_settings._use_vips_threads(5000)
        assert pyvips.vips_lib.vips_concurrency_get() == 1024
    finally:
        pyvips.vips_lib.vips_concurrency_set(before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted as Linux counts them")
@pytest.mark.parametrize("where", ["main", "thread"])
def test_kept_memory_is_reused_without_page_faults(where: str) -> None:
    code = """
import resource, sys, threading, torch
from savl.inference.process_settings import keep_freed_memory

if not keep_freed_memory():
    sys.exit(77)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25 * 2**20)  # 100 MiB, more than further heaps can hold
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def work():
    first = faults()
    print(first, min(faults() for _ in range(8)))  # pieces left by other allocations may not fit at once

if sys.argv[1] == "main":
    work()
else:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code, where], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 77:
        pytest.skip("this C library cannot be told to keep memory")
    assert done.returncode == 0, done.stderr
    first, again = map(int, done.stdout.split())
    assert again < first / 10, f"{first} page faults the first time, {again} later"


def test_nothing_is_changed_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
