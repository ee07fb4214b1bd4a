"""`savl kernels`, and which kernels serve `savl upscale`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from savl.build_info import build_info
from savl.cli import kernels, tune
from savl.cli.tune import tuning_problems
from savl.inference import upscale_image
from savl.kernels import configs
from savl.kernels import tune as kernels_tune
from savl.kernels.configs import STAGES, KernelConfig, Problem, default_config, stages_of
from savl.network import CONFIGS
from savl.ops import KernelSettings, KernelUnavailable, equivalence, gpu, kernel_report, library, scopes
from savl.ops import op as op_registry
from savl.ops.library import EXTENSION_UNAVAILABLE
from savl.ops.op import OPS
from savl.ops.settings import settings_of_environment

Run = Callable[..., Any]
Write = Callable[..., Path]

needs_extension = pytest.mark.skipif(
    EXTENSION_UNAVAILABLE is not None, reason=str(build_info()["reason"] or EXTENSION_UNAVAILABLE)
)


@pytest.fixture(autouse=True)
def _no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAVL_KERNELS", raising=False)
    monkeypatch.setattr(scopes, "process", scopes.ProcessSettings(None))


@pytest.fixture
def one_case_a_dtype(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Verification with one small case for every op and dtype, on one thread: on a busy machine more take longer."""
    for name, op in OPS.items():
        monkeypatch.setitem(OPS, name, replace(op, quick_cases=op.small_cases[:1]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SAVL_")}
    return subprocess.run(
        [sys.executable, "-c", "from savl.cli import main; main()", *arguments],
        env={**inherited, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def set_environment(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Set ``SAVL_KERNELS`` as if it had been set when the process began."""
    monkeypatch.setenv("SAVL_KERNELS", value)
    monkeypatch.setattr(scopes, "process", scopes.ProcessSettings(settings_of_environment()))


# savl kernels info


@needs_extension
def test_info_says_that_the_fused_kernels_serve_unless_told_otherwise(savl: Run) -> None:
    done = savl("kernels", "info")
    assert done.code == 0
    lines = done.text.splitlines()
    assert [line.split()[:2] for line in lines[1 : 1 + len(OPS)]] == [[op, "cpp"] for op in OPS]
    assert "cpp takes float32, float64, bfloat16" in lines
    assert f"{build_info()['kernel_instruction_set']} kernels" in done.text
    assert kernel_report().serving("window_attention") == "eager", "the command left the switch on"


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_info_is_one_screen_that_splits_no_name_and_repeats_no_reason(
    savl: Run, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    reasons = {"cpp": "nobody compiled it", "triton": "there is no GPU", "cuda": "there is no GPU"}
    missing = {key: reasons.get(key[1]) for key in op_registry.UNAVAILABLE}
    monkeypatch.setattr(op_registry, "UNAVAILABLE", missing)
    monkeypatch.setenv("COLUMNS", str(columns))
    done = savl("kernels", "info")
    assert done.code == 0
    lines = done.text.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= min(columns, 100)
    assert [line.split() for line in lines[1 : 1 + len(OPS)]] == [[op, "eager"] for op in OPS]
    assert lines.count("cpp does not serve: nobody compiled it") == 1
    assert lines.count("triton and cuda do not serve: there is no GPU") == 1


def test_info_names_the_ops_of_a_reason_that_is_not_true_of_all(savl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dict.fromkeys(op_registry.UNAVAILABLE) | {("layer_norm", "cpp"): "it is older than this package"}
    monkeypatch.setattr(op_registry, "UNAVAILABLE", missing)
    assert "cpp does not serve layer_norm: it is older than this package" in savl("kernels", "info").text


def test_info_names_backends_that_were_requested_by_name_and_raise(savl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(op_registry.UNAVAILABLE, ("layer_norm", "triton"), "there is no GPU")
    set_environment(monkeypatch, "layer_norm=triton")
    text = savl("kernels", "info").text
    assert "triton for layer_norm: requested by name, and raises KernelUnavailable: there is no GPU" in text


@needs_extension
def test_info_with_a_gpu_has_a_column_for_it(savl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_registry, "UNAVAILABLE", dict.fromkeys(op_registry.UNAVAILABLE))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Test 80GB")
    monkeypatch.setitem(library.FUSED, "triton", replace(library.FUSED["triton"], unavailable=None))
    monkeypatch.setattr(gpu, "why_unfit", lambda backend, index: "NVIDIA Test 80GB has 7.5")
    done = savl("kernels", "info")
    lines = done.text.splitlines()
    rows = [line.split() for line in lines[1 : 1 + len(OPS)]]
    assert rows == [[name, "cpp", op.backend_for("cuda") or "eager"] for name, op in OPS.items()]
    for backend in ("triton", "cuda"):
        assert f"{backend} takes float32, bfloat16, float16" in lines
    assert "NVIDIA Test 80GB has 7.5" in done.text


def test_info_for_programs_is_json_with_the_keys_that_the_help_names(savl: Run) -> None:
    found = json.loads(savl("kernels", "info", "--json").text)
    assert list(found) == ["savl", "torch", "threads", "instruction_set", "gpus", "extension", "cuda_library", "ops"]
    assert list(found["ops"]) == list(OPS)
    for op, entry in found["ops"].items():
        assert list(entry) == ["serves", "backends"]
        assert list(entry["serves"]) == ["cpu", "cuda"]
        assert list(entry["backends"]) == [*OPS[op].backends, "eager"]
        for backend in entry["backends"].values():
            assert list(backend) == ["device", "dtypes", "serves", "reason"]
    described = " ".join(savl("kernels", "info", "--help").text.split())
    for key in (*found, "serves", "backends", "device", "dtypes", "reason", "compiler", "architectures"):
        assert key in described, key
    assert savl("kernels", "info", "--json", "--all").code == 2


@needs_extension
def test_all_of_info_has_a_row_for_every_backend_and_splits_no_name(savl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        done = savl("kernels", "info", "--all")
        rows = [line for line in done.text.splitlines() if " cpp " in line]
        assert len(rows) == len(OPS)
        assert all(" yes " in row for row in rows)
        assert all(f" {op} " in done.text for op in OPS)


@needs_extension
def test_info_as_eager_says_that_they_could(savl: Run) -> None:
    done = savl("kernels", "info", "--eager")
    assert done.code == 0
    assert "cpp does not serve: could serve, but is switched off" in done.text


def test_all_of_info_without_the_extension_says_why(savl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = op_registry.UNAVAILABLE | {(op, "cpp"): "nobody compiled it" for op in OPS}
    monkeypatch.setattr(op_registry, "UNAVAILABLE", missing)
    done = savl("kernels", "info", "--all")
    assert done.code == 0
    assert done.text.count("nobody compiled it") == len(OPS)


@needs_extension
@pytest.mark.parametrize(("value", "backend"), [("eager", "eager"), ("fused", "cpp")])
def test_info_heeds_the_environment(value: str, backend: str, savl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, value)
    rows = [line.split() for line in savl("kernels", "info").text.splitlines()[1 : 1 + len(OPS)]]
    assert [row[1] for row in rows] == [backend] * len(OPS)


@needs_extension
def test_info_heeds_the_environment_of_its_process() -> None:
    done = command("kernels", "info", SAVL_KERNELS="channel_modulation=eager")
    assert done.returncode == 0, done.stderr
    rows = dict(line.split()[:2] for line in done.stdout.splitlines()[1 : 1 + len(OPS)])
    assert rows == dict.fromkeys(OPS, "cpp") | {"channel_modulation": "eager"}, done.stdout


@pytest.mark.parametrize("arguments", [("kernels", "info"), ("upscale", "photo.png")], ids="-".join)
def test_a_variable_that_says_nonsense_is_told_in_one_line(arguments: tuple[str, ...], tmp_path: Path) -> None:
    picture = tmp_path / "photo.png"
    done = command(*(str(picture) if part == "photo.png" else part for part in arguments), SAVL_KERNELS="fast")
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "SAVL_KERNELS" in lines[0]
    assert "'fast'" in lines[0]


# savl kernels verify


@needs_extension
@pytest.mark.usefixtures("one_case_a_dtype")
def test_verify_has_a_row_for_every_op_and_dtype_and_ends_well(savl: Run) -> None:
    done = savl("kernels", "verify")
    assert done.code == 0, done.text
    rows = [line for line in done.text.splitlines() if " ok " in line]
    assert len(rows) == 3 * len(OPS)
    for op in OPS:
        assert f"{op} · cpp" in done.text
    for dtype in ("float32", "float64", "bfloat16"):
        assert sum(f" {dtype} " in row for row in rows) == len(OPS), dtype
    assert f"{3 * len(OPS)} of {3 * len(OPS)} cases" in done.text


@pytest.mark.parametrize(("flags", "quick"), [((), True), (("--all",), False)], ids=["quick", "all"])
def test_verify_tries_all_cases_only_when_asked(
    savl: Run, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], quick: bool
) -> None:
    monkeypatch.setattr(op_registry, "UNAVAILABLE", dict.fromkeys(op_registry.UNAVAILABLE))
    asked: list[bool] = []

    def verify(op: str, backend: str, *, quick: bool) -> Iterator[Any]:
        asked.append(quick)
        return iter(())

    monkeypatch.setattr(equivalence, "verify", verify)
    assert savl("kernels", "verify", *flags).code == 0
    assert asked == [quick] * sum(len(op.backends) for op in OPS.values())


@needs_extension
@pytest.mark.usefixtures("one_case_a_dtype")
def test_verify_reports_a_wrong_kernel(savl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = OPS["window_attention"].function

    def wrong(*args: Any, kernels: KernelSettings, **options: Any) -> torch.Tensor:
        out: torch.Tensor = right(*args, kernels=kernels, **options)
        return out if kernels.window_attention == "eager" else out * 1.5

    monkeypatch.setitem(OPS, "window_attention", replace(OPS["window_attention"], function=wrong))
    done = savl("kernels", "verify", "--verbose")
    assert done.code == 1
    off = [line for line in done.text.splitlines() if " off " in line]
    assert len(off) == 3
    assert done.text.index("window_attention · cpp") < done.text.index(" off ") < done.text.index("overlapping_window")
    assert f"{3 * len(OPS) - 3} of {3 * len(OPS)} cases" in done.text


@pytest.mark.usefixtures("one_case_a_dtype")
def test_verify_without_the_extension_has_nothing_to_do(savl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = op_registry.UNAVAILABLE | {(op, "cpp"): "nobody compiled it" for op in OPS}
    monkeypatch.setattr(op_registry, "UNAVAILABLE", missing)
    done = savl("kernels", "verify")
    assert done.code == 0
    assert "nothing to verify" in done.text
    assert "nobody compiled it" in done.text


@pytest.mark.usefixtures("one_case_a_dtype")
def test_verify_passes_over_a_backend_that_is_there_but_cannot_serve_the_gpu(
    savl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op_registry, "UNAVAILABLE", dict.fromkeys(op_registry.UNAVAILABLE))

    def refuse(op: str, backend: str, *, quick: bool) -> Iterator[Any]:
        raise KernelUnavailable(f"{op}: this GPU has compute capability 6.1")
        yield

    monkeypatch.setattr(equivalence, "verify", refuse)
    done = savl("kernels", "verify")
    assert done.code == 0, done.text
    for op, record in OPS.items():
        for backend in record.backends:
            assert f"{op} · {backend}: not here" in done.text
    assert "compute capability 6.1" in done.text
    assert "nothing to verify" in done.text


# savl upscale


@pytest.fixture
def serving(savl: Run, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends in force whenever an upscaler is made."""
    seen: list[str] = []
    make = upscale_image.as_upscaler

    def spy(model: Any, **settings: Any) -> Any:
        seen.append(kernel_report().serving("window_attention"))
        return make(model, **settings)

    monkeypatch.setattr(upscale_image, "as_upscaler", spy)
    return seen


@needs_extension
@pytest.mark.parametrize(("flags", "backend"), [((), "cpp"), (("--eager",), "eager")], ids=["default", "eager"])
def test_upscale_uses_fused_kernels_by_default(
    savl: Run, picture: Write, serving: list[str], flags: tuple[str, ...], backend: str
) -> None:
    picture("photo.png")
    assert savl("upscale", "photo.png", *flags).code == 0
    assert set(serving) == {backend}
    assert kernel_report().serving("window_attention") == "eager", "the command left the switch on"


@needs_extension
def test_upscale_heeds_the_environment_and_eager_comes_before_it(
    savl: Run, picture: Write, serving: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture("photo.png")
    set_environment(monkeypatch, "eager")
    assert savl("upscale", "photo.png", "-o", "a.png").code == 0
    assert set(serving) == {"eager"}
    serving.clear()
    set_environment(monkeypatch, "fused")
    assert savl("upscale", "photo.png", "-o", "b.png").code == 0
    assert set(serving) == {"cpp"}
    serving.clear()
    assert savl("upscale", "photo.png", "-o", "c.png", "--eager").code == 0
    assert set(serving) == {"eager"}


# savl kernels info: block sizes and architectures


def test_info_lists_block_sizes_by_the_rule_where_there_is_no_gpu(savl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    done = savl("kernels", "info", "--all")
    assert done.code == 0
    for architecture in ("sm_80", "sm_90", "sm_100"):
        assert architecture in done.text
    assert "By the rule" in done.text
    problems = [tuning_problem.problem for _, tuning_problem in tuning_problems("bfloat16", tuple(CONFIGS))]
    for stage in STAGES:
        runs = [any(stage in stages_of(problem, (major, 0)) for major in (8, 9, 10)) for problem in problems]
        assert done.text.count(f" {stage} ") == sum(runs) > 0
    for name in CONFIGS:
        assert name in done.text
    config = default_config("forward", Problem("bfloat16", 24, 16, 16), (9, 0))
    assert f"{config.block_m}×{config.block_n}, {config.warps}w, {config.stages}s" in done.text
    assert "float16, " not in done.text.replace("bfloat16", "")
    everything = savl("kernels", "info", "--verbose")
    assert everything.text.count(" backward_kv ") == 3 * done.text.count(" backward_kv ")


def test_info_without_triton_says_so_and_lists_the_block_sizes(savl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "TRITON_UNAVAILABLE", "nobody installed it")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    done = savl("kernels", "info", "--all")
    assert done.code == 0
    assert "Triton kernels: none can run here: nobody installed it" in done.text.splitlines()
    assert " backward_bias " in done.text


@pytest.fixture
def fake_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A GPU for which one kernel has a better configuration; gives the file it is stored in."""

    class FakeGpu:
        name, architecture, triton = "NVIDIA Test 80GB", (9, 0), "3.9.0"

        def measure(self, stage: str, workload: Any, config: KernelConfig) -> float:
            return 80.0 if (stage, config) == ("forward", KernelConfig(64, 32, 2, 1)) else 100.0

        def disagreement(self, *arguments: Any) -> None:
            return None

    class NoCompilations:
        def __init__(self, *arguments: Any) -> None: ...

        def __enter__(self) -> Callable[..., None]:
            return lambda task, config: None

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(tune, "_machine", FakeGpu)
    monkeypatch.setattr(kernels_tune, "Compilations", NoCompilations)
    monkeypatch.setenv("SAVL_CACHE_DIR", str(tmp_path / "cache"))
    configs.forget()
    yield tmp_path / "cache" / "kernels" / "nvidia-test-80gb.json"
    configs.forget()


def test_info_says_where_the_block_sizes_of_a_gpu_come_from(
    savl: Run, fake_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert savl("kernels", "tune", "--network", "savl-tiny", "--dtype", "bfloat16", "--stage", "forward").code == 0
    stored = json.loads(fake_gpu.read_text())
    stored["configs"].append(stored["configs"][0] | {"stage": "backward_q", "kernels": "0" * 16})
    fake_gpu.write_text(json.dumps(stored))
    configs.forget()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Test 80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(gpu, "why_unfit", lambda backend, index: None)
    with pytest.warns(RuntimeWarning, match="tuned for other kernels"):
        done = savl("kernels", "info", "--all")
    assert done.code == 0
    assert "NVIDIA Test 80GB" in done.text
    assert "sm_80 " not in done.text.partition("CUDA library (")[0]
    assert done.text.count("· tuned here") == 2
    problems = [tuning_problem.problem for _, tuning_problem in tuning_problems("bfloat16", tuple(CONFIGS))]
    shown = sum(len(stages_of(problem, (9, 0))) for problem in problems)
    assert done.text.count("· rule") == shown - 2
    assert f"ignored in {fake_gpu}: tuned for other kernels" in done.text


@pytest.mark.parametrize(
    ("capability", "runs"), [((9, 0), ["sm_80", "sm_90"]), ((8, 6), ["sm_80"]), ((12, 0), ["sm_80"]), ((7, 5), [])]
)
def test_info_says_which_architectures_of_the_cuda_library_run_here(
    capability: tuple[int, int], runs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "CUDA_UNAVAILABLE", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    kernels._print_cuda_architectures(Console(width=200), ["NVIDIA Test"], ["80+PTX", "89", "90", "100"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "sm_" in line]
    assert len(lines) == 4
    assert [line.split()[1] for line in lines if "can run it" in line] == runs
    assert all(f"which is sm_{capability[0]}{capability[1]}" in line for line in lines if "can run it" not in line)


# savl kernels tune


def test_tune_without_a_gpu_says_why(savl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "TRITON_UNAVAILABLE", "torch finds no GPU")
    for flags in ((), ("--check",)):
        done = savl("kernels", "tune", *flags)
        assert done.code == 1
        assert done.text.strip() == "error: nothing to tune: torch finds no GPU"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dtype", "bf16"), "--dtype must be one of bfloat16, float16, float32, got 'bf16'"),
        (("--network", "swinir"), "--network must be one of savl-base, savl-tiny, hat-s, hat, hat-l, got 'swinir'"),
        (
            ("--stage", "fold_bias"),
            "--stage must be one of forward, backward_qkv, backward_q, backward_kv, backward_bias, got",
        ),
    ],
)
def test_tune_names_the_accepted_values(savl: Run, flags: tuple[str, ...], message: str) -> None:
    done = savl("kernels", "tune", *flags)
    assert done.code == 2
    assert message in done.text


TINY = ("kernels", "tune", "--network", "savl-tiny", "--dtype", "bfloat16")


def test_tune_stores_its_results_and_keeps_them(savl: Run, fake_gpu: Path) -> None:
    done = savl(*TINY)
    assert done.code == 0, done.text
    rows = [line for line in done.text.splitlines() if line.startswith("│")]
    assert len(rows) == 7, "two problems, three and four kernels"
    assert sum("64×32, 2w, 1s" in row and "20.0%" in row for row in rows) == 2
    assert sum("(the rule)" in row for row in rows) == 5
    assert "7 searched, 0 stored before" in done.text
    assert "2 of 7 better than the rule" in done.text
    before = fake_gpu.read_bytes()
    again = savl(*TINY)
    assert again.code == 0
    assert "0 searched, 7 stored before" in again.text
    assert fake_gpu.read_bytes() == before
    assert "7 searched" in savl(*TINY, "--force").text


def test_tune_writes_elsewhere_if_asked(savl: Run, fake_gpu: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "found.json"
    assert savl(*TINY, "--stage", "forward", "--output", target).code == 0
    assert len(json.loads(target.read_text())["configs"]) == 2
    assert not fake_gpu.exists()


def test_tune_does_not_replace_a_file_of_something_else(savl: Run, fake_gpu: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("mine")
    done = savl(*TINY, "--output", tmp_path / "notes.json")
    assert done.code == 1
    assert "--force replaces it" in done.text
    assert (tmp_path / "notes.json").read_text() == "mine"


def test_tune_interrupted_at_once_has_nothing_to_keep(
    savl: Run, fake_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels_tune, "search", interrupted)
    done = savl(*TINY)
    assert done.code == 130
    assert "interrupted" in done.text
    assert "results so far" not in done.text
    assert not fake_gpu.exists()


def test_an_interrupted_tune_keeps_the_results_so_far(
    savl: Run, fake_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = kernels_tune.search

    def interrupted(task: Any, *arguments: Any) -> Any:
        if task.stage == "backward_qkv":
            raise KeyboardInterrupt
        return search(task, *arguments)

    monkeypatch.setattr(kernels_tune, "search", interrupted)
    done = savl(*TINY)
    assert done.code == 130
    assert f"the results so far are in {fake_gpu}" in done.text
    assert len(json.loads(fake_gpu.read_text())["configs"]) == 1
    monkeypatch.setattr(kernels_tune, "search", search)
    assert "6 searched, 1 stored before" in savl(*TINY).text


def test_tune_check_measures_stored_configurations_and_writes_nothing(savl: Run, fake_gpu: Path) -> None:
    done = savl(*TINY, "--check")
    assert done.code == 0
    assert "nothing is stored for 7 of 7" in done.text
    assert not fake_gpu.exists()
    savl(*TINY, "--stage", "forward", "--stage", "backward_q", "--stage", "backward_qkv")
    before = fake_gpu.read_bytes(), fake_gpu.stat().st_mtime_ns
    done = savl(*TINY, "--check")
    assert done.code == 0
    assert (fake_gpu.read_bytes(), fake_gpu.stat().st_mtime_ns) == before
    assert len([line for line in done.text.splitlines() if line.startswith("│")]) == 4
    assert "the defaults take +12.5% time compared with the stored block sizes, +25.0% at worst" in done.text
    assert "nothing is stored for 3 of 7" in done.text


def test_brackets_of_a_reason_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    missing = "not installed (pip install 'savl[triton]')"
    monkeypatch.setattr(library, "TRITON_UNAVAILABLE", missing)
    monkeypatch.setenv("COLUMNS", "200")
    kernels.info(eager=False, everything=True)
    assert missing in capsys.readouterr().out
