"""Photographs of an analysis: their crops, their choice and their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from savl.analysis.photographs import distinct_names, evenly_spaced, read_centre, read_crops
from savl.images.folder import read_rgb


@pytest.fixture
def quarters(tmp_path: Path) -> Path:
    """Write an image of 128×128 pixels whose quarters have different grays."""
    pixels = np.kron(np.asarray([[40, 80], [120, 160]], np.uint8), np.ones((64, 64), np.uint8))
    Image.fromarray(pixels).save(tmp_path / "quarters.png")
    return tmp_path / "quarters.png"


def test_crops_do_not_overlap_if_the_photograph_is_large_enough(quarters: Path) -> None:
    z = read_crops(quarters, crops=4, side=16, scale=4, seed=(0,))
    assert z is not None
    assert z.shape == (4, 3, 16, 16)
    assert z.std(dim=(1, 2, 3)).max() < 0.01
    assert sorted((255 * z.mean(dim=(1, 2, 3))).round().int().tolist()) == [40, 80, 120, 160]


def test_crops_overlap_by_at_most_half_and_are_all_different(quarters: Path) -> None:
    z = read_crops(quarters, crops=50, side=16, scale=4, seed=(0,))
    assert z is not None
    assert len(z) == 9
    assert len({tuple(crop.flatten().tolist()) for crop in z}) == 9


def test_positions_depend_on_the_seed(quarters: Path) -> None:
    drawn = {
        tuple((255 * z.mean(dim=(1, 2, 3))).round().int().tolist())
        for seed in range(8)
        if (z := read_crops(quarters, crops=2, side=16, scale=4, seed=(seed,))) is not None
    }
    assert len(drawn) > 2
    again = [read_crops(quarters, crops=2, side=16, scale=4, seed=(3,)) for _ in range(2)]
    assert again[0] is not None
    assert again[1] is not None
    assert torch.equal(again[0], again[1])


def test_a_photograph_smaller_than_a_crop_gives_none(photographs: Callable[..., list[Path]]) -> None:
    (path,) = photographs(1, height=63, width=200)
    assert read_crops(path, crops=2, side=16, scale=4, seed=(0,)) is None


def test_paths_are_taken_evenly() -> None:
    paths = [Path(str(number)) for number in range(10)]
    assert evenly_spaced(paths, 3) == [paths[0], paths[4], paths[9]]
    assert evenly_spaced(paths, 10) == evenly_spaced(paths, 99) == paths
    assert evenly_spaced(paths, 1) == paths[:1]


def test_large_photographs_are_cut_to_their_middle(photographs: Callable[..., list[Path]]) -> None:
    (path,) = photographs(1, height=50, width=63)
    x = read_rgb(path)
    assert torch.equal(read_centre(path, 100, 4), x[:, :48, :60]), "as severity_agreement cuts them"
    assert torch.equal(read_centre(path, 20, 4), x[:, 15:35, 21:41])


def test_names_are_as_long_as_needed_to_distinguish_files() -> None:
    paths = [Path(text) for text in ("/a/x/1.png", "/a/y/1.png", "/b/y/1.png", "2.png", "/c/3.png", "/c/3.jpg")]
    assert distinct_names(paths) == ["x/1.png", "a/y/1.png", "b/y/1.png", "2", "3.png", "3.jpg"]
    assert distinct_names(paths[3:5], suffix=True) == ["2.png", "3.png"]
    assert distinct_names(paths[:2], folder=True) == ["x/1.png", "y/1.png"]


def test_a_file_that_is_named_twice_keeps_its_name() -> None:
    assert distinct_names([Path("/a/1.png")] * 2) == ["1", "1"]
    assert distinct_names([Path("/1.png"), Path("1.png")]) == ["/1.png", "1.png"]
    assert distinct_names([]) == []


def test_invalid_utf_8_in_names_is_escaped() -> None:
    assert distinct_names([Path("caf\udce9.png")]) == ["caf\\udce9"]
