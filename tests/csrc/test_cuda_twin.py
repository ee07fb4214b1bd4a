"""The CUDA kernels, which csrc/twin runs on the CPU thread by thread, compute the same as the reference."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from savl.ops import KernelSettings, channel_modulation, gaussian_posterior
from savl.ops.channel_modulation import channel_modulation_case
from savl.ops.equivalence import Case, judge
from savl.ops.gaussian_posterior import gaussian_posterior_case
from savl.ops.philox import standard_normal

pytestmark = pytest.mark.usefixtures("twin")

CUDA = KernelSettings.of(True)  # the fixture puts the twin in place of the CUDA kernels
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
NOISES = pytest.mark.parametrize("noise", ["eps", "seed", "none"])
Layout = Callable[[Tensor], Tensor]
# A sanitizer makes everything slow, and what it finds depends on shapes and dtypes, not on the numbers.
DRAWS = 1 if os.environ.get("SAVL_SANITIZE") else 4


def assert_within_budget(make: Callable[[int], Case]) -> None:
    broken = [str(budget) for budget in judge(make, "cpp", draws=DRAWS) if not budget.kept]
    if broken:
        pytest.fail(f"{make(0).op} ({make(0).label}): " + "; ".join(broken))


def rearranged(case: Case, layout: Layout, *names: str) -> Case:
    arguments = {
        name: layout(value) if value is not None and (not names or name in names) else value
        for name, value in case.arguments.items()
    }
    return dataclasses.replace(case, arguments=arguments)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor], when: str) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different, f"{different} differ {when}"


def run(case: Case) -> dict[str, Tensor]:
    return case.run("cpp")


def channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last)


def moved(value: Tensor) -> Tensor:
    """The same layout, but the address is not a multiple of 16 bytes."""
    around = torch.full((value.numel() + 1,), torch.nan, dtype=value.dtype)[1:]
    view = around.as_strided(value.shape, value.stride())
    return view.copy_(value)


def sliced(value: Tensor) -> Tensor:
    """The middle of a larger tensor whose other elements are NaN."""
    around = torch.full([size + 3 for size in value.shape], torch.nan, dtype=value.dtype)
    return around[tuple(slice(1, size + 1) for size in value.shape)].copy_(value)


def strided(value: Tensor) -> Tensor:
    return torch.stack((value, torch.full_like(value, torch.nan)), dim=-1)[..., 0]


def apart(value: Tensor) -> Tensor:
    """The distance between rows is not a multiple of 16 bytes."""
    around = torch.full((*value.shape[:3], value.shape[3] + 1), torch.nan, dtype=value.dtype)
    return around[..., :-1].copy_(value)


def channels_apart(value: Tensor) -> Tensor:
    """Planar, and the distance between channels is not a multiple of 16 bytes."""
    around = torch.full((*value.shape[:2], value.shape[2] * value.shape[3] + 1), torch.nan, dtype=value.dtype)
    return around[..., :-1].copy_(value.flatten(2)).unflatten(2, value.shape[2:])


def padded_pixels(value: Tensor) -> Tensor:
    """Channels last, as a slice of the channels of a larger tensor."""
    around = torch.full((*value.shape[:1], *value.shape[2:], value.shape[1] + 8), torch.nan, dtype=value.dtype)
    return around[..., : value.shape[1]].permute(0, 3, 1, 2).copy_(value)


def pixels_apart(value: Tensor) -> Tensor:
    """Channels last, and the distance between pixels is not a multiple of 16 bytes."""
    around = torch.full((*value.shape[:1], *value.shape[2:], value.shape[1] + 1), torch.nan, dtype=value.dtype)
    return around[..., :-1].permute(0, 3, 1, 2).copy_(value)


def fewer_channels(value: Tensor) -> Tensor:
    """Planar, as a slice of the channels of a larger tensor."""
    around = torch.full((value.shape[0], value.shape[1] + 3, *value.shape[2:]), torch.nan, dtype=value.dtype)
    return around[:, : value.shape[1]].copy_(value)


# Accuracy


@DTYPES
@NOISES
@pytest.mark.parametrize("layout", ["planar", "channels-last"])
@pytest.mark.parametrize(
    "shape",
    [(2, 64, 9, 8), (1, 16, 16, 16), (1, 5, 17, 31), (3, 1, 4, 4), (1, 19, 1, 70), (2, 8, 60, 1), (1, 3, 1, 1)],
    ids=str,
)
def test_the_posterior_is_as_accurate_as_eager(
    dtype: torch.dtype, noise: str, layout: str, shape: tuple[int, ...]
) -> None:
    batch, channels, height, width = shape

    def make(seed: int) -> Case:
        case = gaussian_posterior_case(
            dtype, batch=batch, channels=channels, height=height, width=width, noise=noise, seed=seed
        )
        return case if layout == "planar" else rearranged(case, channels_last)

    assert_within_budget(make)


@DTYPES
@pytest.mark.parametrize("beta", [True, False], ids=["beta", "no-beta"])
@pytest.mark.parametrize("shape", [(2, 6, 5, 144), (1, 3, 4, 7), (3, 1, 1, 1), (1, 9, 1, 33), (1, 40, 30, 8)], ids=str)
def test_channel_modulation_is_as_accurate_as_eager(dtype: torch.dtype, beta: bool, shape: tuple[int, ...]) -> None:
    batch, height, width, channels = shape
    assert_within_budget(
        lambda seed: channel_modulation_case(
            dtype, batch=batch, height=height, width=width, channels=channels, beta=beta, seed=seed
        )
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("beta", [True, False], ids=["beta", "no-beta"])
@pytest.mark.parametrize("channels", [37, 40])
def test_features_of_16_bits_are_added_to_a_float32_residual(dtype: torch.dtype, beta: bool, channels: int) -> None:
    def make(seed: int) -> Case:
        case = channel_modulation_case(dtype, height=4, width=5, channels=channels, beta=beta, seed=seed)
        return rearranged(case, lambda value: value.float() * (1 + 2**-12 * torch.rand(value.shape)), "residual")

    assert_within_budget(make)


@pytest.mark.parametrize(
    ("channels", "height", "width", "layout"),
    [(1, 512, 600, "planar"), (1024, 100, 100, "channels-last"), (1030, 3, 3, "channels-last"), (700, 3, 5, "planar")],
)
def test_shapes_that_need_more_than_one_round_are_correct(channels: int, height: int, width: int, layout: str) -> None:
    # More tiles than one block merges, or more channels than a block has slots or rows of threads.
    case = gaussian_posterior_case(
        torch.float32, batch=2 if height < 100 else 1, channels=channels, height=height, width=width, noise="none"
    )
    if layout != "planar":
        case = rearranged(case, channels_last)
    expected, found = case.run("eager", torch.float64), run(case)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


# Noise


@pytest.mark.parametrize("layout", ["planar", "channels-last"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (2, 3, 3, 5), (1, 16, 2, 3)], ids=str)
@DTYPES
def test_seeded_noise_is_the_stream_of_savl_ops_philox(dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    zeros = torch.zeros(shape, dtype=dtype)
    if layout != "planar":
        zeros = channels_last(zeros)
    sample = gaussian_posterior(zeros, zeros, seed=2**64 - 3, offset=2**40 + 1, kernels=CUDA).sample
    expected = standard_normal(shape, 2**64 - 3, offset=2**40 + 1).to(dtype)
    torch.testing.assert_close(sample, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


# Conversions


def all_bits(dtype: torch.dtype) -> Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 1, 1, -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_every_number_of_16_bits_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    numbers = all_bits(dtype)
    out = channel_modulation(numbers, torch.zeros_like(numbers), None, torch.zeros(numbers.shape), kernels=CUDA)
    torch.testing.assert_close(out, numbers.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_numbers_are_rounded_to_16_bits_as_torch_rounds_them(dtype: torch.dtype) -> None:
    # Every number of 16 bits, the numbers half way to the next one, and their neighbours.
    bits = all_bits(dtype).flatten().float().view(torch.int32)
    half = 1 << (15 if dtype == torch.bfloat16 else 12)
    shifts = torch.tensor([-half - 1, -half, -1, 0, 1, half - 1, half, half + 1], dtype=torch.int32)
    numbers = (bits[:, None] + shifts).view(torch.float32).reshape(1, 1, 1, -1)
    tiny = torch.linspace(-1e-4, 1e-4, 40001).reshape(1, 1, 1, -1)  # subnormal in float16
    numbers = torch.cat((numbers, tiny), dim=-1)
    ones = torch.ones(numbers.shape, dtype=dtype)
    found, _ = torch.ops.savl.channel_modulation_backward(numbers, ones, torch.zeros_like(ones))
    torch.testing.assert_close(found, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)


# Memory


CASES: dict[str, Callable[..., Case]] = {
    "posterior-eps": lambda dtype: gaussian_posterior_case(dtype, channels=24, height=7, width=16),
    "posterior-seed": lambda dtype: gaussian_posterior_case(dtype, channels=8, height=6, width=4, noise="seed"),
    "posterior-odd": lambda dtype: gaussian_posterior_case(dtype, channels=5, height=7, width=9),
    "modulation": lambda dtype: channel_modulation_case(dtype, height=5, width=7, channels=24),
    "modulation-odd": lambda dtype: channel_modulation_case(dtype, height=5, width=7, channels=19, beta=False),
}
EVERY = pytest.mark.parametrize("name", CASES)


@DTYPES
@EVERY
@pytest.mark.parametrize(
    "layout", [moved, sliced, strided, fewer_channels, apart, channels_apart], ids=lambda layout: layout.__name__
)
def test_any_layout_of_the_inputs_gives_the_same_bits(name: str, dtype: torch.dtype, layout: Layout) -> None:
    case = CASES[name](dtype)
    expected = run(case)
    assert_same_bits(run(rearranged(case, layout)), expected, f"for {layout.__name__} inputs")
    for argument, value in case.arguments.items():
        if value is not None:
            assert_same_bits(run(rearranged(case, layout, argument)), expected, f"for a {layout.__name__} {argument}")


@DTYPES
@pytest.mark.parametrize("name", ["posterior-eps", "posterior-seed", "posterior-odd"])
def test_interleaved_inputs_of_any_layout_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    case = rearranged(CASES[name](dtype), channels_last)
    expected = run(case)
    for layout in (moved, padded_pixels, pixels_apart):
        assert_same_bits(run(rearranged(case, layout)), expected, f"for {layout.__name__} inputs")
        assert_same_bits(run(rearranged(case, layout, "logvar")), expected, f"for {layout.__name__} logvar")
    assert_same_bits(run(rearranged(case, torch.Tensor.contiguous, "logvar")), expected, "for a planar logvar")


@EVERY
@pytest.mark.parametrize("dims", [(0,), (1,), (3,), (1, 2), (0, 1, 2, 3)], ids=str)
def test_expanded_inputs_give_the_same_numbers(name: str, dims: tuple[int, ...]) -> None:
    def expanded(value: Tensor) -> Tensor:
        kept = tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(4))
        return value[kept].expand(value.shape)

    case = CASES[name](torch.float32)
    for argument, value in case.arguments.items():
        if value is not None:
            found = run(rearranged(case, expanded, argument))
            expected = run(rearranged(case, lambda tensor: expanded(tensor).contiguous(), argument))
            for key, number in expected.items():  # an expanded mu may count as interleaved, which adds in another order
                torch.testing.assert_close(found[key], number, msg=lambda m, a=argument, k=key: f"{a}, {k}: {m}")


def test_gamma_and_beta_may_be_halves_of_one_tensor() -> None:
    for channels in (24, 9):
        case = channel_modulation_case(torch.bfloat16, height=5, width=6, channels=channels)
        both = torch.cat((case.arguments["gamma"], case.arguments["beta"]), dim=-1)  # type: ignore[arg-type]
        gamma, beta = both.chunk(2, dim=-1)
        halves = dataclasses.replace(case, arguments={**case.arguments, "gamma": gamma, "beta": beta})
        assert_same_bits(run(halves), run(case), "for halves of one tensor")


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """Fill uninitialised tensors of torch with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@DTYPES
@EVERY
@pytest.mark.parametrize("layout", ["as-it-is", "channels-last"])
@pytest.mark.usefixtures("empty_is_nan")
def test_every_element_of_every_output_is_written(name: str, dtype: torch.dtype, layout: str) -> None:
    case = CASES[name](dtype)
    found = run(case if layout == "as-it-is" else rearranged(case, channels_last))
    unwritten = [key for key, value in found.items() if value.isnan().any()]
    assert not unwritten, f"{unwritten} have elements that were never written"


@DTYPES
@EVERY
@pytest.mark.parametrize("layout", ["as-it-is", "channels-last"])
def test_the_order_of_the_threads_does_not_matter(
    name: str, dtype: torch.dtype, layout: str, twin_library: ctypes.CDLL
) -> None:
    case = CASES[name](dtype)
    case = case if layout == "as-it-is" else rearranged(case, channels_last)
    expected = run(case)
    twin_library.savl_twin_run_threads_backwards(ctypes.c_bool(True))
    try:
        found = run(case)
    finally:
        twin_library.savl_twin_run_threads_backwards(ctypes.c_bool(False))
    assert_same_bits(found, expected, "when threads run backwards: one reads what another writes in the same phase")


@EVERY
def test_an_empty_batch_gives_empty_outputs(name: str) -> None:
    case = rearranged(CASES[name](torch.float32), lambda value: value[:0])
    expected = case.run("eager")
    for key, value in run(case).items():
        assert value.shape == expected[key].shape, key
        assert value.dtype == expected[key].dtype, key


def test_features_without_channels_give_empty_outputs() -> None:
    nothing = torch.empty(2, 3, 4, 0)
    assert channel_modulation(nothing, nothing, nothing, nothing, kernels=CUDA).shape == nothing.shape


@pytest.mark.parametrize("layout", ["planar", "channels-last"])
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 1, 3, 4), (1, 5, 1, 1), (2, 5, 3, 1), (1, 1, 1, 1)], ids=str)
def test_outputs_have_the_strides_that_the_fake_kernels_promise(layout: str, shape: tuple[int, ...]) -> None:
    mu = torch.randn(shape)
    mu = channels_last(mu) if layout == "channels-last" else mu
    maps = torch.randn(shape[0], *shape[2:])
    promise = gaussian_posterior.__globals__
    arguments = (mu, mu, mu, None, 0)
    forward = torch.ops.savl.gaussian_posterior(*arguments, 0.1, 2.0)
    backward = torch.ops.savl.gaussian_posterior_backward(mu, maps, maps, *arguments, True)
    promised = (*promise["_fake"](*arguments, 0.1, 2.0), *promise["_fake_backward"](mu, maps, maps, *arguments, True))
    for index, (found, wanted) in enumerate(zip((*forward, *backward), promised, strict=True)):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), f"output {index}"
        assert found.stride() == wanted.stride(), f"output {index}"


# NaN and infinity


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30])
@pytest.mark.parametrize("layout", ["as-it-is", "channels-last"])
@EVERY
def test_nan_and_infinity_reach_the_same_outputs_as_in_eager(name: str, layout: str, value: float) -> None:
    case = CASES[name](torch.float32)
    case = case if layout == "as-it-is" else rearranged(case, channels_last)
    for argument, tensor in case.arguments.items():
        if tensor is None:
            continue
        for spot in ((0, 0, 0, 0), tuple(size - 1 for size in tensor.shape), (1, 1, 2, 3)):
            changed = rearranged(case, lambda given: given.clone(memory_format=torch.preserve_format), argument)
            changed.arguments[argument][spot] = value  # type: ignore[index]
            found, expected = run(changed), changed.run("eager")
            for key, wanted in expected.items():
                where = f"{key} for {value} in {argument}{list(spot)}"
                if key == "variance_mean":  # torch turns an infinity into NaN
                    assert torch.equal(found[key].isfinite(), wanted.isfinite()), where
                    continue
                assert torch.equal(found[key].isnan(), wanted.isnan()), where
                if not key.startswith("d "):
                    assert torch.equal(found[key] == math.inf, wanted == math.inf), where
                    assert torch.equal(found[key] == -math.inf, wanted == -math.inf), where


@pytest.mark.parametrize("value", [-1000.0, -104.0, -88.0, 88.0, 89.5, 178.5, 700.0])
def test_log_variances_at_the_ends_of_the_exponential_are_those_of_eager(value: float) -> None:
    logvar = torch.full((1, 3, 2, 4), value)
    found = gaussian_posterior(logvar, logvar, logvar, kernels=CUDA)
    expected = gaussian_posterior(logvar, logvar, logvar, kernels=KernelSettings.of("eager"))
    for name in ("sample", "kl", "variance"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-38)


# Gradients


@pytest.mark.parametrize("noise", [{}, {"seed": 3}], ids=["none", "seed"])
@pytest.mark.parametrize("layout", ["planar", "channels-last"])
def test_each_output_alone_passes_its_gradient_back(noise: dict[str, Any], layout: str) -> None:
    generator = torch.Generator().manual_seed(1)
    mu, logvar = (torch.randn(2, 8, 4, 6, generator=generator) * scale for scale in (1.0, 0.2))
    if layout == "channels-last":
        mu, logvar = channels_last(mu), channels_last(logvar)
    for output in ("sample", "kl", "severity", "variance", "variance_mean", "variance_var"):
        gradients = []
        for kernels in (CUDA, KernelSettings.of("eager")):
            given = [value.detach().requires_grad_() for value in (mu, logvar)]
            result = getattr(gaussian_posterior(*given, **noise, kernels=kernels), output)
            weights = torch.linspace(-1, 1, result.numel()).reshape(result.shape)
            found = torch.autograd.grad((result * weights).sum(), given, allow_unused=True)
            gradients.append([torch.zeros_like(mu) if value is None else value for value in found])
        for index, (value, wanted) in enumerate(zip(*gradients, strict=True)):
            torch.testing.assert_close(value, wanted, msg=lambda m, o=output, i=index: f"{o}, input {i}: {m}")


# Schemas and errors


@pytest.mark.parametrize("op", ["gaussian_posterior", "channel_modulation"])
def test_the_twin_has_the_schemas_of_savl(op: str, twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for name in (op, f"{op}_backward"):
        ours, theirs = (str(getattr(space, name).default._schema) for space in (twin, torch.ops.savl))
        assert ours.partition("::")[2] == theirs.partition("::")[2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: channel_modulation(t.double(), t.double(), None, t.double(), kernels=CUDA), "float32, bfloat16 and"),
        (lambda t: gaussian_posterior(t.double(), t.double(), kernels=CUDA), "float32, bfloat16 and float16"),
        (lambda t: torch.ops.savl.channel_modulation(t.half(), t.half(), None, t.bfloat16()), "residual must have the"),
        (lambda t: torch.ops.savl.channel_modulation(t, t[:1], None, t), "gamma must have the shape of attended"),
        (lambda t: torch.ops.savl.channel_modulation(t[0], t, None, t), "attended must have 4 dimensions, got 3"),
        (lambda t: torch.ops.savl.gaussian_posterior(t, t.half(), None, None, 0, 0.1, 2.0), "logvar must have the dt"),
        (lambda t: torch.ops.savl.gaussian_posterior(t[:, :0], t[:, :0], None, None, 0, 0.1, 2.0), "one channel and"),
        (
            lambda t: torch.ops.savl.gaussian_posterior_backward(t, None, None, t, t, None, None, 0, False),
            "a gradient of the sample, but no noise",
        ),
        (
            lambda t: torch.ops.savl.gaussian_posterior_backward(None, t, None, t, t, None, None, 0, False),
            r"must be \(B, H, W\)",
        ),
    ],
)
def test_an_error_names_the_op_and_the_invalid_argument(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"savl::.*{message}"):
        call(torch.zeros(2, 3, 4, 5))
