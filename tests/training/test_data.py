"""Training pairs: what is drawn, and what a user hears when the data cannot serve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from savl.degradation import LightDegradation
from savl.inference.errors import ImageFileError
from savl.inference.image_folder import decode_rgb
from savl.training.data import PatchSource


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, size in (("a.png", (40, 60)), ("more/b.jpg", (70, 50)), ("small.png", (20, 90))):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def source(folder: Path, **changes: object) -> PatchSource:
    settings: dict[str, object] = {"patch": 8, "batch": 3, "scale": 4, "seed": 7, "degradation": LightDegradation()}
    return PatchSource([folder], **{**settings, **changes})  # type: ignore[arg-type]


def test_a_batch_has_matching_pairs_in_the_unit_range(photographs: Path) -> None:
    batch = source(photographs)(0)
    assert batch.x.shape == (3, 3, 32, 32)
    assert batch.y.shape == batch.z.shape == (3, 3, 8, 8)
    for image in (batch.x, batch.y, batch.z):
        assert image.dtype == torch.float32
        assert 0 <= image.min() <= image.max() <= 1


def test_patches_are_turned_and_mirrored_cuts_of_the_images(photographs: Path) -> None:
    pixels = [decode_rgb(photographs / name) for name in ("a.png", "more/b.jpg")]
    cuts = {
        np.ascontiguousarray(variant).tobytes()
        for image in pixels
        for top in range(image.shape[0] - 31)
        for left in range(image.shape[1] - 31)
        for turn in range(4)
        for variant in _mirrored(np.rot90(image[top : top + 32, left : left + 32], turn))
    }
    batch = source(photographs, batch=12)(5)
    drawn = [(x * 255).round().byte().permute(1, 2, 0).numpy().tobytes() for x in batch.x]
    assert all(cut in cuts for cut in drawn)
    assert len(set(drawn)) > 6


def _mirrored(cut: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return cut, cut[:, ::-1]


def test_a_batch_depends_on_seed_and_step_alone(photographs: Path) -> None:
    first, second = source(photographs), source(photographs)
    second(0)
    assert torch.equal(first(3).y, second(3).y)
    assert not torch.equal(first(3).x, first(4).x)
    assert not torch.equal(first(3).x, source(photographs, seed=8)(3).x)


def test_images_smaller_than_a_patch_are_left_out(photographs: Path) -> None:
    seen: list[tuple[int, int]] = []
    images = source(photographs, on_image=lambda done, total: seen.append((done, total))).images
    assert len(images) == 2
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_all_images_too_small_is_an_error_with_the_size_needed(photographs: Path) -> None:
    with pytest.raises(ValueError, match="none of the 3 images is at least 400 pixels .* patch=100"):
        source(photographs, patch=100)


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images"):
        source(tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        source(tmp_path / "nowhere")


def test_a_corrupt_image_is_named(photographs: Path) -> None:
    (photographs / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    with pytest.raises(ImageFileError, match="broken.png: truncated or corrupt PNG"):
        source(photographs)
