"""Comparing methods on pairs: scores, scale, and crops where the methods differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from savl.evaluation import Method, OptionalMetrics, compare, comparison, comparison_report
from savl.images.pairs import Pair, match_pairs


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    """Three pairs, 32x48 pixels and four times that."""
    random = np.random.default_rng(0)
    for name in ("lr", "hr"):
        (tmp_path / name).mkdir()
    for name in ("a", "b", "c"):
        lr = random.integers(0, 256, (32, 48, 3), np.uint8)
        Image.fromarray(lr).save(tmp_path / "lr" / f"{name}.png")
        Image.fromarray(lr.repeat(4, axis=0).repeat(4, axis=1)).save(tmp_path / "hr" / f"{name}.png")
    return match_pairs(tmp_path / "lr", tmp_path / "hr")


def nearest(lr: Tensor) -> Tensor:
    return lr.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)


def spotted(pair: Pair, lr: Tensor) -> Tensor:
    """The original with a spot in the lower right corner, which is brightest in b and not there in c."""
    sr = nearest(lr)
    sr[:, 100:, 150:] += {"a": 0.1, "b": 0.3, "c": 0.0}[pair.name]
    return sr


METHODS = [
    comparison.bicubic(4),
    Method("exact", lambda _, lr: nearest(lr), "exact"),
    Method("spotted", spotted, "spotted"),
]


def test_crops_show_the_images_and_places_where_the_methods_differ_most(pairs: list[Pair]) -> None:
    found = compare(pairs, METHODS, scale=4, metrics=OptionalMetrics(), crops=2)
    assert [crop.name for crop in found.crops] == ["b", "a"]
    crop = found.crops[0]
    assert (crop.left, crop.top) == (96, 32)  # as far to the right and down as a crop of 96 pixels can be
    assert crop.original.shape == (96, 96, 3)
    assert crop.lr.shape == (24, 24, 3)
    original = np.asarray(Image.open(pairs[1].hr))
    assert np.array_equal(crop.original, original[32:, 96:])
    assert np.array_equal(crop.methods["exact"], crop.original)
    assert np.array_equal(crop.lr, np.asarray(Image.open(pairs[1].lr))[8:, 24:])
    assert not np.array_equal(crop.methods["spotted"], crop.original)
    assert crop.thumbnail.shape == (128, 192, 3)
    assert list(crop.methods) == ["bicubic", "exact", "spotted"]


def test_without_crops_none_are_kept_and_scores_are_the_same(pairs: list[Pair]) -> None:
    with_crops = compare(pairs, METHODS, scale=4, metrics=OptionalMetrics(), crops=5)
    without = compare(pairs, METHODS, scale=4, metrics=OptionalMetrics())
    assert len(with_crops.crops) == 3
    assert without.crops == ()
    assert without.means == with_crops.means
    assert without.images[2].methods["spotted"].psnr_y == float("inf")


def test_only_the_best_values_are_marked(pairs: list[Pair]) -> None:
    rows = comparison_report.rows(compare(pairs[:2], METHODS, scale=4, metrics=OptionalMetrics()))
    assert [(row.label, row.best) for row in rows] == [
        ("bicubic", (False,) * len(rows[0].cells)),
        ("exact", (True,) * len(rows[0].cells)),
        ("spotted", (False,) * len(rows[0].cells)),
    ]


def test_lower_is_better_where_it_is(pairs: list[Pair]) -> None:
    metrics = OptionalMetrics(paired={"lpips": lambda sr, hr: (sr - hr).abs().mean().item()})
    found = compare(pairs, METHODS, scale=4, metrics=metrics)
    place = [column.name for column in comparison_report.measured(found)].index("lpips")
    assert [row.best[place] for row in comparison_report.rows(found)] == [False, True, False]


def test_originals_are_scored_by_metrics_that_need_no_original(pairs: list[Pair]) -> None:
    values = iter([1.0, None] + [1.0] * 10)
    metrics = OptionalMetrics(single={"niqe": lambda image: next(values)}, no_value={"niqe": "flat"})
    found = compare(pairs, METHODS[:1], scale=4, metrics=metrics)
    assert [image.original["niqe"] for image in found.images] == [None, 1.0, 1.0]
    assert found.original == {"niqe": None}
    assert found.means["bicubic"].niqe == 1.0
    assert found.missing["niqe"] is None
    assert comparison_report.rows(found)[-1].cells[-2:] == ("-", "-")


def test_a_result_of_another_size_names_method_and_pair(pairs: list[Pair]) -> None:
    wrong = Method("wrong", lambda _, lr: lr, "wrong")
    with pytest.raises(ValueError, match=r"wrong: the result of .*a\.png must be as large as .*: 192x128 .* got 48x32"):
        compare(pairs, [wrong], scale=4, metrics=OptionalMetrics())


def test_the_scale_is_that_of_the_files(pairs: list[Pair]) -> None:
    assert comparison.common_scale(pairs) == 4
    Image.new("RGB", (96, 65)).save(pairs[0].hr)
    with pytest.raises(ValueError, match="must be 2 times as large"):
        comparison.common_scale(pairs)


def test_a_page_escapes_labels_and_names(pairs: list[Pair]) -> None:
    method = Method("<b>&", lambda _, lr: nearest(lr), "x")
    found = compare(
        [Pair(pairs[0].lr, pairs[0].hr, "<i>caf\udce9")], [method], scale=4, metrics=OptionalMetrics(), crops=1
    )
    page = comparison_report.to_html(found, Path("<u>"), Path("hr")).decode()
    for raw in ("<b>&", "<i>caf", "<u>"):
        assert raw not in page
    assert "&lt;b&gt;&amp;" in page
    assert r"&lt;i&gt;caf\udce9" in page
