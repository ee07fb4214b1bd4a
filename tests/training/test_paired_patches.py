"""Real pairs: their alignment, checks, patches, share of the pool, and what a run makes of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from savl.bicubic import bicubic_downsample
from savl.degradation import Degradation, DegradationConfig
from savl.images.result_mark import UPSCALED, add_mark
from savl.training import Trainer, TrainingConfig
from savl.training.alignment import measure_alignment
from savl.training.config import parse_config
from savl.training.data import PairPool
from savl.training.data_config import DataConfig, PairsConfig
from savl.training.paired_patches import PairedPatches
from savl.training.patches import PatchSource


def scene(seed: int, side: int = 96) -> Tensor:
    """Return an image of ``(3, side, side)`` with details of a few pixels."""
    noise = torch.rand(1, 3, side // 4 + 4, side // 4 + 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, scale_factor=4, mode="bicubic")[0, :, 8 : 8 + side, 8 : 8 + side].clamp(0.0, 1.0)


def photographed(hr: Tensor, down: int = 0, right: int = 0) -> Tensor:
    """Return a blurred LR image whose content is shifted by HR pixels."""
    moved = hr.roll((down, right), (1, 2))
    blurred = F.avg_pool2d(F.pad(moved[None], (1,) * 4, mode="replicate"), 3, 1)
    return bicubic_downsample(blurred, 4)[0]


def save(image: Tensor, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(path, **options)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """Three aligned pairs named as in RealSR."""
    for index in range(3):
        hr = scene(index)
        save(hr, tmp_path / "HR" / f"Canon_{index}_HR.png")
        save(photographed(hr), tmp_path / "LR" / f"Canon_{index}_LR4.png")
    return str(tmp_path / "LR"), str(tmp_path / "HR")


def pairs_of(folders: tuple[str, str], **changes: Any) -> PairsConfig:
    return PairsConfig(lr=(folders[0],), hr=(folders[1],), **changes)


@pytest.mark.parametrize(("down", "right"), [(0, 0), (2, 0), (-6, 10), (17, -23)])
def test_a_shift_is_measured_to_a_tenth_of_a_pixel(down: int, right: int) -> None:
    hr = scene(5, 192)
    lr = 0.8 * photographed(hr, down, right) + 0.1
    lr = lr + 0.01 * torch.randn(lr.shape, generator=torch.Generator().manual_seed(0))
    measured = measure_alignment(lr, hr, 4)
    assert measured.shift == pytest.approx((down / 4, right / 4), abs=0.1)
    assert measured.correlation > 0.8


def test_brightness_is_that_of_the_channel_that_differs_most() -> None:
    hr = scene(6)
    lr = photographed(hr) + torch.tensor([0.02, -0.07, 0.0])[:, None, None]
    measured = measure_alignment(lr, hr, 4)
    assert measured.brightness == pytest.approx(-0.07, abs=0.005)
    assert measured.shift == pytest.approx((0, 0), abs=0.1)


def test_other_scenes_do_not_correlate_and_flat_images_have_no_shift() -> None:
    assert measure_alignment(photographed(scene(1, 192)), scene(2, 192), 4).correlation < 0.4
    flat = measure_alignment(torch.full((3, 24, 24), 0.5), torch.full((3, 96, 96), 0.5), 4)
    assert flat.shift == (0, 0)
    assert np.isnan(flat.correlation)


def test_patches_show_the_same_place_of_both_images(folders: tuple[str, str]) -> None:
    source = PairedPatches(pairs_of(folders), 8, 4)
    lr, hr = source(6, 2, np.random.default_rng(0))
    assert (lr.shape, lr.dtype) == ((12, 3, 8, 8), torch.uint8)
    assert (hr.shape, hr.dtype) == ((12, 3, 32, 32), torch.uint8)
    z = bicubic_downsample(hr / 255.0, 4) * 255
    assert (lr - z).abs().mean() < 6
    assert (lr.roll(1, 3) - z).abs().mean() > 12, "the comparison must notice a shift by one pixel"
    assert len({patch.numpy().tobytes() for patch in hr}) == 12
    originals = [scene(index).mul(255).round().byte() for index in range(3)]
    of = [[_contains(original, patch) for original in originals].index(True) for patch in hr]
    assert of[::2] == of[1::2], "patches of one recipe are from one pair"
    assert set(of) == {0, 1, 2}


def _contains(image: Tensor, patch: Tensor) -> bool:
    windows = image.unfold(1, 32, 4).unfold(2, 32, 4)
    return bool((windows == patch[:, None, None]).all(dim=(0, 3, 4)).any())


def test_misregistration_shifts_originals_by_whole_pixels_within_the_image(tmp_path: Path) -> None:
    rows, columns = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    places = torch.stack((rows, columns, torch.zeros(96, 96))) / 255
    save(places, tmp_path / "HR" / "a.png")
    save(places[:, ::4, ::4], tmp_path / "LR" / "a.png")
    settings = PairsConfig(
        (str(tmp_path / "LR"),), (str(tmp_path / "HR"),), misregistration=2.0, min_correlation=-1.0, max_shift=99.0
    )
    lr, hr = PairedPatches(settings, 8, 4)(200, 2, np.random.default_rng(0))
    assert torch.equal(hr[:, :2, 31, 31], hr[:, :2, 0, 0] + 31), "patches are cut, not interpolated"
    corners = lr[:, :2, 0, 0].float()
    shifts = (hr[:, :2, 0, 0] - corners)[((corners > 8) & (corners < 56)).all(dim=1)]
    assert abs(shifts.mean()) < 0.4
    assert 1.7 < shifts.std() < 2.3
    assert len({tuple(shift) for shift in shifts.tolist()}) > 20


def test_unsuitable_pairs_are_skipped_by_name_or_refused(folders: tuple[str, str]) -> None:
    lr, hr = map(Path, folders)
    save(photographed(scene(0), 0, 8), lr / "Canon_0_LR4.png")
    save((photographed(scene(1)) + 0.1).clamp(0, 1), lr / "Canon_1_LR4.png")
    save(scene(9), hr / "Canon_9_HR.png")
    save(photographed(scene(3)), lr / "Canon_9_LR4.png")
    source = PairedPatches(pairs_of(folders), 8, 4)
    assert len(source) == 1
    first, second, third = source.unsuitable
    assert first.startswith("Canon_0 (the LR image is shifted by ")
    assert float(first.split()[-2]) == pytest.approx(2.0, abs=0.1)
    assert second.startswith("Canon_1 (the mean of a channel differs by +0.")
    assert third.startswith("Canon_9 (the details of its images have a correlation of ")
    assert len(PairedPatches(pairs_of(folders, max_shift=3.0, max_brightness=0.2), 8, 4)) == 3
    with pytest.raises(ValueError, match=r"pairs: 1 of 4 can be used; .* 3 are unsuitable: Canon_0 \(the LR image"):
        PairedPatches(pairs_of(folders, unsuitable="refuse"), 8, 4)
    with pytest.raises(ValueError, match="pairs: 0 of 4 can be used"):
        PairedPatches(pairs_of(folders, max_brightness=0.0), 8, 4)


def test_small_pairs_and_originals_made_by_savl_are_left_out(folders: tuple[str, str]) -> None:
    save(scene(0), Path(folders[1]) / "Canon_0_HR.png", exif=b"")
    Image.open(Path(folders[1]) / "Canon_0_HR.png").save(
        Path(folders[1]) / "Canon_0_HR.webp", lossless=True, xmp=add_mark(None, UPSCALED)
    )
    (Path(folders[1]) / "Canon_0_HR.png").unlink()
    save(scene(1, 24), Path(folders[1]) / "Canon_1_HR.png")
    save(photographed(scene(1, 24)), Path(folders[0]) / "Canon_1_LR4.png")
    source = PairedPatches(pairs_of(folders), 8, 4)
    assert (len(source), source.excluded_results, source.too_small) == (1, 1, 1)
    assert len(PairedPatches(pairs_of(folders), 8, 4, include_results=True)) == 2


def test_sizes_are_checked_and_enlarged_images_are_reduced_if_asked(folders: tuple[str, str]) -> None:
    lr, hr = map(Path, folders)
    save(scene(0, 92), hr / "Canon_0_HR.png")
    with pytest.raises(ValueError, match=r"pairs: .*Canon_0_HR.png must be 4 times .* 96x96 pixels, got 92x92$"):
        PairedPatches(pairs_of(folders), 8, 4)
    save(scene(0), hr / "Canon_0_HR.png")
    save(scene(0), lr / "Canon_0_LR4.png")
    with pytest.raises(ValueError, match=r"384x384 pixels, got 96x96; .*set pairs.reduce_lr = true"):
        PairedPatches(pairs_of(folders), 8, 4)
    source = PairedPatches(pairs_of(folders, reduce_lr=True), 8, 4)
    source._images = source._images[:1]
    source._weights = np.ones(1)
    low, high = source(20, 1, np.random.default_rng(0))
    whole = bicubic_downsample(scene(0)[None], 4)[0] * 255
    for patch, original in zip(low, high, strict=True):
        windows = whole.unfold(1, 8, 1).unfold(2, 8, 1)
        distance = (windows - patch[:, None, None]).abs().amax(dim=(0, 3, 4))
        assert distance.min() < 1.5, "a patch of the whole reduction, also at its border"
        z = bicubic_downsample(original[None] / 255, 4)[0] * 255
        assert (z - patch)[:, 2:6, 2:6].abs().max() < 1.5


def test_a_cache_and_a_copy_in_another_process_give_the_same_patches(folders: tuple[str, str], tmp_path: Path) -> None:
    plain = PairedPatches(pairs_of(folders), 8, 4)
    cached = PairedPatches(pairs_of(folders), 8, 4, None, tmp_path / "cache")
    content = pickle.dumps(cached)
    assert len(content) < 10_000, "no pixels in it"
    sources = [plain, cached, pickle.loads(content), pickle.loads(pickle.dumps(plain))]
    drawn = [source(4, 1, np.random.default_rng(3)) for source in sources]
    assert all(torch.equal(low, drawn[0][0]) and torch.equal(high, drawn[0][1]) for low, high in drawn)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1.0])
def test_the_share_of_the_pool_is_exact_to_one_recipe(folders: tuple[str, str], share: float) -> None:
    source = PairedPatches(pairs_of(folders, share=share), 8, 4)
    drawn = np.cumsum([source.recipes_of(group, 3) for group in range(50)])
    assert np.abs(drawn - share * 3 * np.arange(1, 51)).max() < 1 + 1e-6


def mixed(folders: tuple[str, str], share: float, workers: int = 0, cache: str = "") -> PairPool:
    settings = DataConfig(
        patch=8, batch=8, margin=1, pool=16, fresh=4, images_per_recipe=2, workers=workers, cache=cache
    )
    pairs = PairedPatches(pairs_of(folders, share=share), 8, 4, None, cache)
    photographs = PatchSource([folders[1]], 40, None, cache) if share < 1 else None
    degradation = Degradation(DegradationConfig(strength=(0.2, 0.5)))
    return PairPool(photographs, degradation, settings, seed=1, pairs=pairs)


def test_a_mixed_pool_marks_its_real_pairs_and_rotates_both_images_together(folders: tuple[str, str]) -> None:
    pool, counts = mixed(folders, 0.5), []
    for step in range(6):
        batch = pool(step)
        assert batch.real is not None
        assert batch.degradation_mask is not None
        assert batch.amounts is not None
        counts.append(int(batch.real.sum()))
        assert torch.equal(batch.real[::2], batch.real[1::2]), "whole recipes"
        assert not batch.degradation_mask[batch.real].any()
        assert batch.degradation_mask[~batch.real].amin(dim=(1, 2)).gt(0.19).all()
        assert batch.amounts[batch.real].isnan().all()
        difference = (batch.y - batch.z)[batch.real].abs()
        assert not difference.numel() or difference.mean() * 255 < 6
    assert set(counts) <= {0, 2, 4, 6, 8}
    assert 16 <= sum(counts) <= 32
    pool(5)
    assert pool._pool is not None
    assert pool._pool.real.float().mean() == 0.5
    alone = mixed(folders, 1.0)(0)
    assert alone.real is not None
    assert alone.real.all()
    assert alone.to(torch.device("cpu")).real is not None


def test_batches_of_a_mixture_depend_on_seed_and_step_alone_also_with_workers(
    folders: tuple[str, str], tmp_path: Path
) -> None:
    first, second = mixed(folders, 0.5), mixed(folders, 0.5, 1, str(tmp_path / "cache"))
    first(2)
    try:
        for ours, theirs in ((first(3), second(3)), (first(4), second(4))):
            for name in ("y", "x", "degradation_mask", "real"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    finally:
        second.close()


Configure = Callable[..., TrainingConfig]


@pytest.fixture
def configuration(folders: tuple[str, str], small_tables: dict[str, dict[str, Any]]) -> Configure:
    def configure(output: Path, share: float, **run: Any) -> TrainingConfig:
        return parse_config(
            {
                "model": small_tables["model"],
                "data": small_tables["data"]
                | {"batch": 4, "pool": 8, "fresh": 4, "images_per_recipe": 2, "hr": [folders[1]] if share < 1 else []},
                "pairs": {"lr": [folders[0]], "hr": [folders[1]], "share": share},
                "objective": {"calibration": 0.1, "contrast": 0.1, "content": 0.1, "dimensions": 0.1},
                "optimizer": {"warmup": 2, "ema": 0.9, "learning_rate": 2e-3},
                "run": {"log_every": 1, "output": str(output), **run},
            }
        )

    return configure


def test_training_on_pairs_alone_lowers_the_loss(configuration: Configure, tmp_path: Path) -> None:
    trainer = Trainer(configuration(tmp_path / "run", 1.0, steps=20, checkpoint_every=100))
    losses: list[dict[str, float]] = []
    trainer.train(lambda _, values: losses.append(values))
    assert np.mean([each["sr"] for each in losses[-5:]]) < 0.92 * np.mean([each["sr"] for each in losses[:5]])
    assert {each["calibration"] for each in losses} == {0.0}
    assert {each["contrast"] for each in losses} == {1.0}
    assert {each["content"] for each in losses} == {each["dimensions"] for each in losses} == {0.0}


def test_a_resumed_run_on_a_mixture_gives_the_same_weights(configuration: Configure, tmp_path: Path) -> None:
    whole = Trainer(configuration(tmp_path / "whole", 0.5, steps=4))
    losses: list[dict[str, float]] = []
    whole.train(lambda _, values: losses.append(values))
    assert all(each["calibration"] > 0 for each in losses)
    Trainer(configuration(tmp_path / "pieces", 0.5, steps=2)).train()
    resumed = Trainer(configuration(tmp_path / "pieces", 0.5, steps=4))
    assert resumed.step == 2
    resumed.train()
    weights = [trainer.unwrapped_objective.state_dict() for trainer in (whole, resumed)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    with pytest.raises(ValueError, match="pairs.share was 0.5 and is 0.25"):
        Trainer(configuration(tmp_path / "pieces", 0.25, steps=4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": ("a",)}, "pairs.lr and pairs.hr must hold the same number of folders, got 1 and 0"),
        ({"share": 0.0}, r"pairs.share must satisfy 0 < share <= 1, got 0.0"),
        ({"share": 1.5}, r"pairs.share must satisfy 0 < share <= 1, got 1.5"),
        ({"max_shift": -1.0}, "pairs.max_shift must be at least 0"),
        ({"misregistration": -1.0}, "pairs.misregistration must be at least 0"),
        ({"unsuitable": "drop"}, "pairs.unsuitable must be one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairsConfig(**settings)


def test_folders_that_do_not_match_are_refused(folders: tuple[str, str]) -> None:
    (Path(folders[0]) / "Canon_1_LR4.png").unlink()
    with pytest.raises(ValueError, match=r"pairs: .*unmatched: Canon_1_HR \(only in hr\)"):
        PairedPatches(pairs_of(folders), 8, 4)
