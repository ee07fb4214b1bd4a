"""Tests of `.ci/gpu` without a GPU: its limits, its commands, and that no part can hang or take others with it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks import cases, gpu_kernels, gpu_ratios, gpu_run, processes, timing
from benchmarks.gpu_run import Part
from benchmarks.network_from_blocks import network_from_blocks
from savl.cli.app import app
from savl.network import CONFIGS
from savl.ops.op import OPS, why_unavailable

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_EXTENSION = why_unavailable("window_attention", "cpp")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


# Plan


def test_the_plan_fits_two_calls_into_a_quarter_of_an_hour() -> None:
    command = [str(ROOT / ".ci/gpu"), "--plan"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    limits: dict[str, dict[str, int]] = {}
    for line in done.stdout.splitlines():
        if head := re.match(r"(first|second|on request): ", line):
            call = limits.setdefault(head[1], {})
        elif row := re.match(r"  (?:until +\d+ s| +) +(\d+) s +([\w-]+) ", line):
            call[row[2]] = int(row[1])
    sums = {call: sum(parts.values()) for call, parts in limits.items() if call != "on request"}
    assert set(sums) == {"first", "second"}
    assert all(0 < total <= 600 for total in sums.values()), sums
    # A minute of the quarter of an hour goes into starting the machine.
    assert sum(sums.values()) <= 15 * 60 - 60, sums
    assert {name for parts in limits.values() for name in parts} == {part.name for part in gpu_run.PARTS}


def test_parts_are_chosen_by_call_and_by_name() -> None:
    first, second = gpu_run.chosen(["first"]), gpu_run.chosen(["second"])
    assert gpu_run.chosen([]) == [*first, *second]
    assert [part.name for part in gpu_run.chosen(["blocks", "ratios"])] == ["ratios", "blocks"]
    with pytest.raises(ValueError, match="'rations' is neither first, second nor one of install"):
        gpu_run.chosen(["rations"])


@pytest.mark.parametrize("part", gpu_run.PARTS, ids=lambda part: part.name)
def test_the_command_of_every_part_exists_and_takes_its_options(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *words = (word.replace(gpu_run.FOLDER, str(tmp_path)) for word in part.command)
    if program == ".ci/compute-sanitizer":
        subprocess.run(["bash", "-n", str(ROOT / program)], check=True)
        assert words[0] in ("memcheck", "racecheck")
        assert words[1:] == [] or words[1:] == ["--", *gpu_run.DRIVER]
        return
    assert program == "python"
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file()
        assert words[1:] == list(gpu_run.DRIVER)
        help_of_driver = subprocess.run(
            [sys.executable, words[0], *words[1:], "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "--op" in help_of_driver.stdout
        return
    module, options = words[1], words[2:]
    if module in ("pip", "pytest"):
        assert importlib.util.find_spec(module) is not None
        assert all((ROOT / word).exists() for word in options if "/" in word)
    elif module in ("savl", "savl.profile"):
        arguments = options if module == "savl" else ["profile", *options]
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context(command.name, list(arguments)).close()  # an unknown option or a wrong value raises
    else:
        # Options are read before a GPU is looked for.
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(gpu_kernels.shutil, "which", lambda name: None)
        monkeypatch.setattr(gpu_kernels, "profile_all", lambda path, seconds, side: 1)
        assert importlib.import_module(module).main(options) == 1


def test_the_options_of_the_sanitizer_driver_name_ops_and_dtypes() -> None:
    split = gpu_run.DRIVER.index("--dtype")
    assert set(gpu_run.DRIVER[1:split]) <= set(OPS)
    assert set(gpu_run.DRIVER[split + 1 :]) <= {"float32", "bfloat16", "float16"}


# Running


def python(name: str, code: str, seconds: int = 60) -> Part:
    return Part(name, gpu_run.FIRST, seconds, ("python", "-c", code), "a test")


def test_a_part_that_fails_or_hangs_leaves_the_others_their_turn(tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True)\n"
    parts = [
        python("failing", "raise SystemExit(3)"),
        python("hanging", stubborn + "while True: time.sleep(1)", 6),
        Part("missing", gpu_run.FIRST, 5, ("no-such-program-anywhere",), "a test"),
        python("after", "print('still here')"),
    ]
    start = time.monotonic()
    ended = gpu_run.run(parts, tmp_path)
    assert time.monotonic() - start < 60
    assert {name: each["state"] for name, each in ended.items()} == {
        "failing": processes.FAILED,
        "hanging": processes.CUT_OFF,
        "missing": processes.MISSING,
        "after": processes.OK,
    }
    assert ended["failing"]["code"] == 3
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "begun" in log, "what a part prints before it is killed is kept"
    assert "still here" in log


def test_a_part_that_is_interrupted_can_write_what_it_has(tmp_path: Path) -> None:
    code = (
        "import time\n"
        "try:\n    print('ready', flush=True)\n    time.sleep(60)\n"
        f"except KeyboardInterrupt:\n    open({str(tmp_path / 'kept')!r}, 'w').write('so far')\n"
    )
    outcome = processes.run([sys.executable, "-c", code], 12, grace=30)
    assert outcome.state == processes.CUT_OFF
    assert (tmp_path / "kept").read_text() == "so far"


def test_what_a_part_has_started_is_killed_with_it(tmp_path: Path) -> None:
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    assert processes.run([sys.executable, "-c", code], 8, grace=1).state == processes.CUT_OFF
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the child process still runs")


def test_how_a_part_ended_is_written_before_the_next_begins(tmp_path: Path) -> None:
    record = tmp_path / "parts.json"
    code = f"import json; assert json.load(open({str(record)!r}))['one']['state'] == 'ok'"
    assert gpu_run.run([python("one", "pass"), python("two", code)], tmp_path)["two"]["state"] == processes.OK
    gpu_run.run([python("three", "pass")], tmp_path)
    assert list(json.loads(record.read_text(encoding="utf-8"))) == ["one", "two", "three"], "a second call adds to it"


def test_tuned_block_sizes_are_stored_with_the_results_and_used_by_later_parts(tmp_path: Path) -> None:
    code = "import os; print('cache', os.environ['SAVL_CACHE_DIR'])"
    gpu_run.run([python("one", code)], tmp_path)
    assert f"cache {tmp_path}" in (tmp_path / "log.txt").read_text(encoding="utf-8")


# Kernels


@needs_triton
def test_no_two_kernels_have_the_same_name() -> None:
    names = gpu_kernels.kernel_names()
    assert {"forward", "normalise_pixels"} <= set(names)
    twice = {name: modules for name, modules in names.items() if len(modules) > 1}
    assert not twice, "Nsight Compute could not tell them apart"


@needs_triton
def test_nsight_compute_is_asked_for_exactly_the_kernels_of_a_pass_and_for_warp_stalls() -> None:
    passes = gpu_kernels.passes()
    assert passes[:2] == ["window_attention forward", "overlapping_window_attention forward"]
    for what in passes:
        words = gpu_kernels.command(what, 512)
        pattern = re.compile(words[words.index("--kernel-name") + 1].removeprefix("regex:"))
        assert bool(pattern.search("forward")) == what.endswith("forward")
        for other in ("vectorized_elementwise_kernel", "forward_2", "my_forward", "cunn_SoftMaxForward"):
            assert not pattern.search(other)
        assert {"WarpStateStats", "SchedulerStats", "SpeedOfLight", "Occupancy", "LaunchStats"} <= set(words)
        assert words[words.index("--clock-control") + 1] == "none"


@pytest.mark.skipif(WITHOUT_EXTENSION is not None, reason=str(WITHOUT_EXTENSION))
@needs_triton
@pytest.mark.parametrize("what", ["window_attention forward", "layer_norm backward"])
def test_the_process_that_is_profiled_runs_on_a_cpu(what: str) -> None:
    assert gpu_kernels.main(["--capture", what, "--device", "cpu", "--side", "32"]) == 0


@needs_triton
def test_every_pass_is_profiled_in_a_process_of_its_own_and_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_kernels.shutil, "which", lambda name: name)
    passes = gpu_kernels.passes()[:3]
    monkeypatch.setattr(gpu_kernels, "passes", lambda: passes)
    monkeypatch.setattr(
        gpu_kernels,
        "command",
        lambda what, side: [sys.executable, "-c", f"print('profile of {what}'); exit({what == passes[1]:d})"],
    )
    path = tmp_path / "ncu.txt"
    assert gpu_kernels.main(["--ncu", str(path), "--side", "64"]) == 1, "one of them fails"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines == [line for what in passes for line in (f"=== {what}, 64×64", f"profile of {what}")]


# Miniatures


class Recorder:
    """Substitute for CUDA graphs that computes again."""

    device = torch.device("cpu")

    def record(self, function: Any, warm_ups: int = 0) -> Any:
        out = function()
        return lambda: out.copy_(function()), out

    def release(self) -> None:
        pass


@pytest.mark.skipif(WITHOUT_EXTENSION is not None, reason=str(WITHOUT_EXTENSION))
def test_blocks_and_graphs_are_measured_and_give_the_time_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = dataclasses.replace(CONFIGS["savl-base"], channels=24, heads=2, depths=(1, 1), estimator_dilations=(1,))
    monkeypatch.setattr(cases, "CHANNELS", small.channels)
    monkeypatch.setitem(CONFIGS, "savl-base", small)
    monkeypatch.setattr("benchmarks.network_from_blocks._CONFIG", small)
    monkeypatch.setattr(cases, "graph_capture", lambda run: Recorder())
    monkeypatch.setattr(gpu_ratios, "ceilings", lambda run: {"copy_gb_per_second": 10.0, "product_tflops": 0.1})
    path = tmp_path / "blocks.json"
    options = ["--device", "cpu", "--dtype", "float32", "--side", "32", "--rounds", "1", "--json", str(path)]
    parts = ["dsca", "hab", "da-rhag", "other-layers", "dsca-max-autotune"]
    assert gpu_ratios.main([*options, "--only", *parts]) == 0
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["parts"].pop("dsca-max-autotune")["state"] == "not on this device"
    for name, part in content["parts"].items():
        assert part["state"] == "done", (name, part)
        assert set(part["variants"]) >= {"eager", "fused", cases.FUSED_GRAPH}
        assert all("median_ms" in record for record in part["variants"].values()), part["variants"]
    times = {name: part["variants"]["fused"]["median_ms"] for name, part in content["parts"].items()}
    computed = content["network_from_blocks"]
    assert set(computed) == {"eager", "fused", cases.FUSED_GRAPH}
    assert computed["fused"] == {"ms": pytest.approx(2 * times["da-rhag"] + times["other-layers"]), "from": "DA-RHAG"}
    assert "savl-base, computed from its blocks" in gpu_ratios.table({**content, "complete": True})


def test_a_group_that_was_not_compiled_in_time_is_computed_from_its_blocks() -> None:
    def part(**milliseconds: float) -> dict[str, Any]:
        return {"variants": {name.replace("_", ", "): {"median_ms": ms} for name, ms in milliseconds.items()}}

    parts = {
        "dsca": part(eager=2.0, fused=1.0),
        "hab": part(eager=4.0, fused=2.0),
        "da-rhag": part(eager=50.0, fused=20.0),
        "other-layers": part(eager=12.0, fused=6.0),
        "dsca-max-autotune": part(eager=3.0, tuned=1.5),
        "hab-max-autotune": part(tuned=3.0),
    }
    # Six groups of seven DSCAs, six HABs, and an OCAB, which is the rest of the 50 ms in eager.
    tuned = (7 * 1.5 + 6 * 3.0) * 50.0 / (7 * 2.0 + 6 * 4.0)
    assert network_from_blocks(parts) == {
        "eager": {"ms": 6 * 50.0 + 12.0, "from": "DA-RHAG"},
        "fused": {"ms": 6 * 20.0 + 6.0, "from": "DA-RHAG"},
        "tuned": {"ms": pytest.approx(6 * tuned + 12.0), "from": "DSCA and HAB"},
    }
    assert network_from_blocks({}) == {}


def test_the_compiled_fused_network_is_compared_with_the_fused_network() -> None:
    part = gpu_ratios.PARTS["network-fused-compile"]
    assert (part.subject, part.compiles) == (cases.FUSED_COMPILED, True)
    records = {"eager": {"median_ms": 9.0}, "fused": {"median_ms": 3.0}, cases.FUSED_COMPILED: {"median_ms": 2.0}}
    row = gpu_ratios.ratio("network", "fused", part.wanted["fused"], records, subject=part.subject)
    assert (row["against"], row["ratio"], row["met"]) == ("fused", 1.5, True)
    assert timing.COMPILED[2] == cases.FUSED_COMPILED, "its memory is not that of its first call"
