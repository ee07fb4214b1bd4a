"""Reflect padding to a multiple, also for images smaller than the padding; hooks of layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from savl.network import SAVL, SAVLConfig, reflect_pad_to_multiple

SIDES = st.integers(1, 40)
MULTIPLES = st.integers(1, 24)


def walk_back_and_forth(length: int, target: int) -> list[int]:
    """Return ``target`` indices that run from 0 to length − 1 and back, without repeating the turning points."""
    visited, position, step = [0], 0, 1
    while len(visited) < target:
        if length > 1:
            if not 0 <= position + step < length:
                step = -step
            position += step
        visited.append(position)
    return visited[:target]


@given(height=SIDES, width=SIDES, multiple=MULTIPLES)
def test_padding_reflects_repeatedly_if_necessary(height: int, width: int, multiple: int) -> None:
    image = torch.arange(height * width).reshape(1, height, width)
    padded = reflect_pad_to_multiple(image, multiple)

    new_height, new_width = padded.shape[-2:]
    assert new_height % multiple == new_width % multiple == 0
    assert 0 <= new_height - height < multiple
    assert 0 <= new_width - width < multiple
    rows, columns = walk_back_and_forth(height, new_height), walk_back_and_forth(width, new_width)
    assert padded[0].tolist() == [[row * width + column for column in columns] for row in rows]


@given(height=SIDES, width=SIDES, multiple=MULTIPLES)
def test_padding_is_that_of_torch_where_torch_can_pad(height: int, width: int, multiple: int) -> None:
    image = torch.arange(2.0 * height * width).reshape(1, 2, height, width)
    missing = (0, -width % multiple, 0, -height % multiple)
    if missing[1] >= width or missing[3] >= height:
        with pytest.raises(RuntimeError):  # this is why the network does not call it
            F.pad(image, missing, mode="reflect")
    else:
        assert torch.equal(reflect_pad_to_multiple(image, multiple), F.pad(image, missing, mode="reflect"))


def test_a_single_pixel_is_repeated() -> None:
    assert torch.equal(reflect_pad_to_multiple(torch.full((1, 3, 1, 1), 0.25), 8), torch.full((1, 3, 8, 8), 0.25))


def test_an_image_that_fits_is_not_copied() -> None:
    image = torch.rand(1, 3, 8, 16)
    assert reflect_pad_to_multiple(image, 8) is image


@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (2, 1, 3)])
def test_any_number_of_leading_dimensions_is_kept(leading: tuple[int, ...]) -> None:
    image = torch.rand(*leading, 3, 5)
    padded = reflect_pad_to_multiple(image, 4)
    assert padded.shape == (*leading, 4, 8)
    assert torch.equal(padded[..., :3, :5], image)


def test_gradients_of_mirrored_pixels_add_up() -> None:
    image = torch.zeros(1, 3, requires_grad=True)
    reflect_pad_to_multiple(image, 5).sum().backward()  # 0 1 2 1 0, in five rows
    assert image.grad.tolist() == [[10.0, 10.0, 5.0]]


@pytest.mark.parametrize("multiple", [0, -4])
def test_a_multiple_that_is_not_positive_is_refused(multiple: int) -> None:
    with pytest.raises(ValueError, match=f"multiple must be at least 1 pixel, got {multiple}"):
        reflect_pad_to_multiple(torch.rand(1, 3, 4, 4), multiple)


@pytest.mark.parametrize("shape", [(1, 3, 0, 4), (1, 3, 4, 0), (4,)])
def test_an_image_without_pixels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image must have shape \(\.\.\., H, W\) with H and W at least 1, got \("):
        reflect_pad_to_multiple(torch.zeros(shape), 4)


def test_hooks_of_layers_in_fused_ops_run_and_change_nothing_else(small_config: Callable[..., SAVLConfig]) -> None:
    model = SAVL(small_config()).eval()
    lr = torch.rand(1, 3, 8, 8)
    expected = model(lr)
    called: set[str] = set()
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "cab" not in name]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    torch.testing.assert_close(model(lr), expected)
    assert called == set(names)
