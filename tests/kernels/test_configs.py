"""Tests of the sources of block sizes: the user's file, the shipped file and the rule. No file can make a run fail."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from savl.kernels import configs
from savl.kernels.configs import KernelConfig, Problem, Store, Tuned, config_for, default_config

GPU = "NVIDIA Test 80GB"
HOPPER = (9, 0)
PROBLEM = Problem("bfloat16", 24, 16, 24)
OTHER = KernelConfig(128, 16, 8, 3)
ANOTHER = KernelConfig(16, 128, 2, 2)


def tuned(config: KernelConfig = OTHER, **changes: Any) -> Tuned:
    entry = Tuned("forward", PROBLEM, config, 80.0, 100.0, configs.kernels_hash(), "3.9.0", "2026-01-31")
    return replace(entry, **changes)


@pytest.fixture(autouse=True)
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders of this test's own; gives that of the shipped files."""
    monkeypatch.setenv("SAVL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(configs, "SHIPPED_FOLDER", tmp_path / "shipped")
    for folder in (tmp_path / "cache" / "kernels", tmp_path / "shipped"):
        folder.mkdir(parents=True)
    configs.forget()
    yield tmp_path / "shipped"
    configs.forget()


def user_file() -> Path:
    folder = configs.user_folder()
    assert folder is not None
    return folder / "nvidia-test-80gb.json"


def look_up() -> tuple[KernelConfig, str]:
    return config_for("forward", PROBLEM, GPU, HOPPER)


# Precedence


def test_without_files_the_rule_decides() -> None:
    for capability in ((8, 0), (9, 0), (12, 0)):
        for stage in configs.STAGES:
            assert config_for(stage, PROBLEM, GPU, capability) == (default_config(stage, PROBLEM, capability), "rule")


def test_the_users_file_comes_before_the_shipped_one_and_that_before_the_rule(shipped: Path) -> None:
    (shipped / "nvidia-test-80gb.json").write_bytes(configs.dump_store(GPU, [tuned(ANOTHER)]))
    assert look_up() == (ANOTHER, "shipped")
    user_file().write_bytes(configs.dump_store(GPU, [tuned(OTHER)]))
    configs.forget()
    assert look_up() == (OTHER, "tuned here")
    assert config_for("backward_q", PROBLEM, GPU, HOPPER)[1] == "rule", "nothing is stored for this kernel"
    assert config_for("forward", replace(PROBLEM, head_dim=30), GPU, HOPPER)[1] == "rule"
    assert config_for("forward", PROBLEM, "NVIDIA Test 40GB", HOPPER)[1] == "rule"
    assert config_for("forward", PROBLEM, None, HOPPER)[1] == "rule"


def test_files_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    user_file().write_bytes(configs.dump_store(GPU, [tuned()]))
    read: list[Path] = []
    read_store = configs.read_store

    def count(path: Path, gpu_name: str) -> Store | None:
        read.append(path)
        return read_store(path, gpu_name)

    monkeypatch.setattr(configs, "read_store", count)
    for _ in range(3):
        for stage in configs.STAGES:
            config_for(stage, PROBLEM, GPU, HOPPER)
    assert len(read) == 2, "the user's file and the shipped one"


def test_launches_use_stored_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from savl.kernels import launch

    user_file().write_bytes(configs.dump_store(GPU, [tuned()]))
    qkv = torch.empty(1, 16, 16, 3 * 48, dtype=torch.bfloat16)
    call = launch.Attention(*qkv.chunk(3, dim=-1), torch.empty(39**2, 2), None, (16, 16), (24, 24), 2, margin=4)
    assert call.config("forward") == default_config("forward", PROBLEM, HOPPER), "the CPU is no such GPU"
    monkeypatch.setattr(launch, "_gpu", lambda index: (GPU, HOPPER))
    assert call.config("forward") == OTHER
    assert call.config("backward_q") == default_config("backward_q", PROBLEM, HOPPER)


def test_windows_that_are_square_are_the_same_problem_as_an_int_or_a_pair() -> None:
    assert Problem("bfloat16", 24, (16, 16), (24, 24)) == PROBLEM
    assert Problem("bfloat16", 24, (8, 32), 16) != Problem("bfloat16", 24, (32, 8), 16)
    assert (Problem("bfloat16", 24, (8, 32), 16).queries, PROBLEM.keys) == (256, 576)


# Files


def test_a_file_has_the_gpus_name_in_plain_letters() -> None:
    assert configs.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
    assert configs.file_name("NVIDIA A100-SXM4-40GB MIG 1g.5gb") == "nvidia-a100-sxm4-40gb-mig-1g-5gb.json"


def test_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configs.user_folder() == tmp_path / "cache" / "kernels"
    monkeypatch.delenv("SAVL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert configs.user_folder() == tmp_path / "xdg" / "savl" / "kernels"
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert configs.user_folder() == tmp_path / "home" / ".cache" / "savl" / "kernels"


def test_without_a_home_there_is_no_users_folder_and_the_rule_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SAVL_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert configs.user_folder() is None
    assert look_up()[1] == "rule"


def test_stored_entries_are_read_back_unchanged() -> None:
    entries = [
        tuned(),
        tuned(ANOTHER, stage="backward_bias", microseconds=0.5),
        tuned(problem=Problem("float32", 30, 8, 8)),
        tuned(problem=Problem("float32", 30, (8, 32), (8, 32), "dense", cosine=True)),
    ]
    user_file().write_bytes(configs.dump_store(GPU, entries))
    store = configs.read_store(user_file(), GPU)
    assert store is not None
    assert sorted(map(str, store.tuned.values())) == sorted(map(str, entries))
    assert store.ignored == ()
    assert not store.unusable


def changed(**values: Any) -> str:
    """A file whose one entry has other values; None takes one away."""
    content = json.loads(configs.dump_store(GPU, [tuned()]))
    entry = content["configs"][0] | values
    content["configs"] = [{name: value for name, value in entry.items() if value is not None}]
    return json.dumps(content)


def whole(**values: Any) -> str:
    return json.dumps(json.loads(configs.dump_store(GPU, [tuned()])) | values)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (lambda: "", "cannot be read"),
        (lambda: "{", "cannot be read"),
        (lambda: b"\xff\xfe\x00", "cannot be read"),
        (lambda: "[" * 100_000, "cannot be read"),
        (lambda: "[]", "format must be 1, got None"),
        (lambda: whole(format=2), "format must be 1, got 2"),
        (lambda: whole(gpu="NVIDIA Test_80GB"), "gpu must be 'NVIDIA Test 80GB', got 'NVIDIA Test_80GB'"),
        (lambda: whole(configs={}), "configs must be a list, got dict"),
        (lambda: whole(configs=[3]), "configs[0]: must be an object, got int"),
        (lambda: changed(stage="sideways"), "stage must be one of 'forward', "),
        (lambda: changed(dtype="float64"), "dtype must be one of 'float32', 'bfloat16', 'float16', got 'float64'"),
        (lambda: changed(head_dim=0), "head_dim must be a positive int, got 0"),
        (lambda: changed(bias="some"), "bias must be one of 'table', 'dense', 'none', got 'some'"),
        (lambda: changed(cosine=1), "cosine must be a bool, got 1"),
        (lambda: changed(window=[8, 0]), "window must be a positive int or a list of two, got [8, 0]"),
        (lambda: changed(block_m=48), "block_m must be one of 16, 32, 64, 128, 256, got 48"),
        (lambda: changed(block_n=None), "block_n must be one of 16, 32, 64, 128, 256, got None"),
        (lambda: changed(warps=True), "warps must be one of 1, 2, 4, 8, got True"),
        (lambda: changed(stages=99), "stages must be one of 1, "),
        (lambda: changed(microseconds="80"), "microseconds must be a positive number, got '80'"),
        (lambda: changed(rule_microseconds=float("nan")), "rule_microseconds must be a positive number, got nan"),
        (
            lambda: changed(kernels="0" * 16),
            f"tuned for other kernels ({'0' * 16}, these are {configs.kernels_hash()})",
        ),
    ],
)
def test_a_file_that_cannot_be_used_costs_one_warning(
    content: Callable[[], str | bytes], fragment: str, shipped: Path
) -> None:
    (shipped / "nvidia-test-80gb.json").write_bytes(configs.dump_store(GPU, [tuned(ANOTHER)]))
    text = content()
    user_file().write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(RuntimeWarning) as reported:
        assert look_up() == (ANOTHER, "shipped")
    (message,) = [str(warning.message) for warning in reported]
    assert str(user_file()) in message
    assert fragment in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_for("backward_q", PROBLEM, GPU, HOPPER)[1] == "rule"


def test_a_file_that_is_a_folder_costs_one_warning() -> None:
    user_file().mkdir()
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert look_up()[1] == "rule"


def test_a_cache_that_is_no_folder_is_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAVL_CACHE_DIR", str(tmp_path / "file"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert look_up()[1] == "rule"


def test_one_broken_entry_leaves_the_others_usable() -> None:
    content = json.loads(configs.dump_store(GPU, [tuned()]))
    content["configs"].append(content["configs"][0] | {"stage": "backward_q", "warps": 3})
    content["configs"].append(content["configs"][0] | {"stage": "backward_kv", "kernels": "old"})
    user_file().write_text(json.dumps(content))
    with pytest.warns(RuntimeWarning, match=r"configs\[1\]: warps .* \(and 1 more\)"):
        assert look_up() == (OTHER, "tuned here")
    assert config_for("backward_kv", PROBLEM, GPU, HOPPER)[1] == "rule"


def test_the_files_of_the_package_fit_its_kernels() -> None:
    names = {}
    for path in Path(configs.__file__).with_name("tuned").glob("*.json"):
        gpu = json.loads(path.read_text(encoding="utf-8"))["gpu"]
        assert path.name == configs.file_name(gpu)
        store = configs.read_store(path, gpu)
        assert store is not None
        names[path.name] = store.ignored
    assert not any(names.values()), f"measure again with savl kernels tune --output: {names}"


# The hash of the kernels

CODE = '''"""About the file."""
import triton

@triton.jit
def kernel(a, b, N: tl.constexpr):
    """About the kernel."""
    # of sums
    if N > 1:
        a += 1
    b += 2
    return call(a, b)
'''


def hashed(tmp_path: Path, code: str) -> str:
    (tmp_path / "code.py").write_text(code)
    return configs.code_hash(tmp_path / "code.py")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# of sums", "# of other sums"),
        ("    # of sums\n", "\n\n"),
        ("About the kernel.", "All about it."),
        ("About the file.", "Nothing."),
        ("call(a, b)", "call(\n        a,\n        b)"),
    ],
)
def test_words_and_line_breaks_do_not_make_other_kernels(tmp_path: Path, old: str, new: str) -> None:
    assert old in CODE
    assert hashed(tmp_path, CODE.replace(old, new)) == hashed(tmp_path, CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [("a += 1", "a += 2"), ("    b += 2", "        b += 2"), ("call(a, b)", "call(b, a)"), ("N > 1", "N >= 1")],
)
def test_code_makes_other_kernels(tmp_path: Path, old: str, new: str) -> None:
    assert old in CODE
    assert hashed(tmp_path, CODE.replace(old, new)) != hashed(tmp_path, CODE)


def test_code_of_any_of_the_files_makes_other_kernels(tmp_path: Path) -> None:
    first, second, changed = (tmp_path / name for name in ("first.py", "second.py", "changed.py"))
    first.write_text(CODE)
    second.write_text(CODE)
    changed.write_text(CODE.replace("a += 1", "a += 2"))
    assert configs.code_hash(first, second) not in (configs.code_hash(first), configs.code_hash(first, changed))
    files = {path.stem for path in Path(configs.__file__).parent.glob("*.py")}
    assert files >= set(configs.ATTENTION_FILES) >= {"attention", "attention_backward", "tiles"}


def test_looking_up_and_searching_need_neither_torch_nor_triton() -> None:
    code = (
        "import sys; from savl.kernels import configs, tune; "
        "configs.config_for('forward', configs.Problem('float32', 24, 8, 8), 'x', (9, 0)); "
        "print([name for name in ('torch', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "[]", done.stderr
