"""Tests of the elements that attention kernels read and write: layouts, empty batches and distant addresses."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from unittest import mock

import pytest
import torch
from kernel_checks import (
    DTYPES,
    FLOAT16,
    FLOAT32,
    LAYOUTS,
    TRITON,
    argument,
    assert_same_bits,
    changed,
    uninitialised_memory_is_nan,
)
from torch import Tensor

from savl.ops import overlapping_window_attention, window_attention
from savl.ops.equivalence import Case, Outputs
from savl.ops.overlapping_window_attention import overlapping_window_attention_case
from savl.ops.window_attention import window_attention_case

# With tails of tiles in queries, keys and the head dimension.
AWKWARD: dict[str, Callable[[torch.dtype], Case]] = {
    "window": lambda dtype: window_attention_case(dtype, window=5, shift=2, rows=1, columns=1, heads=2, head_dim=7),
    "overlapping": lambda dtype: overlapping_window_attention_case(
        dtype, window=3, key_window=7, rows=1, columns=2, heads=1, head_dim=7
    ),
    "traits": lambda dtype: window_attention_case(
        dtype,
        window=(3, 2),
        shift=(0, 1),
        key_window=(5, 2),
        rows=2,
        columns=1,
        heads=1,
        head_dim=7,
        severity=False,
        bias="dense",
        cosine=True,
        mask=-1.0,
    ),
    "plain": lambda dtype: window_attention_case(
        dtype, window=3, rows=2, columns=1, heads=1, head_dim=30, severity=False
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", AWKWARD)
def test_every_element_is_written_and_every_run_is_bit_identical(name: str, dtype: torch.dtype) -> None:
    case = AWKWARD[name](dtype)
    expected = case.run("triton")
    missing = {f"d {given}" for given, value in case.arguments.items() if value is not None} - expected.keys()
    assert not missing, f"there is no {missing}"
    with uninitialised_memory_is_nan():
        found = case.run("triton")
    unwritten = [result for result, value in found.items() if value.isnan().any()]
    assert not unwritten, f"{unwritten} have elements that no kernel wrote"
    assert_same_bits(found, expected, "on the second run, with memory full of NaN")


CONTIGUOUS = {
    "window": window_attention_case(FLOAT32, window=4, shift=1, rows=1, columns=1, heads=1, head_dim=7, batch=2),
    "overlapping": overlapping_window_attention_case(
        FLOAT32, window=3, key_window=5, rows=1, columns=1, heads=1, head_dim=7, batch=2
    ),
    "keys apart": window_attention_case(
        FLOAT32,
        window=4,
        key_window=(2, 3),
        rows=1,
        columns=1,
        heads=1,
        head_dim=7,
        batch=2,
        severity=False,
        bias="dense",
    ),
}


@cache
def results_of_contiguous(name: str) -> Outputs:
    return CONTIGUOUS[name].run("triton")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONTIGUOUS)
def test_any_layout_gives_the_same_bits(name: str, layout: str) -> None:
    case = CONTIGUOUS[name]
    present = [given for given, value in case.arguments.items() if value is not None]
    views = {given: LAYOUTS[layout](argument(case, given)) for given in present}
    strange = [given for given, view in views.items() if not view.is_contiguous()]
    assert len(strange) >= len(views) - 1, f"only {strange} are not contiguous"
    assert_same_bits(changed(case, **views).run("triton"), results_of_contiguous(name), layout)


def test_keys_and_values_may_have_different_strides() -> None:
    case = CONTIGUOUS["keys apart"]
    k = LAYOUTS["with room between pixels"](argument(case, "k"))
    assert_same_bits(changed(case, k=k).run("triton"), results_of_contiguous("keys apart"), "with other strides of k")


QKV, KV = torch.randn(1, 4, 4, 3 * 14), torch.randn(1, 4, 4, 2 * 14)


@pytest.mark.parametrize(
    ("attend", "features"),
    [
        (partial(window_attention, window=4, shift=1), (QKV,)),
        (partial(overlapping_window_attention, window=4, key_window=4), (QKV[..., :14], KV)),
    ],
    ids=["window", "overlapping"],
)
def test_expanded_tensors_and_gradients_give_the_same_results_as_their_copies(
    attend: Callable[..., Tensor], features: tuple[Tensor, ...]
) -> None:
    expanded = [
        *(each.expand(2, -1, -1, -1) for each in features),
        torch.randn(49, 1),
        torch.rand(1, 1, 1).expand(2, 4, 4),
    ]
    results = []
    for copied in (False, True):
        given = [(value.contiguous() if copied else value).detach().requires_grad_() for value in expanded]
        out = attend(*given, kernels=TRITON)
        gradient = torch.full((1,), 0.5).expand(out.shape)  # strides of 0
        gradients = torch.autograd.grad(out, given, gradient.contiguous() if copied else gradient)
        results.append([out.detach(), *gradients])
    for index, (found, expected) in enumerate(zip(*results, strict=True)):
        assert torch.equal(found, expected), f"result {index} differs"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)  # equal windows of float16 have a backward kernel of their own
@pytest.mark.parametrize("name", ["window", "overlapping"])
def test_addresses_in_64_bits_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    from savl.kernels.launch import Attention

    constants = Attention.constants
    results = []
    for far in (False, True):
        with mock.patch.object(Attention, "constants", lambda call, far=far: {**constants(call), "FAR": far}):
            results.append(AWKWARD[name](dtype).run("triton"))
    assert_same_bits(results[1], results[0], "when pixels are counted in 64 bits")


def _window_call(dtype: torch.dtype) -> tuple[str, tuple[Tensor | None, ...], tuple[object, ...]]:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(3))
    tensors = draw(2, 4, 4, 3 * 14).to(dtype), draw(49, 2).to(dtype), draw(2, 4, 4).abs().to(dtype), *(None,) * 4
    return "window_attention", tensors, (2, 4, 4, 4, 4, 1, 1, False, None)


def _overlapping_call(dtype: torch.dtype) -> tuple[str, tuple[Tensor | None, ...], tuple[object, ...]]:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(3))
    tensors = draw(2, 4, 4, 14), draw(2, 4, 4, 28), draw(81, 2), draw(2, 4, 4).abs()
    return "overlapping_window_attention", tuple(each.to(dtype) for each in tensors), (4, 6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [_window_call, _overlapping_call])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_saved_for_the_backward_pass_may_have_any_strides(
    layout: str, make: Callable[..., tuple[str, tuple[Tensor | None, ...], tuple[object, ...]]], dtype: torch.dtype
) -> None:
    name, tensors, geometry = make(dtype)
    out, lse = getattr(torch.ops.savl, name)(*tensors, *geometry)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    backward = getattr(torch.ops.savl, f"{name}_backward")
    saved = LAYOUTS[layout](out), LAYOUTS[layout](lse)
    assert not any(each.is_contiguous() for each in saved)
    expected = backward(gradient, *tensors, out, lse, *geometry)
    found = backward(LAYOUTS[layout](gradient), *tensors, *saved, *geometry)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"result {index} differs"


@pytest.mark.parametrize(("side", "far"), [(2**12, False), (2**13, True)])  # of 128 channels: 2³¹ elements and 2³³
def test_images_of_more_than_two_gigabytes_are_addressed_in_64_bits(side: int, far: bool) -> None:
    from savl.kernels.launch import Attention

    q, k, v = torch.empty(1, side, side, 96, device="meta", dtype=FLOAT16).chunk(3, dim=-1)
    call = Attention(q, k, v, torch.empty(49, 2, device="meta"), None, (4, 4), (4, 4), 2)
    assert call.constants()["FAR"] is far


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "make",
    [
        partial(window_attention_case, window=4, shift=1),
        partial(overlapping_window_attention_case, window=4, key_window=6),
        partial(window_attention_case, window=4, severity=False),
    ],
    ids=["window", "overlapping", "plain"],
)
def test_an_empty_batch_gives_empty_results_and_gradients_of_zero(
    make: Callable[..., Case], dtype: torch.dtype
) -> None:
    case = make(dtype, batch=0)
    with uninitialised_memory_is_nan():
        found, eager = case.run("triton"), case.run("eager")
    for name, expected in eager.items():
        assert found[name].shape == expected.shape, name
        assert found[name].dtype == expected.dtype, name
    table = found["d bias_table"]
    assert torch.equal(table, torch.zeros_like(table)), "no window has a gradient"
