"""Matching and scoring folders of pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import savl
from savl.evaluation import evaluate_pair, match_pairs
from savl.images.format import PNG
from savl.images.result_mark import DEGRADED, SEVERITY_MAP
from savl.images.write import write_image
from savl.network import SAVLConfig


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    random = np.random.default_rng(0)
    for side, folder in ((8, "lr"), (32, "hr")):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{name}.png")
    return tmp_path / "lr", tmp_path / "hr"


def upscaler() -> savl.Upscaler:
    config = SAVLConfig(
        channels=6, depths=(1,), heads=1, window=4, cab_compress=3, cab_squeeze=3, upsampler="pixelshuffledirect",
        image_residual=True, degradation_code="none",
    )  # fmt: skip
    return savl.Upscaler(savl.build(config))


def test_pairs_match_by_name_whatever_the_format(folders: tuple[Path, Path]) -> None:
    lr, hr = folders
    Image.open(hr / "a.png").save(hr / "a.webp", lossless=True)
    (hr / "a.png").unlink()
    assert [(pair.lr.name, pair.hr.name) for pair in match_pairs(lr, hr)] == [("a.png", "a.webp"), ("b.png", "b.png")]


def test_names_on_one_side_only_are_listed(folders: tuple[Path, Path]) -> None:
    lr, hr = folders
    (hr / "a.png").rename(hr / "c.png")
    with pytest.raises(ValueError, match=r"a \(only in lr\), c \(only in hr\)"):
        match_pairs(lr, hr)


def test_two_images_of_one_name_are_refused(folders: tuple[Path, Path]) -> None:
    lr, hr = folders
    Image.open(lr / "a.png").save(lr / "a.webp")
    with pytest.raises(ValueError, match="several images named a"):
        match_pairs(lr, hr)


def test_severity_maps_beside_pictures_are_left_out(folders: tuple[Path, Path]) -> None:
    lr, hr = folders
    grey = np.full((8, 8, 3), 90, np.uint8)
    write_image(lr / "map of a.png", grey, image_format=PNG, mark=SEVERITY_MAP)  # known by its mark
    Image.fromarray(grey).save(lr / "b_severity.png")  # by its name
    left_out: list[Path] = []
    assert [pair.lr.name for pair in match_pairs(lr, hr, on_map=left_out.append)] == ["a.png", "b.png"]
    assert sorted(path.name for path in left_out) == ["b_severity.png", "map of a.png"]


def test_an_image_that_is_only_named_like_a_map_is_a_pair(folders: tuple[Path, Path]) -> None:
    lr, hr = folders
    for folder in folders:  # both sides have it
        Image.open(folder / "a.png").save(folder / "a_severity.png")
    write_image(lr / "a_severity.png", np.zeros((8, 8, 3), np.uint8), image_format=PNG, overwrite=True, mark=DEGRADED)
    assert [pair.lr.stem for pair in match_pairs(lr, hr)] == ["a", "a_severity", "b"]
    (hr / "a_severity.png").unlink()
    with pytest.raises(ValueError, match=r"a_severity \(only in lr\)"):  # the mark says that it is a picture
        match_pairs(lr, hr)


def test_folders_with_severity_maps_only_have_no_pairs(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        for name in ("a.png", "b.png"):
            grey = np.zeros((8, 8, 3), np.uint8)
            write_image(folder / name, grey, image_format=PNG, overwrite=True, mark=SEVERITY_MAP)
    with pytest.raises(ValueError, match="nothing but severity maps"):
        match_pairs(*folders)


def test_a_fresh_network_with_an_image_residual_scores_as_bicubic_does(folders: tuple[Path, Path]) -> None:
    scores = evaluate_pair(match_pairs(*folders)[0], upscaler())
    assert scores.name == "a"
    assert scores.model == scores.bicubic
    assert scores.model.lpips is None


def test_lpips_compares_both_images_with_the_original(folders: tuple[Path, Path]) -> None:
    asked = []

    def lpips(sr: torch.Tensor, hr: torch.Tensor) -> float:
        asked.append((sr, hr))
        return float(len(asked))

    pair = match_pairs(*folders)[0]
    scores = evaluate_pair(pair, upscaler(), lpips=lpips)
    assert {scores.model.lpips, scores.bicubic.lpips} == {1.0, 2.0}
    original = torch.from_numpy(np.array(Image.open(pair.hr))).permute(2, 0, 1) / 255
    assert all(torch.equal(hr, original) and sr.shape == hr.shape for sr, hr in asked)


def test_a_wrong_ratio_of_sizes_is_reported(folders: tuple[Path, Path]) -> None:
    lr, hr = folders
    Image.new("RGB", (32, 28)).save(hr / "a.png")
    with pytest.raises(ValueError, match="must be 4 times as large as .*a.png: 32x32 pixels, got 32x28"):
        evaluate_pair(match_pairs(lr, hr)[0], upscaler())


def test_a_missing_folder_is_reported(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="hr: .*nowhere is not a folder"):
        match_pairs(folders[0], "nowhere")
