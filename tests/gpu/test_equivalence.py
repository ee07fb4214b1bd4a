"""Tests that the kernels of the GPU agree with the reference, within twice the rounding error of eager."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from savl.ops import KernelSettings, layer_norm
from savl.ops.channel_modulation import channel_modulation_case
from savl.ops.equivalence import Case, judge
from savl.ops.gaussian_posterior import gaussian_posterior_case
from savl.ops.layer_norm import layer_norm_case
from savl.ops.overlapping_window_attention import overlapping_window_attention_case
from savl.ops.window_attention import window_attention_case

Hold = Callable[..., None]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])


def words(settings: Any) -> str:
    return "-".join(f"{name}{value}" for name, value in settings.items())


WINDOWS: list[dict[str, Any]] = [
    {"window": 4, "head_dim": 8},
    {"window": 4, "head_dim": 24, "shift": 2, "batch": 2},
    {"window": 4, "head_dim": 1, "shift": 3, "heads": 3},
    {"window": 5, "head_dim": 30, "shift": 2},
    {"window": 5, "head_dim": 7, "shift": 4, "severity": False},
    {"window": 8, "head_dim": 24, "rows": 1},
    {"window": 8, "head_dim": 32, "shift": 4, "heads": 1},
    {"window": 8, "head_dim": 30, "shift": 1, "rows": 1, "columns": 1},
    {"window": 8, "head_dim": 64, "shift": 7, "severity": False, "columns": 1},
    {"window": 12, "head_dim": 13, "shift": 6, "rows": 1, "columns": 2},
    {"window": 16, "head_dim": 24, "shift": 8, "columns": 3, "heads": 6},
    {"window": 16, "head_dim": 30, "severity": False, "heads": 6},
    {"window": 16, "head_dim": 128, "shift": 8, "heads": 1},
    {"window": 1, "head_dim": 6, "rows": 3, "columns": 4},
    {"window": 2, "head_dim": 3, "shift": 1, "rows": 3, "columns": 5},
]
OVERLAPS: list[dict[str, Any]] = [
    {"window": 4, "key_window": 6, "head_dim": 8, "batch": 2},
    {"window": 4, "key_window": 4, "head_dim": 24},
    {"window": 4, "key_window": 12, "head_dim": 30, "severity": False},
    {"window": 5, "key_window": 9, "head_dim": 7, "rows": 1, "columns": 3},
    {"window": 8, "key_window": 12, "head_dim": 24},
    {"window": 8, "key_window": 12, "head_dim": 64, "heads": 1, "rows": 1, "severity": False},
    {"window": 12, "key_window": 18, "head_dim": 30, "rows": 1, "columns": 1},
    {"window": 16, "key_window": 24, "head_dim": 24, "columns": 3, "heads": 6},
    {"window": 16, "key_window": 24, "head_dim": 30, "heads": 6, "severity": False},
    {"window": 2, "key_window": 10, "head_dim": 11, "rows": 3, "columns": 4},
    {"window": 1, "key_window": 3, "head_dim": 1, "rows": 4, "columns": 3},
]


@DTYPES
@pytest.mark.parametrize("settings", WINDOWS, ids=words)
def test_window_attention_is_as_accurate_as_eager(dtype: torch.dtype, settings: dict[str, Any], hold: Hold) -> None:
    hold(lambda seed: window_attention_case(dtype, seed=seed, **settings))


@DTYPES
@pytest.mark.parametrize("settings", OVERLAPS, ids=words)
def test_overlapping_attention_is_as_accurate_as_eager(
    dtype: torch.dtype, settings: dict[str, Any], hold: Hold
) -> None:
    hold(lambda seed: overlapping_window_attention_case(dtype, seed=seed, **settings))


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("head_dim", [24, 30])
def test_large_images_are_as_accurate_as_eager(dtype: torch.dtype, head_dim: int, hold: Hold) -> None:
    large: dict[str, Any] = {"window": 16, "rows": 8, "columns": 8, "heads": 6, "head_dim": head_dim}
    hold(lambda seed: window_attention_case(dtype, shift=8, seed=seed, **large), draws=1)
    hold(lambda seed: overlapping_window_attention_case(dtype, key_window=24, seed=seed, **large), draws=1)


def channels_last(case: Case) -> Case:
    arguments = {
        name: None if value is None else value.contiguous(memory_format=torch.channels_last)
        for name, value in case.arguments.items()
    }
    return dataclasses.replace(case, arguments=arguments, label=f"{case.label}, channels last")


@DTYPES
@pytest.mark.parametrize("noise", ["eps", "seed", "none"])
@pytest.mark.parametrize("layout", ["planar", "channels-last"])
@pytest.mark.parametrize(
    "shape",
    [(2, 64, 9, 8), (1, 5, 17, 31), (3, 1, 4, 4), (1, 19, 1, 70), (2, 8, 60, 1), (1, 3, 1, 1), (1, 64, 128, 128)],
    ids=str,
)
def test_the_posterior_is_as_accurate_as_eager(
    dtype: torch.dtype, noise: str, layout: str, shape: tuple[int, ...], hold: Hold
) -> None:
    batch, channels, height, width = shape

    def make(seed: int) -> Case:
        case = gaussian_posterior_case(
            dtype, batch=batch, channels=channels, height=height, width=width, noise=noise, seed=seed
        )
        return case if layout == "planar" else channels_last(case)

    hold(make, draws=8 if math.prod(shape) < 10**5 else 2)


@DTYPES
@pytest.mark.parametrize("beta", [True, False], ids=["beta", "no-beta"])
@pytest.mark.parametrize(
    "shape", [(2, 6, 5, 144), (1, 3, 4, 7), (3, 1, 1, 1), (1, 9, 1, 33), (1, 128, 128, 144)], ids=str
)
def test_channel_modulation_is_as_accurate_as_eager(
    dtype: torch.dtype, beta: bool, shape: tuple[int, ...], hold: Hold
) -> None:
    batch, height, width, channels = shape
    hold(
        lambda seed: channel_modulation_case(
            dtype, batch=batch, height=height, width=width, channels=channels, beta=beta, seed=seed
        ),
        draws=8 if math.prod(shape) < 10**5 else 2,
    )


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(2, 6, 5, 144), (1, 9, 7, 48), (1, 5, 6, 180), (1, 3, 4, 7), (3, 2, 2, 1), (1, 1, 3, 4096), (1, 256, 256, 48)],
    ids=str,
)
def test_layer_norm_is_as_accurate_as_eager(dtype: torch.dtype, shape: tuple[int, ...], hold: Hold) -> None:
    batch, height, width, channels = shape
    hold(
        lambda seed: layer_norm_case(dtype, batch=batch, height=height, width=width, channels=channels, seed=seed),
        draws=8 if math.prod(shape) < 10**5 else 2,
    )


# Mixed dtypes under autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
def test_layer_norm_returns_float32_under_autocast_like_torch(
    dtype: torch.dtype, backend_of: Callable[[str], str]
) -> None:
    kernels = KernelSettings(layer_norm=backend_of("layer_norm"))
    x, weight, bias = torch.randn(2, 6, 5, 48, dtype=dtype), torch.randn(48), torch.randn(48)
    grad_out = torch.randn(2, 6, 5, 48).cuda()
    results = []
    with torch.autocast("cuda", torch.bfloat16):
        for function in (partial(layer_norm, kernels=kernels), lambda x, w, b: F.layer_norm(x, (48,), w, b)):
            given = [value.cuda().requires_grad_() for value in (x, weight, bias)]
            out = function(*given)
            assert out.dtype == torch.float32
            results.append([out.detach(), *torch.autograd.grad(out, given, grad_out)])
        narrow = layer_norm(x.float().cuda(), weight.bfloat16().cuda(), bias.bfloat16().cuda(), kernels=kernels)
        assert narrow.dtype == torch.float32, "of a bfloat16 network whose stream of features is float32"
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-2 if found.dtype != torch.float32 else 1e-4, atol=1e-4)


def in_float32(case: Case, *names: str) -> Case:
    """Return the case with the named arguments in float32, not rounded to 16 bits."""
    generator = torch.Generator().manual_seed(3)
    arguments = dict(case.arguments)
    for name in names:
        value = arguments[name]
        assert value is not None
        arguments[name] = value.float() * (1 + 2**-9 * torch.rand(value.shape, generator=generator))
    return dataclasses.replace(case, arguments=arguments, label=f"{case.label}, {' and '.join(names)} float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("names", [("bias_table", "severity"), ("bias_table",), ("severity",)], ids="+".join)
def test_16_bit_features_accept_a_float32_table_and_severity(
    names: tuple[str, ...], dtype: torch.dtype, hold: Hold
) -> None:
    hold(lambda seed: in_float32(window_attention_case(dtype, window=8, shift=4, seed=seed), *names))
    hold(lambda seed: in_float32(overlapping_window_attention_case(dtype, seed=seed), *names))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("beta", [True, False], ids=["beta", "no-beta"])
def test_16_bit_features_accept_a_float32_residual(beta: bool, dtype: torch.dtype, hold: Hold) -> None:
    hold(lambda seed: in_float32(channel_modulation_case(dtype, channels=37, beta=beta, seed=seed), "residual"))


# tf32


@pytest.mark.usefixtures("tf32")
def test_attention_in_tf32_is_as_accurate_as_eager_in_tf32(hold: Hold) -> None:
    float32 = torch.float32
    hold(lambda seed: window_attention_case(float32, window=16, shift=8, heads=3, seed=seed), draws=4)
    hold(lambda seed: window_attention_case(float32, window=8, head_dim=30, severity=False, seed=seed), draws=4)
    hold(lambda seed: overlapping_window_attention_case(float32, window=8, key_window=12, seed=seed), draws=4)


def test_the_kernels_use_tf32_exactly_where_torch_does(
    backend_of: Callable[[str], str], request: pytest.FixtureRequest
) -> None:
    backend = backend_of("window_attention")

    def error() -> float:
        budgets = judge(
            lambda seed: window_attention_case(torch.float32, window=16, seed=seed), backend, draws=1, device="cuda"
        )
        return next(budget.error for budget in budgets if budget.name == "out")

    exact = error()
    request.getfixturevalue("tf32")
    # 13 bits fewer of mantissa; half of that many is difference enough.
    assert error() > 64 * exact


# Layouts, unwritten memory, emptiness


def spread(value: Tensor) -> Tensor:
    """Return the same values as a view of a tensor that is larger in every dimension and otherwise NaN."""
    whole = torch.full([size + 2 for size in value.shape], math.nan, dtype=value.dtype, device=value.device)
    part = whole[tuple(slice(1, 1 + size) for size in value.shape)]
    part.copy_(value)
    return part


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "inside-a-larger-tensor": spread,
    "last-dimension-first": lambda value: value.movedim(-1, 1).contiguous().movedim(1, -1),
    "first-two-swapped": lambda value: value.transpose(0, 1).contiguous().transpose(0, 1),
}


def on_gpu(case: Case) -> Case:
    arguments = {name: None if value is None else value.cuda() for name, value in case.arguments.items()}
    return dataclasses.replace(case, arguments=arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_results(
    layout: str, small_case: Callable[..., Case], backend_of: Callable[[str], str]
) -> None:
    case = on_gpu(small_case())
    arguments = {name: None if value is None else LAYOUTS[layout](value) for name, value in case.arguments.items()}
    backend = backend_of(case.op)
    expected, found = case.run(backend), dataclasses.replace(case, arguments=arguments).run(backend)
    for name, value in expected.items():
        # Sums may be taken in another order where channels lie side by side.
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@DTYPES
def test_every_element_is_written_and_every_run_is_bit_identical(
    dtype: torch.dtype, small_case: Callable[..., Case], backend_of: Callable[[str], str]
) -> None:
    case = small_case(dtype)
    backend = backend_of(case.op)
    expected = case.run(backend, device="cuda")
    for count in range(4):
        found = case.run(backend, device="cuda")
        different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
        assert not different, f"{different} differ on run {count + 2}"
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(3, device="cuda").isnan().all(), "this relies on torch filling what is uninitialised"
        found = case.run(backend, device="cuda")
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different, f"{different} differ when memory is full of NaN"


def test_many_windows_are_bit_identical_in_every_run(backend_of: Callable[[str], str]) -> None:
    for case in (
        window_attention_case(torch.bfloat16, window=16, shift=8, rows=12, columns=12, heads=6),
        overlapping_window_attention_case(
            torch.bfloat16, window=16, key_window=24, rows=8, columns=8, heads=6, head_dim=30
        ),
        gaussian_posterior_case(torch.bfloat16, height=256, width=256, noise="seed"),
    ):
        backend = backend_of(case.op)
        expected = case.run(backend, device="cuda")
        for _ in range(3):
            found = case.run(backend, device="cuda")
            different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
            assert not different, f"{case.op}: {different} differ"


@DTYPES
def test_an_empty_batch_returns_the_same_as_eager(dtype: torch.dtype, backend_of: Callable[[str], str]) -> None:
    for case in (
        window_attention_case(dtype, batch=0, shift=4),
        window_attention_case(dtype, batch=0, severity=False),
        overlapping_window_attention_case(dtype, batch=0),
        overlapping_window_attention_case(dtype, batch=0, severity=False),
        gaussian_posterior_case(dtype, batch=0),
        channel_modulation_case(dtype, batch=0),
        layer_norm_case(dtype, batch=0),
    ):
        found, expected = case.run(backend_of(case.op), device="cuda"), case.run("eager", device="cuda")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].shape == value.shape, f"{case.op}: {name}"
            assert found[name].dtype == value.dtype, f"{case.op}: {name}"
            assert torch.equal(found[name], value), f"{case.op}: {name}"


# NaN and infinity


def spots(case: Case) -> list[tuple[str, tuple[int, ...]]]:
    found: list[tuple[str, tuple[int, ...]]] = []
    for name, value in case.arguments.items():
        assert value is not None
        last = tuple(size - 1 for size in value.shape)
        found += [(name, tuple(0 for _ in last)), (name, last)]
        if value.dim() == 4:  # of qkv: queries, keys, values
            parts = range(1, value.shape[-1], max(1, value.shape[-1] // 3))
            found += [(name, (0, last[1] // 2, last[2] // 2, part)) for part in parts]
    return found


@DTYPES
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["window", "window-shifted", "overlapping", "posterior", "modulation", "norm"])
def test_one_nan_or_infinity_affects_the_same_results_as_in_eager(
    name: str, value: float, dtype: torch.dtype, backend_of: Callable[[str], str]
) -> None:
    case = {
        "window": lambda: window_attention_case(dtype, window=4, columns=3, head_dim=5),
        "window-shifted": lambda: window_attention_case(dtype, window=4, shift=1, head_dim=5),
        "overlapping": lambda: overlapping_window_attention_case(dtype, window=4, key_window=6, columns=3, head_dim=5),
        "posterior": lambda: gaussian_posterior_case(dtype, channels=5, height=5, width=7),
        "modulation": lambda: channel_modulation_case(dtype, height=3, width=5, channels=9),
        "norm": lambda: layer_norm_case(dtype, height=3, width=5, channels=9),
    }[name]()
    backend, problems = backend_of(case.op), []
    for argument, spot in spots(case):
        if "attention" in case.op and argument == "severity" and math.isinf(value):
            continue  # 0 · ∞ past the head dimension makes NaN of a logit of −∞; severities end at 2
        if argument == "bias_table" and case.options.get("shift"):
            continue  # pairs that are masked from each other do not look at their bias
        changed = case.arguments[argument]
        assert changed is not None
        changed = changed.clone()
        changed[spot] = value
        one = dataclasses.replace(case, arguments={**case.arguments, argument: changed})
        fused, eager = one.run(backend, device="cuda"), one.run("eager", device="cuda")
        for result, expected in eager.items():
            # torch's running mean makes NaN of an infinity, a plain sum leaves it infinite
            # and of an infinite weight come NaN and infinities, in the order of sums.
            mask = torch.isfinite if result == "variance_mean" or case.op == "layer_norm" else torch.isnan
            if not torch.equal(mask(fused[result]), mask(expected)):
                problems.append(
                    f"{argument}{list(spot)}: {int(fused[result].isnan().sum())} NaN in {result}, "
                    f"{int(expected.isnan().sum())} in eager"
                )
    assert not problems, f"with {value} in\n" + "\n".join(problems)


@pytest.mark.parametrize("severity", [True, False], ids=["severity", "plain"])
def test_large_float16_numbers_stay_finite(severity: bool, backend_of: Callable[[str], str]) -> None:
    case = window_attention_case(torch.float16, window=8, shift=4, severity=severity)
    qkv = case.arguments["qkv"]
    assert qkv is not None
    qkv = qkv.clone()
    qkv[..., :48] = (qkv[..., :48].float() * 2e4).clamp(-6e4, 6e4).half()
    arguments: dict[str, Tensor | None] = {**case.arguments, "qkv": qkv}
    if severity:
        arguments["severity"] = torch.full(qkv.shape[:3], 2.0, dtype=torch.float16)
    case = dataclasses.replace(case, arguments=arguments)
    found, exact = case.run(backend_of(case.op), device="cuda"), case.run("eager", torch.float64)
    for name, value in exact.items():
        representable = value.abs() < torch.finfo(torch.float16).max
        assert (found[name].isfinite() | ~representable).all(), f"{name} is not finite"


@pytest.mark.slow
def test_images_of_more_than_two_gigabytes_are_correct_at_their_end(backend_of: Callable[[str], str]) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip(f"needs 24 GiB of GPU memory, {free / 2**30:.0f} are free")
    side, channels = 4096, 48  # 2.4e9 elements in qkv
    qkv = torch.randn(1, side, side, 3 * channels, dtype=torch.bfloat16, device="cuda")
    table = torch.randn(225, 2, dtype=torch.bfloat16, device="cuda")
    settings = (table, *(None,) * 5, 2, 8, 8, 8, 8, 0, 0, False, float("-inf"))
    backend_of("window_attention")
    with torch.no_grad():
        whole = torch.ops.savl.window_attention(qkv, *settings)[0][:, -64:].clone()
        part = torch.ops.savl.window_attention(qkv[:, -64:].contiguous(), *settings)[0]
    assert torch.equal(whole, part)
