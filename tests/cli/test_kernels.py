"""`savl kernels`, and which kernels serve `savl upscale`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from savl.build_info import build_info
from savl.cli import batch
from savl.ops import KernelSettings, equivalence, kernel_report, switch
from savl.ops.library import EXTENSION_UNAVAILABLE
from savl.ops.switch import OPS

Run = Callable[..., Any]
Write = Callable[..., Path]

needs_extension = pytest.mark.skipif(
    EXTENSION_UNAVAILABLE is not None, reason=str(build_info()["reason"] or EXTENSION_UNAVAILABLE)
)


@pytest.fixture(autouse=True)
def _no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAVL_KERNELS", raising=False)
    monkeypatch.setattr(switch, "_process", switch._Process(KernelSettings.of(False)))


@pytest.fixture
def one_case_a_dtype(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Verification with one small case for every op and dtype, on one thread: on a busy machine more take longer."""

    def cases(dtype: torch.dtype) -> list[Callable[[int], equivalence.Case]]:
        return [
            lambda seed: equivalence.window_attention_case(dtype, window=4, shift=1, head_dim=5, seed=seed),
            lambda seed: equivalence.overlapping_window_attention_case(
                dtype, window=3, key_window=5, head_dim=5, seed=seed
            ),
            lambda seed: equivalence.gaussian_posterior_case(dtype, channels=5, height=6, width=7, seed=seed),
            lambda seed: equivalence.channel_modulation_case(dtype, height=4, width=5, channels=9, seed=seed),
        ]

    monkeypatch.setattr(equivalence, "verification_cases", cases)
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


# savl kernels info


@needs_extension
def test_info_says_that_the_fused_kernels_serve_unless_told_otherwise(savl: Run) -> None:
    done = savl("kernels", "info")
    assert done.code == 0
    for op in OPS:
        (line,) = [line for line in done.text.splitlines() if f" {op} " in line]
        assert "cpp" in line
        assert "yes" in line
    assert f"{build_info()['kernel_instruction_set']} kernels" in done.text
    assert kernel_report().serving(OPS[0]) == "eager", "the command left the switch on"


@needs_extension
def test_info_as_eager_says_that_they_could(savl: Run) -> None:
    done = savl("kernels", "info", "--eager")
    assert done.code == 0
    assert done.text.count("could serve, but is switched off") == len(OPS)


def test_info_without_the_extension_says_why(savl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {(op, "cpp"): "nobody compiled it" for op in OPS} | {(op, "eager"): None for op in OPS}
    monkeypatch.setattr(switch, "_UNAVAILABLE", missing)
    done = savl("kernels", "info")
    assert done.code == 0
    assert done.text.count("nobody compiled it") == len(OPS)


@needs_extension
@pytest.mark.parametrize(
    ("value", "serving"),
    [
        ("eager", ["eager"] * 4),
        ("fused", ["cpp"] * 4),
        ("channel_modulation=eager", ["cpp", "cpp", "cpp", "eager"]),
    ],
)
def test_info_heeds_the_environment(value: str, serving: list[str]) -> None:
    done = command("kernels", "info", SAVL_KERNELS=value)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if " yes " in line]
    assert [("eager" if " eager " in row else "cpp") for row in rows] == serving, done.stdout


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
    assert "12 of 12 cases" in done.text


@needs_extension
@pytest.mark.usefixtures("one_case_a_dtype")
def test_verify_tells_a_wrong_kernel(savl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = equivalence._OPS["window_attention"]

    def wrong(*args: Any, kernels: KernelSettings, **options: Any) -> torch.Tensor:
        out: torch.Tensor = right(*args, kernels=kernels, **options)
        return out if kernels.window_attention == "eager" else out * 1.5

    monkeypatch.setitem(equivalence._OPS, "window_attention", wrong)
    done = savl("kernels", "verify", "--verbose")
    assert done.code == 1
    off = [line for line in done.text.splitlines() if " off " in line]
    assert len(off) == 3
    assert done.text.index("window_attention · cpp") < done.text.index(" off ") < done.text.index("overlapping_window")
    assert "9 of 12 cases" in done.text


@pytest.mark.usefixtures("one_case_a_dtype")
def test_verify_without_the_extension_has_nothing_to_do(savl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {(op, "cpp"): "nobody compiled it" for op in OPS} | {(op, "eager"): None for op in OPS}
    monkeypatch.setattr(switch, "_UNAVAILABLE", missing)
    done = savl("kernels", "verify")
    assert done.code == 0
    assert "nothing to verify" in done.text
    assert "nobody compiled it" in done.text


# savl upscale


@pytest.fixture
def serving(savl: Run, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends in force whenever an upscaler is made."""
    seen: list[str] = []
    make = batch.as_upscaler

    def spy(model: Any, **settings: Any) -> Any:
        seen.append(kernel_report().serving("window_attention"))
        return make(model, **settings)

    monkeypatch.setattr(batch, "as_upscaler", spy)
    return seen


@needs_extension
@pytest.mark.parametrize(("flags", "backend"), [((), "cpp"), (("--eager",), "eager")], ids=["default", "eager"])
def test_upscale_is_fused_unless_told_otherwise(
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
    monkeypatch.setenv("SAVL_KERNELS", "eager")  # which the process read when it started
    assert savl("upscale", "photo.png", "-o", "a.png").code == 0
    assert set(serving) == {"eager"}
    serving.clear()
    monkeypatch.setenv("SAVL_KERNELS", "fused")
    monkeypatch.setattr(switch, "_process", switch._Process(KernelSettings.of(True)))
    assert savl("upscale", "photo.png", "-o", "b.png").code == 0
    assert set(serving) == {"cpp"}
    serving.clear()
    assert savl("upscale", "photo.png", "-o", "c.png", "--eager").code == 0
    assert set(serving) == {"eager"}
