"""Tests of `savl profile` and `python -m savl.profile` from end to end."""

from __future__ import annotations

import gzip
import json
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import savl
from savl import cli
from savl.build_info import build_info
from savl.cli.app import app as savl_app
from savl.ops import scopes
from savl.ops.op import OPS
from savl.ops.settings import parse_settings, settings_of_environment
from savl.profile import command, measure, roofline, workload
from savl.profile.workload import find_model, make_workload

ROOT = Path(__file__).resolve().parents[2]
SERVING = "cpp" if build_info()["extension"] else "eager"


@dataclass
class Finished:
    code: int
    text: str
    """Both outputs."""
    errors: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Runs the command on savl-tiny, 16×16 pixels, one step, on the CPU, unless the arguments say otherwise."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("SAVL_KERNELS", raising=False)
    monkeypatch.setattr(scopes, "process", scopes.ProcessSettings(None))

    def run(*arguments: Any) -> Finished:
        capsys.readouterr()
        defaults = ["--size", "16x16", "--device", "cpu", "--warm-up", "0", "--steps", "1"]
        with pytest.raises(SystemExit) as stop:
            cli.main(["profile", *defaults, *map(str, arguments)])
        captured = capsys.readouterr()
        code = stop.value.code
        return Finished(code if isinstance(code, int) else 0, captured.out + captured.err, captured.err)

    return run


def profile_command() -> Any:
    """The command `savl profile` as Typer has it."""
    group: Any = typer.main.get_command(savl_app)
    return group.commands["profile"]


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of all tables by the first cell of their row."""
    cells = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")
    ]
    return {row[0]: row[1:] for row in cells}


def test_profile_prints_operations_and_ranges_and_writes_a_trace(run: Callable[..., Finished], tmp_path: Path) -> None:
    trace = tmp_path / "step.json"
    done = run("--trace", trace, "--top", "4")
    assert done.code == 0, done.text
    table = rows(done.text)
    assert table["step"][1:] == ["100.0%", "1"]
    assert table["all HAB"][2] == "6"
    assert table["all OCAB"][2] == "2"
    assert table[f"window_attention [{SERVING}]"][2] == "14", "one for each HAB and each DSCA"
    assert len([name for name in table if "::" in name]) == 4
    assert re.search(r"median step \d+\.\d{3} ms of 1", done.text)
    events = json.loads(trace.read_text())["traceEvents"]
    annotated = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert {"step", "network", "group 1 HAB 2 CAB", "estimator", f"gaussian_posterior [{SERVING}]"} <= annotated
    assert list(tmp_path.iterdir()) == [trace]


def test_shares_and_times_add_up() -> None:
    work = make_workload(
        find_model("savl-tiny"),
        "savl-tiny",
        height=16,
        width=16,
        batch=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    found, _ = measure.profile(work, warm_up_steps=1, steps=2)
    assert sum(each.share for each in found.operations) == pytest.approx(1)
    assert list(found.operations) == sorted(found.operations, key=lambda each: -each.seconds)
    by_name = {each.name: each for each in found.ranges}
    assert by_name["step"].seconds == pytest.approx(found.profiled_seconds)
    parts = ("estimator", "shallow features", "group 0", "group 1", "deep features", "upsampler")
    assert 0 < sum(by_name[each].share for each in parts) <= by_name["network"].share <= 1
    assert by_name["all CAB"].seconds <= by_name["all HAB"].seconds
    assert found.seconds > 0


def test_an_existing_file_is_refused_before_profiling_starts(
    run: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "step.json.gz"
    trace.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(measure, "profile", lambda *arguments, **options: pytest.fail("profiling started"))
        done = run("--trace", trace)
    assert done.code == 1
    assert done.text.strip() == f"error: {trace} exists already (--overwrite replaces it)"
    assert trace.read_text() == "mine"
    assert run("--trace", trace, "--overwrite").code == 0
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]


def test_a_training_step_has_ranges_for_its_phases(run: Callable[..., Finished]) -> None:
    done = run("--train", "--dtype", "bfloat16", "--backend", "eager")
    assert done.code == 0, done.text
    table = rows(done.text)
    shares = [float(table[phase][1].rstrip("%")) for phase in ("forward", "backward", "optimizer")]
    assert all(share > 0 for share in shares)
    assert 90 < sum(shares) <= 100.1
    assert table["decoder"][2] == "1"
    assert table["channel_modulation [eager]"][2] == "8"
    assert f"[{SERVING}]" not in done.text or SERVING == "eager"


@pytest.mark.parametrize(
    ("variable", "flags", "backend"),
    [("eager", (), "eager"), ("eager", ("--backend", "fused"), SERVING), (None, ("--backend", "eager"), "eager")],
)
def test_the_option_or_the_environment_variable_selects_the_backend(
    run: Callable[..., Finished],
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    flags: tuple[str, ...],
    backend: str,
) -> None:
    if variable is not None:
        monkeypatch.setenv("SAVL_KERNELS", variable)
        monkeypatch.setattr(scopes, "process", scopes.ProcessSettings(settings_of_environment()))  # as at the start
    served: list[str] = []
    monkeypatch.setattr(
        command, "_print_profile", lambda *arguments: served.append(savl.kernel_report().serving("window_attention"))
    )
    assert run(*flags).code == 0
    assert served == [backend]
    assert savl.kernel_report().serving("window_attention") == "eager", "the command left the switch on"


def test_a_network_can_be_loaded_from_a_file(
    run: Callable[..., Finished], tmp_path: Path, small_config: Callable[..., Any]
) -> None:
    path = tmp_path / "mine.safetensors"
    savl.save(savl.build(small_config()), path)
    done = run("--model", path, "--size", "5x7")
    assert done.code == 0, done.text
    assert rows(done.text)["all HAB"][2] == "3"
    assert "mine.safetensors, inference, 1×3×5×7, float32, cpu" in done.text


def test_a_roofline_is_drawn_and_printed_as_a_table(
    run: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_all = roofline.measure_roofline
    monkeypatch.setattr(
        roofline,
        "measure_roofline",
        lambda config, **options: measure_all(config, **options, rounds=1, matrix=32, copied=4096),
    )
    path = tmp_path / "roofline.svg"
    done = run("--roofline", path)
    assert done.code == 0, done.text
    assert path.read_bytes().startswith(b"<?xml")
    table = [line for line in done.text.splitlines() if " eager " in line]
    assert [line.split()[1] for line in table] == list(OPS)
    assert all(line.rstrip(" │").endswith("%") for line in table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--model", "swinir"),
            "model must be one of savl-base, savl-tiny, hat-s, hat, hat-l or an existing file, got",
        ),
        (("--size", "16"), "--size must be HEIGHTxWIDTH in pixels, such as 64x64, got '16'"),
        (("--size", "0x16"), "--size must be HEIGHTxWIDTH"),
        (("--dtype", "int8"), "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (("--backend", "cpp"), "--backend must be fused or eager, got 'cpp'"),
        (("--device", "tpu"), "device 'tpu' is not auto, cpu"),
        (("--device", "cuda:99"), "sees"),
        (("--capture",), "--capture is for nsys and ncu, which record CUDA: the device is cpu"),
        (("--capture", "--trace", "step.json"), "it goes with neither --trace nor --roofline"),
        (("--trace", "step.txt"), "--trace must end in .json or .json.gz, got 'step.txt'"),
        (("--roofline", "roof.bmp"), "--roofline must end in .svg, .pdf or .png, got 'roof.bmp'"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, tuple) else "",
)
def test_an_invalid_option_is_reported_in_one_line(
    run: Callable[..., Finished], arguments: tuple[str, ...], message: str
) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert message in done.text
    assert len(done.text.strip().splitlines()) == 1, done.text


def test_a_dtype_that_the_device_does_not_support_is_refused(
    run: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'\nand more")

    monkeypatch.setattr(workload.F, "conv2d", refuse)
    done = run("--dtype", "float16")
    assert done.code == 2
    assert done.text.strip() == (
        "error: dtype float16 is not supported on cpu: \"slow_conv2d_cpu\" not implemented for 'Half'"
    )


def test_an_invalid_environment_variable_is_reported(
    run: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nonsense(*arguments: Any) -> Any:
        return parse_settings("fast")

    monkeypatch.setattr(command, "_workload", nonsense)
    done = run()
    assert done.code == 2
    assert "SAVL_KERNELS must be" in done.text


def test_capture_records_only_the_annotated_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: log.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: log.append("stop"))
    work = make_workload(
        find_model("savl-tiny"),
        "savl-tiny",
        height=8,
        width=8,
        batch=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    work.model.upsampler.register_forward_hook(
        lambda module, *_: log.append(f"step with {len(module._forward_hooks)} hooks")
    )
    command._capture(work, 2, 3)
    assert log == ["step with 1 hooks"] * 2 + ["start"] + ["step with 2 hooks"] * 3 + ["stop"]


def test_all_names_in_the_guide_exist(run: Callable[..., Finished]) -> None:
    done = run("--guide")
    assert done.code == 0
    guide = done.text
    kernels = "".join(path.read_text() for path in sorted((ROOT / "kernels").glob("attention*.py")))
    for kernel in ("forward", "backward_qkv", "backward_q", "backward_kv", "backward_bias"):
        assert kernel in guide
        assert f"\ndef {kernel}(" in kernels
    sources = "".join(path.read_text() for path in sorted((ROOT / "csrc/cuda").glob("*.h")))
    named = re.search(r"demangled name tells them apart: ([\w,\s]+):", guide)
    assert named is not None
    assert re.findall(r"\w+", named[1])
    for kernel in re.findall(r"\w+", named[1]):
        assert f"struct {kernel} {{" in sources, kernel
    for page in re.findall(r"docs/[\w-]+\.md", guide):
        assert (ROOT / page).is_file(), page
    options = {option for each in profile_command().params for option in each.opts}
    lines = [line for line in guide.replace("\\\n", " ").splitlines() if "python -m savl.profile" in line]
    for line in lines:
        for option in re.findall(r"(?<!\S)--[a-z-]+", line.partition("-m savl.profile")[2]):
            assert option in options, option
    assert len(lines) >= 6


def test_the_module_runs_the_subcommand(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cli, "main", lambda: calls.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["savl.profile", "--size", "16x16"])
    runpy.run_module("savl.profile", run_name="__main__")
    assert calls == [["profile", "--size", "16x16"]]


def test_a_roofline_without_matplotlib_names_the_extra(
    run: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    done = run("--roofline", tmp_path / "roofline.svg")
    assert done.code == 2
    assert "pip install 'savl[profile]'" in done.text


def test_all_operations_and_ranges_are_written_as_json(run: Callable[..., Finished], tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    assert run("--json", path, "--top", 1).code == 0
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["title"].startswith("savl-tiny, inference")
    assert len(content["operations"]) > 1
    assert {"step", "all HAB", "all DSCA"} <= {row["name"] for row in content["ranges"]}
    assert sum(row["share"] for row in content["operations"]) == pytest.approx(1)
    assert run("--json", path).code == 1, "there is a file already"
    assert run("--json", path, "--overwrite").code == 0
