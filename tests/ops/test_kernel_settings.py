"""The settings of kernels in the environment, and the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

import savl
from savl.build_info import build_info
from savl.ops import KernelSettings, kernel_report, scopes, use_fused_kernels
from savl.ops import op as op_registry
from savl.ops.op import OPS
from savl.ops.settings import parse_settings
from savl.settings import EnvironmentVariableError

ON, OFF = KernelSettings.of(True), KernelSettings.of(False)


@pytest.fixture(autouse=True)
def _eager_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scopes, "process", scopes.ProcessSettings(OFF))


# SAVL_KERNELS


@pytest.mark.parametrize("text", ["fused", "1", "on", "true", "auto", " FUSED ", "True"])
def test_words_for_fused(text: str) -> None:
    assert parse_settings(text) == ON


@pytest.mark.parametrize("text", ["", " ", "eager", "0", "off", "false", "Eager"])
def test_words_for_eager(text: str) -> None:
    assert parse_settings(text) == OFF


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("window_attention=cpp", KernelSettings.of(True, window_attention="cpp")),
        (
            "window_attention=cpp,channel_modulation=eager",
            KernelSettings.of(True, window_attention="cpp", channel_modulation="eager"),
        ),
        (" gaussian_posterior = fused , window_attention = EAGER", KernelSettings.of(True, window_attention="eager")),
        ("overlapping_window_attention=auto", ON),
    ],
)
def test_a_list_sets_ops_and_leaves_the_others_fused(text: str, expected: KernelSettings) -> None:
    assert parse_settings(text) == expected


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("fast", "'fast' is not a setting"),
        ("window_attention", "'window_attention' is not a setting"),
        ("attention=cpp", "no such op: 'attention'"),
        ("window_attention=avx", "no backend 'avx'"),
        ("window_attention=cpp,,", "'' is not a setting"),
        ("window_attention=", "no backend ''"),
    ],
)
def test_an_invalid_setting_is_reported_with_the_accepted_values(text: str, fragment: str) -> None:
    with pytest.raises(EnvironmentVariableError) as caught:
        parse_settings(text)
    missing = [
        part
        for part in ("SAVL_KERNELS", "'fused'", "'eager'", "window_attention=cpp", repr(text), fragment)
        if part not in str(caught.value)
    ]
    assert not missing, f"the message lacks {missing}: {caught.value}"
    assert "\n" not in str(caught.value)


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SAVL_")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# Importing torch takes seconds, so one process imports it for all. Each child process then imports savl.
CHOSEN = """
import json, os, sys, torch
for environment in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if os.fork() == 0:
        os.environ.update(environment)
        from savl.build_info import build_info
        from savl.ops.scopes import current_settings
        print(current_settings())
        print(build_info()["kernel_instruction_set"])
        break
    os.wait()
"""


def test_the_environment_chooses_the_first_settings_and_the_instruction_set(extension: Any) -> None:
    names = extension.kernel_instruction_sets()
    kernels = {"": OFF, "fused": ON, "window_attention=eager": KernelSettings.of(True, window_attention="eager")}
    chosen = [names[index % len(names)] for index in range(len(kernels))]
    environments = [
        {"SAVL_KERNELS": value, "SAVL_CPU_INSTRUCTION_SET": name} for value, name in zip(kernels, chosen, strict=True)
    ]
    done = run(CHOSEN, json.dumps(environments))
    expected = [line for settings, name in zip(kernels.values(), chosen, strict=True) for line in (str(settings), name)]
    assert done.stdout.splitlines() == expected, done.stderr


def test_instruction_sets_for_bfloat16_need_their_features(extension: Any) -> None:
    features, names = build_info()["instruction_sets"], extension.kernel_instruction_sets()
    assert ("avx512_bf16" in names) == ({"avx512dq", "avx512_bf16"} <= set(features))
    assert ("amx" in names) == ({"avx512dq", "avx512_bf16", "amx_bf16"} <= set(features))
    if "amx" in names:  # on such processors, AVX512-BF16 is slower than float32
        assert names.index("amx") < names.index("avx512") < names.index("avx512_bf16")


def test_an_instruction_set_that_is_not_there_is_told_with_those_there_are(extension: Any) -> None:
    done = run("import savl.ops", SAVL_CPU_INSTRUCTION_SET="no-such-thing")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "SAVL_CPU_INSTRUCTION_SET" in last
    assert "got 'no-such-thing'" in last
    assert all(name in last for name in extension.kernel_instruction_sets())


def test_an_unknown_instruction_set_is_told_with_those_there_are(extension: Any) -> None:
    with pytest.raises(ValueError, match="portable.*got mmx"):
        extension.use_kernel_instruction_set("mmx")


# The report


def serving() -> set[str]:
    report = kernel_report()
    return {report.serving(op) for op in OPS}


def reason_of(op: str, backend: str) -> str:
    return next(s.reason for s in kernel_report().statuses if (s.op, s.backend) == (op, backend))


def test_the_report_has_every_backend_of_every_op_and_one_that_serves() -> None:
    report = kernel_report()
    assert [(s.op, s.backend) for s in report.statuses] == [
        (name, b) for name, op in OPS.items() for b in (*op.backends, "eager")
    ]
    for op in OPS:
        assert sum(s.serves for s in report.statuses if s.op == op and s.device in ("cpu", "any")) == 1, op
    assert all(status.reason for status in report.statuses)


@pytest.mark.usefixtures("extension")
def test_the_report_follows_the_switch() -> None:
    assert serving() == {"eager"}
    assert "use_fused_kernels()" in reason_of("window_attention", "cpp")
    with use_fused_kernels():
        assert serving() == {"cpp"}
        assert "fastest" in reason_of("window_attention", "cpp")
        assert "slower" in reason_of("window_attention", "eager")
    with use_fused_kernels(False, channel_modulation="cpp"):
        assert kernel_report().serving("channel_modulation") == "cpp"
        assert kernel_report().serving("window_attention") == "eager"
        assert "requested by name" in reason_of("channel_modulation", "cpp")
    assert serving() == {"eager"}


def test_the_report_says_why_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "nobody compiled it"
    before = dict(op_registry.UNAVAILABLE)
    missing = before | {(op, "cpp"): reason for op in OPS}
    monkeypatch.setattr(op_registry, "UNAVAILABLE", missing)
    with use_fused_kernels():
        assert serving() == {"eager"}
        assert reason_of("window_attention", "cpp") == reason
        assert "no fused kernel" in reason_of("window_attention", "eager")
    # Asked for by name while it was there, and gone since: as SAVL_KERNELS may ask for what never was.
    monkeypatch.setattr(scopes, "process", scopes.ProcessSettings(KernelSettings.of("cpp")))
    assert "raises KernelUnavailable" in reason_of("window_attention", "cpp")
    assert reason in reason_of("window_attention", "cpp")
    monkeypatch.setattr(op_registry, "UNAVAILABLE", before)


@pytest.mark.usefixtures("extension")
def test_the_report_as_text_is_a_table_and_two_lines_on_the_machine(instruction_set: str) -> None:
    text = str(kernel_report())
    lines = text.splitlines()
    assert lines[0].split() == ["op", "backend", "tensors", "serves", "why"]
    assert len(lines) == 1 + sum(len(op.backends) + 1 for op in OPS.values()) + 3
    assert f"{instruction_set} kernels" in lines[-2]
    assert f"savl {savl.__version__}" in lines[-2]
    assert "GPU" in lines[-1]
    assert kernel_report().instruction_set == instruction_set
