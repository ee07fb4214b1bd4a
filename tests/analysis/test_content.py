"""Descriptions of what a crop looks like."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from savl.analysis.content import describe, principal_content


def crops(count: int) -> Tensor:
    return torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(count))


def test_a_description_is_the_colours_and_the_texture_of_sixteen_cells() -> None:
    flat = torch.full((1, 3, 16, 16), 0.5)
    left_red, striped = flat.clone(), flat.clone()
    left_red[:, 0, :, :4] = 1.0
    striped[:, :, :8:2] = 0.6  # horizontal stripes above
    base, red, stripes = (describe(each)[0] for each in (flat, left_red, striped))
    assert base.shape == (48 + 32,)
    changed = (red[:48] - base[:48]).view(3, 4, 4)
    assert bool((changed[0, :, 0] == 0.5).all())
    assert changed.count_nonzero() == 4, "four cells are redder, and nothing else has another colour"
    sideways, downwards = (stripes[48:] - base[48:]).view(2, 4, 4)
    assert sideways.count_nonzero() == 0
    assert bool((downwards[:2] > 5).all())
    assert bool((downwards[3] == 0).all())


def test_components_hold_what_tells_crops_apart_and_say_how_much() -> None:
    described = describe(crops(6))
    content = principal_content([described[:2], described[2:]], 99)
    assert content.values.shape == (6, 5), "six crops differ in five directions"
    assert content.explained == pytest.approx(1.0)
    few = principal_content([described], 2)
    assert few.values.shape == (6, 2)
    np.testing.assert_allclose(few.values, content.values[:, :2], rtol=1e-4)
    energy = np.square(content.values).sum(axis=0)
    assert few.explained == pytest.approx(energy[:2].sum() / energy.sum())
    assert list(energy) == sorted(energy, reverse=True)


def test_colours_and_texture_count_alike() -> None:
    described = describe(crops(8))
    louder = described.clone()
    louder[:, :48] *= 100
    np.testing.assert_allclose(
        principal_content([louder], 3).values, principal_content([described], 3).values, rtol=1e-3, atol=1e-5
    )


def test_crops_that_are_all_alike_have_content_zero() -> None:
    content = principal_content([describe(crops(1).expand(4, -1, -1, -1))], 2)
    assert np.abs(content.values).max() < 1e-6
    assert np.isfinite(content.explained)
