"""Severity maps of photographs, and photographs degraded by the whole pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from savl.analysis import full_pipeline
from savl.analysis.full_pipeline import masked_severity, photograph_severity, restore
from savl.evaluation.fidelity import fidelity
from savl.evaluation.severity import severity_agreement
from savl.images.folder import read_rgb
from savl.network import SAVL

Make = Callable[..., SAVL]
Write = Callable[..., list[Path]]


def test_a_masked_image_is_that_of_severity_agreement(network: Make, photographs: Write) -> None:
    model, paths = network(), photographs(3, height=70, width=90)
    for place, expected in enumerate(severity_agreement(model, paths, seed=4)):
        found, again = masked_severity([model, model], paths[place], (4, place))
        assert found.correlation == pytest.approx(expected.correlation, abs=1e-4)
        assert found.correlation == again.correlation
        assert found.name == expected.name
        assert found.mask is not None
        assert found.photo.shape == (17, 22, 3)
        assert found.severity.shape == found.mask.shape == (17, 22)
        assert found.mask.std() > 0.05


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
    assert found.mask is found.correlation is None


def test_large_maps_are_averaged_over_whole_pixels(
    network: Make, photographs: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = photographs(1, height=33, width=60)
    model = network()
    whole = photograph_severity(model, path)
    monkeypatch.setattr(full_pipeline, "SHOWN_SIDE", 20)
    small = photograph_severity(model, path)
    assert small.severity.shape == (11, 20)
    assert small.photo.shape == (11, 20, 3)
    np.testing.assert_allclose(small.severity[0, 0], whole.severity[:3, :3].mean(), rtol=1e-5)


def test_a_fresh_network_with_an_image_residual_scores_as_bicubic_does(network: Make, photographs: Write) -> None:
    done: list[tuple[str, int, int]] = []
    (found,) = restore([network()], photographs(2), seed=0, on_progress=lambda *progress: done.append(progress))
    assert found.model == found.bicubic
    assert found.images == 2
    assert done == [("upscaling", 0, 2), ("upscaling", 1, 2), ("upscaling", 2, 2)]
    assert 5 < found.model.psnr_y < 40


def test_all_networks_get_the_same_images_and_individual_scores(network: Make, photographs: Write) -> None:
    paths, brighter = photographs(2), network()
    with torch.no_grad():
        assert brighter.upsampler.to_image.bias is not None
        brighter.upsampler.to_image.bias += 0.2
    first, second = restore([network(), brighter], paths, seed=0, on_progress=lambda *progress: None)
    assert first.bicubic == second.bicubic == first.model
    assert second.model.psnr_rgb < first.model.psnr_rgb


def test_degradations_depend_on_the_seed_and_the_position(network: Make, photographs: Write) -> None:
    (path,) = photographs(1)
    model = network()

    def score(seed: int, times: int = 1) -> float:
        return restore([model], [path] * times, seed=seed, on_progress=lambda *progress: None)[0].bicubic.psnr_rgb

    assert score(0) == score(0)
    assert score(0) != score(1)
    assert score(0, times=2) != score(0)


def test_restored_images_are_compared_with_the_photograph(
    network: Make, photographs: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = photographs(1)
    seen = []

    def spy(sr: torch.Tensor, hr: torch.Tensor, *, crop: int) -> object:
        seen.append((hr, crop))
        return fidelity(sr, hr, crop=crop)

    monkeypatch.setattr("savl.analysis.full_pipeline.fidelity", spy)
    restore([network()], [path], seed=0, on_progress=lambda *progress: None)
    assert len(seen) == 2
    assert all(torch.equal(hr, read_rgb(path)) and crop == 4 for hr, crop in seen)
