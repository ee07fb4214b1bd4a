"""Matching folders of pairs by name, and reading pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from savl.images.format import PNG
from savl.images.pairs import match_pairs, read_pair
from savl.images.result_mark import DEGRADED, SEVERITY_MAP, STRENGTH_MAP
from savl.images.write import write_image


def test_pairs_match_by_name_whatever_the_format(pair_folders: tuple[Path, Path]) -> None:
    lr, hr = pair_folders
    Image.open(hr / "a.png").save(hr / "a.webp", lossless=True)
    (hr / "a.png").unlink()
    assert [(pair.lr.name, pair.hr.name) for pair in match_pairs(lr, hr)] == [("a.png", "a.webp"), ("b.png", "b.png")]


def test_names_on_one_side_only_are_listed(pair_folders: tuple[Path, Path]) -> None:
    lr, hr = pair_folders
    (hr / "a.png").rename(hr / "c.png")
    with pytest.raises(ValueError, match=r"a \(only in lr\), c \(only in hr\)"):
        match_pairs(lr, hr)


def test_two_images_of_one_name_are_refused(pair_folders: tuple[Path, Path]) -> None:
    lr, hr = pair_folders
    Image.open(lr / "a.png").save(lr / "a.webp")
    with pytest.raises(ValueError, match="several images named a"):
        match_pairs(lr, hr)


def test_maps_beside_pictures_are_left_out(pair_folders: tuple[Path, Path]) -> None:
    lr, hr = pair_folders
    grey = np.full((8, 8, 3), 90, np.uint8)
    write_image(lr / "map of a.png", grey, image_format=PNG, mark=SEVERITY_MAP)  # known by its mark
    write_image(lr / "strength of a.png", grey, image_format=PNG, mark=STRENGTH_MAP)
    Image.fromarray(grey).save(lr / "b_severity.png")  # by its name
    Image.fromarray(grey).save(lr / "b_strength.png")
    left_out: list[Path] = []
    assert [pair.lr.name for pair in match_pairs(lr, hr, on_map=left_out.append)] == ["a.png", "b.png"]
    assert sorted(path.name for path in left_out) == [
        "b_severity.png",
        "b_strength.png",
        "map of a.png",
        "strength of a.png",
    ]


def test_an_image_that_is_only_named_like_a_map_is_a_pair(pair_folders: tuple[Path, Path]) -> None:
    lr, hr = pair_folders
    for folder in pair_folders:  # both sides have it
        Image.open(folder / "a.png").save(folder / "a_severity.png")
    write_image(lr / "a_severity.png", np.zeros((8, 8, 3), np.uint8), image_format=PNG, overwrite=True, mark=DEGRADED)
    assert [pair.lr.stem for pair in match_pairs(lr, hr)] == ["a", "a_severity", "b"]
    (hr / "a_severity.png").unlink()
    with pytest.raises(ValueError, match=r"a_severity \(only in lr\)"):  # the mark says that it is a picture
        match_pairs(lr, hr)


def test_folders_with_severity_maps_only_have_no_pairs(pair_folders: tuple[Path, Path]) -> None:
    for folder in pair_folders:
        for name in ("a.png", "b.png"):
            grey = np.zeros((8, 8, 3), np.uint8)
            write_image(folder / name, grey, image_format=PNG, overwrite=True, mark=SEVERITY_MAP)
    with pytest.raises(ValueError, match="nothing but maps of severity or strength"):
        match_pairs(*pair_folders)


def test_a_missing_folder_is_reported(pair_folders: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="hr: .*nowhere is not a folder"):
        match_pairs(pair_folders[0], "nowhere")


def test_a_wrong_ratio_of_sizes_is_reported(pair_folders: tuple[Path, Path]) -> None:
    lr, hr = pair_folders
    Image.new("RGB", (32, 28)).save(hr / "a.png")
    with pytest.raises(ValueError, match="must be 4 times as large as .*a.png: 32x32 pixels, got 32x28"):
        read_pair(match_pairs(lr, hr)[0], 4)


def named(folder: Path, *names: str) -> Path:
    """Return a folder of images with these names."""
    folder.mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize(
    ("lrs", "hrs", "expected"),
    [
        (["Canon_001_LR4", "Nikon_002_LR4"], ["Canon_001_HR", "Nikon_002_HR"], ["Canon_001", "Nikon_002"]),  # RealSR
        (["DSC_1_x4", "P1_x4"], ["DSC_1_x1", "P1_x1"], ["DSC_1", "P1"]),  # DRealSR
        (["0001x4", "0011x4"], ["0001", "0011"], ["0001", "0011"]),  # DIV2K
        (["Canon_001_LR4"], ["Canon_001_HR"], ["Canon_001"]),
        (["a_x4", "b_x4"], ["a_x4", "b_x4"], ["a_x4", "b_x4"]),
        (["a_LR-x4 new", "b_LR-x4 new"], ["a", "b"], ["a", "b"]),
        (["bx4", "x4"], ["bx4", "x4"], ["bx4", "x4"]),
    ],
)
def test_names_match_without_a_suffix_that_all_images_of_a_folder_share(
    tmp_path: Path, lrs: list[str], hrs: list[str], expected: list[str]
) -> None:
    pairs = match_pairs(named(tmp_path / "lr", *lrs), named(tmp_path / "hr", *hrs))
    assert [pair.name for pair in pairs] == expected
    assert [(pair.lr.stem, pair.hr.stem) for pair in pairs] == list(zip(lrs, hrs, strict=True))


@pytest.mark.parametrize(
    ("lrs", "hrs", "unmatched"),
    [
        (["a_1_LR", "a_2_LR"], ["a_1_HR", "a_3_HR"], r"a_2_LR \(only in lr\), a_3_HR \(only in hr\)"),
        (["photo_001"], ["photo_002"], "photo_001 .*, photo_002"),  # a number is no suffix
        (["Canon_001_LR"], ["Canon_002_HR"], "Canon_001_LR .*, Canon_002_HR"),
        (["a_x4", "b_x2"], ["a", "b"], "a .*, a_x4 .*, b .*, b_x2"),
    ],
)
def test_other_differences_of_names_are_refused(tmp_path: Path, lrs: list[str], hrs: list[str], unmatched: str) -> None:
    with pytest.raises(ValueError, match=f"unmatched: {unmatched}"):
        match_pairs(named(tmp_path / "lr", *lrs), named(tmp_path / "hr", *hrs))


def test_one_folder_may_contain_both_images_of_each_pair(tmp_path: Path) -> None:
    realsr = named(tmp_path / "V3", "Canon_001_HR", "Canon_001_LR4", "Canon_002_LR4", "Canon_002_HR")
    pairs = match_pairs(realsr, realsr)
    assert [(pair.lr.stem, pair.hr.stem) for pair in pairs] == [
        ("Canon_001_LR4", "Canon_001_HR"), ("Canon_002_LR4", "Canon_002_HR"),
    ]  # fmt: skip
    drealsr = named(tmp_path / "D", "P1_x1", "P1_x4")
    assert [(pair.lr.stem, pair.hr.stem) for pair in match_pairs(drealsr, drealsr)] == [("P1_x4", "P1_x1")]
    other = named(tmp_path / "other", "a", "b")
    with pytest.raises(ValueError, match="lr and hr are one folder, .*other; .* must end in LR, LR4, x4"):
        match_pairs(other, other)


def test_an_enlarged_image_is_reduced_if_that_is_asked_for(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for folder in ("lr", "hr"):
        (tmp_path / folder).mkdir()
        Image.fromarray(random.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(tmp_path / folder / "a.png")
    (pair,) = match_pairs(tmp_path / "lr", tmp_path / "hr")
    with pytest.raises(ValueError, match=r"160x128 pixels, got 40x32; .* has to be reduced \(set x.reduce_lr = true\)"):
        read_pair(pair, 4, remedy="set x.reduce_lr = true")
    with pytest.raises(ValueError, match="has to be reduced$"):
        read_pair(pair, 4)
    lr, hr = read_pair(pair, 4, reduce_lr=True)
    assert (lr.shape, hr.shape) == ((3, 8, 10), (3, 32, 40))
    assert (lr * 255 - (lr * 255).round()).abs().max() < 1e-4
    assert abs(float(lr.mean()) - np.asarray(Image.open(pair.lr)).mean() / 255) < 0.01
