"""Figures show the data that they are given."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from savl.analysis import figures
from savl.analysis.channels import ChannelResponse
from savl.analysis.figures import Colouring
from savl.evaluation.geometry import class_mean_geometry

RANDOM = np.random.default_rng(0)


def pixels(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def colours(png: bytes, at_least: int = 40) -> set[tuple[int, ...]]:
    """Return the colours that at least so many pixels have, without grays."""
    packed = pixels(png).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    found, counts = np.unique(packed, return_counts=True)
    common = [(value >> 16, value >> 8 & 255, value & 255) for value in found[counts >= at_least].tolist()]
    return {colour for colour in common if np.ptp(colour) > 30}


def test_an_embedding_keeps_groups_together_and_follows_from_the_seed() -> None:
    groups = np.repeat([0, 1], 20)
    features = (10 * groups[:, None] + RANDOM.normal(size=(40, 3))).astype(np.float32)
    rows, places = figures.embedding(features, 0)
    assert rows.tolist() == list(range(40))
    centres = [places[groups == group].mean(axis=0) for group in (0, 1)]
    apart = np.linalg.norm(centres[0] - centres[1])
    assert all(np.linalg.norm(places[groups == group] - centres[group], axis=1).max() < apart for group in (0, 1))
    np.testing.assert_array_equal(figures.embedding(features, 0)[1], places)


def test_at_most_so_many_images_are_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "MOST_POINTS", 10)
    rows, places = figures.embedding(RANDOM.normal(size=(30, 3)).astype(np.float32), 0)
    assert len(rows) == len(places) == len(set(rows.tolist())) == 10
    assert rows.tolist() == sorted(rows.tolist())


@pytest.mark.parametrize("features", [np.ones((9, 3)), np.arange(9)[:, None] * np.ones((1, 1))])
def test_features_that_vary_in_fewer_than_two_directions_can_be_embedded(features: NDArray[np.float64]) -> None:
    places = [figures.embedding(features.astype(np.float32), 0)[1] for _ in range(2)]
    assert np.isfinite(places[0]).all()
    np.testing.assert_array_equal(places[0], places[1])


def test_classes_have_colours_of_their_own_and_unknown_ones_are_gray() -> None:
    places = RANDOM.normal(size=(40, 2)).astype(np.float32)
    two = figures.coloured_embeddings(places, {"camera": Colouring(["a", "b"] * 20)})
    one = figures.coloured_embeddings(places, {"camera": Colouring(["a", None] * 20)})
    assert len(colours(two)) == 2
    assert len(colours(one)) == 1
    assert colours(one) < colours(two)


@pytest.mark.parametrize("name", ["$\\frac$", "A$_", "_hidden"])
def test_names_are_drawn_without_interpretation(name: str) -> None:
    places = RANDOM.normal(size=(40, 2)).astype(np.float32)
    drawn, other = (
        pixels(figures.coloured_embeddings(places, {name: Colouring([each, "b"] * 20)})) for each in (name, "c")
    )
    assert drawn.shape == other.shape
    assert (drawn != other).any(), "nothing of the name is in the legend"
    figures.severity_by_number(name, np.arange(5.0), np.arange(5, dtype=np.float32), None)


def test_ordinal_classes_have_the_colours_of_a_scale() -> None:
    places = RANDOM.normal(size=(40, 2)).astype(np.float32)
    values = ["strong", "weak"] * 20
    ordered = figures.coloured_embeddings(places, {"level": Colouring(values, ("weak", "middle", "strong"))})
    assert colours(ordered) == {tuple(round(255 * part) for part in colour[:3]) for colour in figures._ordered(2)}


def test_a_colouring_of_some_points_keeps_its_order() -> None:
    some = Colouring(["a", None, "b"], ("b", "a")).of(np.asarray([2, 0]))
    assert some == Colouring(["b", "a"], ("b", "a"))


def test_every_factor_is_a_panel_and_numbers_have_a_colour_bar() -> None:
    places = RANDOM.normal(size=(12, 2)).astype(np.float32)
    factors = {"iso": Colouring([100.0 * 2 ** (row % 6) for row in range(12)]), "shutter": Colouring([0.5, None] * 6)}
    narrow = pixels(figures.coloured_embeddings(places, dict(list(factors.items())[:1]))).shape
    wide = pixels(figures.coloured_embeddings(places, factors)).shape
    assert wide[1] == pytest.approx(2 * narrow[1], abs=2)
    assert wide[0] == narrow[0]
    assert len(colours(figures.coloured_embeddings(places, {"iso": factors["iso"]}), 12)) > 100, "a scale"


def test_numbers_that_span_decades_are_coloured_by_their_logarithm() -> None:
    places = RANDOM.normal(size=(12, 2)).astype(np.float32)
    iso = [100.0 * 2 ** (row % 6) for row in range(12)]
    wide, exponents = (
        figures.coloured_embeddings(places, {"iso": Colouring(values)}) for values in (iso, np.log2(iso).tolist())
    )
    assert len(colours(wide) & colours(exponents)) >= 4, "not the ends alone"


def test_class_means_of_every_network_are_a_row_with_its_figures() -> None:
    straight = torch.arange(5.0)[:, None] * torch.eye(3)[:, None]
    flat = straight * torch.tensor([1.0, 0.0, 0.0]) + straight[0]
    names = ("noise", "blur", "jpeg")
    fields = {"<b>$x": class_mean_geometry(straight, names), "flat": class_mean_geometry(flat, names)}
    drawn = figures.class_mean_rays(fields)
    texts = [text.text or "" for text in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert "<b>$x: participation ratio 2.58" in texts
    assert "flat: participation ratio 1.00" in texts
    assert "component 3 (14.3 %)" in texts
    assert {"noise", "blur", "JPEG", "clean"} <= set(texts)
    assert figures.class_mean_rays(fields) == drawn
    assert figures.class_mean_rays({"constant": class_mean_geometry(torch.ones(3, 5, 2), names)})


def test_a_response_is_visible_in_the_heatmap() -> None:
    still = ChannelResponse("noise", (0.0,) * 4, (0.0,) * 4, (0.0, 1.0, 2.0), ((0.0,) * 3,) * 4)
    moving = ChannelResponse("blur", (0.0,) * 4, (0.0,) * 4, (0.0, 1.0, 2.0), ((0.0, 1.0, 2.0), *((0.0,) * 3,) * 3))
    before, after = (figures.channel_heatmaps([still, second]) for second in (still, moving))
    assert len(colours(after)) > len(colours(before))
    left, right = np.hsplit((pixels(before) != pixels(after)).any(axis=2)[60:-60, :-200], 2)
    assert right.mean() > 10 * left.mean()


def test_severity_is_drawn_against_wide_numbers_on_a_logarithmic_scale() -> None:
    severity = np.linspace(0, 1, 12, dtype=np.float32)
    iso = np.asarray([100.0 * 2 ** (row // 2) for row in range(12)])
    drawn = [pixels(figures.severity_by_number("iso", amounts, severity, None)) for amounts in (iso, np.log2(iso))]
    points = [np.flatnonzero((each[..., 1].astype(int) - each[..., 0] > 60).any(axis=0)) for each in drawn]
    spans = [np.ptp(each) for each in points]
    assert spans[0] == pytest.approx(spans[1], rel=0.05)
    steps = [np.diff(each)[np.diff(each) > 3] for each in points]
    assert steps[0].max() < 1.3 * steps[0].min(), "doublings are equally far apart"
