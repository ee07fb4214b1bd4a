"""The C++ kernels write every output and no input, and read any layout."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from savl.ops import KernelSettings
from savl.ops.channel_modulation import channel_modulation_case
from savl.ops.equivalence import Case
from savl.ops.op import OPS
from savl.ops.overlapping_window_attention import overlapping_window_attention_case

pytestmark = pytest.mark.usefixtures("extension")

CPP = KernelSettings.of("cpp")
Make = Callable[..., Case]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor], when: str) -> None:
    assert found.keys() == expected.keys()
    # NaN equals nothing, itself included: it counts as a difference here, as it should.
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different, f"{different} differ {when}"


# Uninitialised memory


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """Fill all uninitialised memory that PyTorch allocates with NaN, including tensors of the extension."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@DTYPES
def test_every_element_of_every_output_is_written(
    small_case: Make, dtype: torch.dtype, instruction_set: str, request: pytest.FixtureRequest
) -> None:
    case = small_case(dtype)
    expected = case.run("cpp")
    request.getfixturevalue("empty_is_nan")
    assert torch.empty(3).isnan().all(), "this test relies on torch filling what is uninitialised"
    found = case.run("cpp")
    unwritten = [name for name, value in found.items() if value.isnan().any()]
    assert not unwritten, f"{unwritten} have elements that nobody wrote"
    assert_same_bits(found, expected, "when memory is full of NaN")


FINGERPRINT = """
import hashlib, torch
from savl.ops.op import OPS
for name, op in OPS.items():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        outputs = op.case(dtype, **op.small_cases[0]).run("cpp").values()
        digest = hashlib.sha256(b"".join(value.double().numpy().tobytes() for value in outputs)).hexdigest()
        print(f"{name}:{dtype}:{digest}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc fills what malloc returns")
def test_no_kernel_reads_scratch_memory_that_it_did_not_write() -> None:
    # 0x7f7f7f7f is 3.4e38 as a float: a product with it or its exponential shows.
    prints = [
        subprocess.run(
            [sys.executable, "-c", FINGERPRINT],
            env={**os.environ, "MALLOC_PERTURB_": fill},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout.split()
        for fill in ("0", str(0x7F ^ 0xFF))
    ]
    assert len(prints[0]) == 3 * len(OPS)
    different = [first for first, second in zip(*prints, strict=True) if first != second]
    assert not different, f"{different} depend on what memory held before"


# Layouts


def transposed(value: Tensor) -> Tensor:
    """Dimensions laid out in reverse."""
    axes = tuple(reversed(range(value.dim())))
    return value.permute(axes).contiguous().permute(axes)


def strided(value: Tensor) -> Tensor:
    """Every second number of something larger that is NaN in between."""
    return torch.stack((value, torch.full_like(value, torch.nan)), dim=-1)[..., 0]


def sliced(value: Tensor) -> Tensor:
    """The middle of something larger that is NaN all around."""
    around = torch.full([size + 3 for size in value.shape], torch.nan, dtype=value.dtype)
    middle = around[tuple(slice(1, size + 1) for size in value.shape)]
    return middle.copy_(value)


def channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


LAYOUTS = [transposed, strided, sliced, channels_last]


def rearranged(case: Case, layout: Callable[[Tensor], Tensor], *names: str) -> Case:
    arguments = {
        name: layout(value) if value is not None and (not names or name in names) else value
        for name, value in case.arguments.items()
    }
    for name, value in case.arguments.items():
        assert value is None or torch.equal(value, arguments[name]), "the layout changed the numbers"  # type: ignore[arg-type]
    return dataclasses.replace(case, arguments=arguments)


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_inputs_gives_the_same_bits(
    small_case: Make, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    case = small_case(dtype)
    if case.op == "gaussian_posterior" and layout is not sliced:
        # Channels are added up in another order where they lie side by side; within one layout bits are the same.
        base = rearranged(case, channels_last) if layout(case.arguments["mu"]).stride(1) == 1 else case  # type: ignore[arg-type]
    else:
        base = case
    expected = {name: value.contiguous() for name, value in base.run("cpp").items()}
    assert_same_bits(rearranged(case, layout).run("cpp"), expected, f"for {layout.__name__} inputs")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_input_may_have_a_layout_of_its_own(small_case: Make, layout: Callable[[Tensor], Tensor]) -> None:
    case = small_case(torch.float32)
    expected = case.run("cpp")
    for name, value in case.arguments.items():
        if value is None or (name == "mu" and layout(value).stride(1) == 1):  # mu decides in which order to add up
            continue
        assert_same_bits(rearranged(case, layout, name).run("cpp"), expected, f"for {layout.__name__} {name}")


def expanded_cases() -> dict[str, Case]:
    """Inputs that are views of fewer numbers: all elements along some dimensions lie in one place."""
    cases = {}
    for dims in ((0,), (1,), (2,), (3,), (1, 2), (0, 1), (0, 2), (0, 1, 2), (0, 1, 2, 3)):
        name = "".join("BHWC"[dim] for dim in dims)

        def expand(value: Tensor, dims: tuple[int, ...] = dims) -> Tensor:
            kept = tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(value.dim()))
            return value[kept].expand(value.shape)

        for op in OPS.values():
            case = op.case(torch.float32, **op.small_cases[0])
            for argument, value in case.arguments.items():
                if value is not None and value.dim() > max(dims):
                    view = {argument: expand(value)}
                    cases[f"{case.op}-{argument}-{name}"] = dataclasses.replace(
                        case, arguments={**case.arguments, **view}
                    )
    return cases


EXPANDED = expanded_cases()


@pytest.mark.parametrize("name", EXPANDED)
def test_expanded_inputs_give_the_same_bits(name: str) -> None:
    case = EXPANDED[name]
    copies = {key: None if value is None else value.contiguous() for key, value in case.arguments.items()}
    expected = dataclasses.replace(case, arguments=copies).run("cpp")
    found = case.run("cpp")
    if "mu" in case.arguments:  # another order of adding channels up
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, msg=lambda m, k=key: f"{k}: {m}")
    else:
        assert_same_bits(found, expected, "for an expanded input")


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (3,), (1, 2), (0, 1), (0, 2), (0, 1, 2), (0, 1, 2, 3)], ids=str)
def test_gradients_that_come_expanded_give_the_same_bits(small_case: Make, dims: tuple[int, ...]) -> None:
    # What a sum or a mean over some dimensions passes back: one number for many elements, stride 0.
    case = small_case(torch.float32)
    given = {name: value for name, value in case.arguments.items() if value is not None}

    def gradients(contiguous: bool) -> dict[str, Tensor]:
        leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
        out = OPS[case.op].function(**{**case.arguments, **leaves}, **case.options, kernels=CPP)
        out = out if isinstance(out, Tensor) else out[0] if out[0].shape != (0,) else out[1]
        over = tuple(dim for dim in dims if dim < out.dim())
        ramp = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
        back = ramp.mean(dim=over, keepdim=True).expand(out.shape)
        found = torch.autograd.grad(
            out, list(leaves.values()), back.contiguous() if contiguous else back, allow_unused=True
        )
        return {name: value for name, value in zip(leaves, found, strict=True) if value is not None}

    assert_same_bits(gradients(False), gradients(True), f"for a gradient expanded along {dims}")


def test_q_and_kv_may_be_views_of_one_tensor() -> None:
    case = overlapping_window_attention_case(torch.float32, batch=2, window=4, key_window=6, head_dim=5)
    qkv = torch.cat((case.arguments["q"], case.arguments["kv"]), dim=-1)  # type: ignore[arg-type]
    views = {"q": qkv[..., :10], "kv": qkv[..., 10:]}
    found = dataclasses.replace(case, arguments={**case.arguments, **views}).run("cpp")
    assert_same_bits(found, case.run("cpp"), "for views of one tensor")


def test_gamma_and_beta_may_be_halves_of_one_tensor() -> None:
    case = channel_modulation_case(torch.float32, height=5, width=6, channels=9)
    gamma, beta = torch.cat((case.arguments["gamma"], case.arguments["beta"]), dim=-1).chunk(2, dim=-1)  # type: ignore[arg-type]
    found = dataclasses.replace(case, arguments={**case.arguments, "gamma": gamma, "beta": beta}).run("cpp")
    assert_same_bits(found, case.run("cpp"), "for halves of one tensor")


@DTYPES
def test_the_inputs_are_left_alone(small_case: Make, dtype: torch.dtype) -> None:
    case = small_case(dtype)
    copies = {name: value.clone() for name, value in case.arguments.items() if value is not None}
    case.run("cpp")
    changed = [name for name, copy in copies.items() if not torch.equal(copy, case.arguments[name])]  # type: ignore[arg-type]
    assert not changed, f"{case.op} wrote into {changed}"


@DTYPES
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(small_case: Make, dtype: torch.dtype) -> None:
    case = small_case(dtype, batch=0)
    found = case.run("cpp")
    for name, value in found.items():
        parameter = name.startswith("d ") and case.arguments[name[2:]].numel() > 0  # type: ignore[union-attr]
        if parameter:
            assert torch.equal(value, torch.zeros_like(case.arguments[name[2:]])), name  # type: ignore[arg-type]
        elif name.startswith("d "):
            assert value.shape == case.arguments[name[2:]].shape, name  # type: ignore[union-attr]
        assert value.dtype == case.run("eager")[name].dtype, name
        assert parameter or value.numel() == 0, f"{name} has {value.numel()} elements"
