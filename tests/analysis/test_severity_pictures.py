"""Severity maps to look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from savl.analysis import severity_pictures
from savl.analysis.severity_pictures import photograph_severity, read_middle, uneven_severity
from savl.evaluation.severity import severity_agreement
from savl.images.folder import read_rgb
from savl.network import SAVL

Make = Callable[..., SAVL]
Write = Callable[..., list[Path]]


def test_an_image_degraded_unevenly_is_that_of_severity_agreement(network: Make, photographs: Write) -> None:
    model, paths = network(), photographs(3, height=70, width=90)
    for place, expected in enumerate(severity_agreement(model, paths, seed=4)):
        found, again = uneven_severity([model, model], paths[place], (4, place))
        assert found.correlation == pytest.approx(expected.correlation, abs=1e-4)
        assert found.correlation == again.correlation
        assert found.name == expected.name
        assert found.truth is not None
        assert found.photo.shape == (17, 22, 3)
        assert found.severity.shape == found.truth.shape == (17, 22)
        assert found.truth.std() > 0.05


def test_the_map_of_a_photograph_is_that_of_the_network(network: Make, photographs: Write) -> None:
    (path,) = photographs(1, height=40, width=60)
    model = network()
    found = photograph_severity(model, path)
    with torch.no_grad():
        field = model.estimate(read_rgb(path)[None])
    assert field is not None
    assert field.severity is not None
    np.testing.assert_allclose(found.severity, field.severity[0], atol=1e-5)
    np.testing.assert_array_equal(found.photo, (read_rgb(path) * 255).round().byte().permute(1, 2, 0))
    assert found.truth is found.correlation is None


def test_large_maps_are_averaged_over_whole_pixels(
    network: Make, photographs: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = photographs(1, height=33, width=60)
    model = network()
    whole = photograph_severity(model, path)
    monkeypatch.setattr(severity_pictures, "LONGEST", 20)
    small = photograph_severity(model, path)
    assert small.severity.shape == (11, 20)
    assert small.photo.shape == (11, 20, 3)
    np.testing.assert_allclose(small.severity[0, 0], whole.severity[:3, :3].mean(), rtol=1e-5)


def test_large_photographs_are_cut_to_their_middle(photographs: Write) -> None:
    (path,) = photographs(1, height=50, width=63)
    x = read_rgb(path)
    assert torch.equal(read_middle(path, 100, 4), x[:, :48, :60]), "as severity_agreement cuts them"
    assert torch.equal(read_middle(path, 20, 4), x[:, 15:35, 21:41])
