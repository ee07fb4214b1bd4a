"""Matching a folder of upscaled images with pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from savl.images.pairs import Pair, match_pairs, match_results


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    for number in ("001", "002"):
        save(tmp_path / "lr" / f"Canon_{number}_LR4.png")
        save(tmp_path / "hr" / f"Canon_{number}_HR.png")
    return match_pairs(tmp_path / "lr", tmp_path / "hr")


def save(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("L", (8, 8)).save(path)


@pytest.mark.parametrize("name", ["Canon_{}", "Canon_{}_LR4", "Canon_{}_HR", "Canon_{}_x4", "Canon_{}_LR4_out"])
def test_results_are_named_as_pairs_or_their_images_with_or_without_a_suffix(
    tmp_path: Path, pairs: list[Pair], name: str
) -> None:
    for number in ("002", "001"):
        save(tmp_path / "sr" / f"{name.format(number)}.png")
    found = match_results(pairs, tmp_path / "sr")
    assert {pair: path.stem for pair, path in found.items()} == {
        f"Canon_{number}": name.format(number) for number in ("001", "002")
    }


def test_severity_maps_are_skipped_and_other_images_reported(tmp_path: Path, pairs: list[Pair]) -> None:
    for name in ("Canon_001", "Canon_001_severity", "Canon_002", "Canon_003"):
        save(tmp_path / "sr" / f"{name}.png")
    extra: list[Path] = []
    assert len(match_results(pairs, tmp_path / "sr", on_extra=extra.append)) == 2
    assert [path.name for path in extra] == ["Canon_003.png"]


def test_missing_results_are_listed_with_the_names_that_are_there(tmp_path: Path, pairs: list[Pair]) -> None:
    for name in ("Canon_001", "Nikon_001"):
        save(tmp_path / "sr" / f"{name}.png")
    with pytest.raises(ValueError, match=r"results: .* no result named Canon_002; .* other names: Nikon_001"):
        match_results(pairs, tmp_path / "sr")


def test_two_results_of_one_name_are_refused(tmp_path: Path, pairs: list[Pair]) -> None:
    for name in ("Canon_001.png", "Canon_001.webp", "Canon_002.png"):
        save(tmp_path / "sr" / name)
    with pytest.raises(ValueError, match="--sr X: .* several images named Canon_001"):
        match_results(pairs, tmp_path / "sr", argument="--sr X")


def test_a_missing_folder_is_reported(tmp_path: Path, pairs: list[Pair]) -> None:
    with pytest.raises(ValueError, match=r"--sr X: .*nowhere is not a folder"):
        match_results(pairs, tmp_path / "nowhere", argument="--sr X")
