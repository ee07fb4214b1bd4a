"""Training pairs: patches, batches, the cache of decoded images, and errors about images."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from savl.degradation import Degradation, DegradationConfig, Degraded, bicubic_downsample
from savl.degradation.config import CameraConfig, NoiseConfig, SingleConfig, SpatialConfig
from savl.images.errors import ImageFileError
from savl.images.folder import decode_rgb
from savl.images.result_mark import DEGRADED, SEVERITY_MAP, UPSCALED, add_mark
from savl.training import patches as patches_module
from savl.training.data import PairPool
from savl.training.data_config import DataConfig
from savl.training.patches import PatchSource


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, size in (("a.png", (42, 60)), ("more/b.jpg", (70, 50)), ("small.png", (20, 90))):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


LIGHT = DegradationConfig(strength=(0.0, 0.5))


def pool(
    folder: Path, *, seed: int = 7, rank: int = 0, degradation: DegradationConfig = LIGHT, **changes: object
) -> PairPool:
    settings = DataConfig(**{"patch": 8, "batch": 3, "margin": 1, "pool": 6, "fresh": 2, **changes})  # type: ignore[arg-type]
    patches = PatchSource([folder], (settings.patch + 2 * settings.margin) * 4)
    return PairPool(patches, Degradation(degradation), settings, seed=seed, rank=rank)


def test_a_batch_has_matching_pairs_in_the_unit_range(photographs: Path) -> None:
    batch = pool(photographs)(0)
    assert batch.x.shape == (3, 3, 32, 32)
    assert batch.y.shape == batch.z.shape == (3, 3, 8, 8)
    for image in (batch.x, batch.y, batch.z):
        assert image.dtype == torch.float32
        assert 0 <= image.min() <= image.max() <= 1
    assert torch.equal(batch.z, bicubic_downsample(batch.x, 4))


def test_the_high_resolution_images_are_the_targets_of_the_degradation(photographs: Path) -> None:
    soft, plain = (
        pool(photographs, degradation=DegradationConfig(camera=CameraConfig(probability=1.0, soft_target=target)))(0)
        for target in (True, False)
    )
    assert torch.equal(soft.y, plain.y)
    assert soft.x.std() < 0.9 * plain.x.std(), "the images are noise, which a blur weakens"
    assert torch.equal(soft.z, bicubic_downsample(soft.x, 4))


def test_patches_are_rotated_and_mirrored_crops_of_the_images(photographs: Path) -> None:
    pixels = [decode_rgb(photographs / name) for name in ("a.png", "more/b.jpg")]
    cuts = {
        np.ascontiguousarray(variant).tobytes()
        for image in pixels
        for top in range(image.shape[0] - 31)
        for left in range(image.shape[1] - 31)
        for turn in range(4)
        for variant in _mirrored(np.rot90(image[top : top + 32, left : left + 32], turn))
    }
    batch = pool(photographs, batch=12, pool=12)(5)
    drawn = [(x * 255).round().byte().permute(1, 2, 0).numpy().tobytes() for x in batch.x]
    assert all(cut in cuts for cut in drawn)
    assert len(set(drawn)) > 6


def _mirrored(cut: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return cut, cut[:, ::-1]


def test_low_and_high_resolution_show_the_same_place(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(120.0), 0.7 * np.arange(160.0))[..., None] * np.array([0.6, 0.5, 0.4])
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "ramp.png")
    nothing = DegradationConfig(strength=(0.0, 0.0))
    settings = DataConfig(patch=8, batch=12, margin=2, pool=12, fresh=4)
    pairs = PairPool(PatchSource([tmp_path], 48), Degradation(nothing), settings, seed=0)(3)
    # One LR pixel is a step of 1.1 to 1.7 of 255 along each axis: a shift by one would stand out.
    assert (pairs.y - pairs.z).abs().mean() * 255 < 0.8


def test_a_batch_depends_on_seed_rank_and_step_alone(photographs: Path) -> None:
    first, second = pool(photographs), pool(photographs)
    for step in range(3):
        second(step)
    resumed, went_on = first(3), second(3)
    assert torch.equal(resumed.y, went_on.y)
    assert torch.equal(resumed.x, went_on.x)
    assert not torch.equal(resumed.x, first(4).x)
    assert not torch.equal(resumed.x, pool(photographs, seed=8)(3).x)
    assert not torch.equal(resumed.x, pool(photographs, rank=1)(3).x)


def test_the_oldest_pairs_leave_the_pool(photographs: Path) -> None:
    pairs = pool(photographs, batch=6)  # a batch of the whole pool
    seen = [{image.sort().values.numpy().tobytes() for image in pairs(step).x.flatten(1)} for step in range(4)]
    assert len(seen[0]) == 6
    assert len(seen[0] & seen[1]) == 4
    assert len(seen[0] & seen[2]) == 2
    assert not seen[0] & seen[3]


def test_images_of_one_recipe_are_consecutive_and_cropped_and_rotated_in_the_same_way(photographs: Path) -> None:
    wave = DegradationConfig(spatial=SpatialConfig(probability=1.0))
    settings = DataConfig(patch=8, batch=6, margin=1, pool=12, fresh=6, images_per_recipe=3)
    pairs = PairPool(PatchSource([photographs], 40), Degradation(wave), settings, seed=3)
    several = 0
    for step in range(6):
        batch = pairs(step)
        assert batch.images_per_recipe == 3
        assert batch.degradation_mask is not None
        by_recipe = batch.degradation_mask.unflatten(0, (2, 3))
        assert torch.equal(by_recipe, by_recipe[:, :1].expand_as(by_recipe)), "one mask, one place, one turn"
        assert len({image.numpy().tobytes() for image in batch.x}) == 6
        several += not torch.equal(by_recipe[0], by_recipe[1])
        assert batch.to(torch.device("cpu")).images_per_recipe == 3
    assert several == 6


def test_the_amounts_of_single_operations_are_those_of_the_image(photographs: Path) -> None:
    single = SingleConfig(operations=("noise",), noise=NoiseConfig(sigma=(2.0, 30.0), gaussian_probability=1.0))
    config = DegradationConfig(single_operation=1.0, single=single)
    settings = DataConfig(patch=8, batch=12, margin=1, pool=12, fresh=4, images_per_recipe=2)
    batch = PairPool(PatchSource([photographs], 40), Degradation(config), settings, seed=3)(2)
    assert batch.amounts is not None
    assert batch.amounts.shape == (12, 3)
    assert torch.equal(batch.amounts[::2], batch.amounts[1::2]), "one recipe"
    assert torch.count_nonzero(batch.amounts[:, [0, 2]]) == 0
    noise = 255 * (batch.y - batch.z).flatten(1).std(dim=1)
    assert np.corrcoef(noise.numpy(), batch.amounts[:, 1].numpy())[0, 1] > 0.9, "the amounts follow their images"
    unknown = PairPool(PatchSource([photographs], 40), Degradation(DegradationConfig()), settings, seed=3)(2)
    assert unknown.amounts is not None
    assert unknown.amounts.isnan().all()


def test_images_of_one_recipe_are_their_own_originals_degraded(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(120.0), 0.7 * np.arange(160.0))[..., None] * np.array([0.6, 0.5, 0.4])
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "ramp.png")
    nothing = DegradationConfig(strength=(0.0, 0.0))
    settings = DataConfig(patch=8, batch=12, margin=2, pool=12, fresh=6, images_per_recipe=3)
    pairs = PairPool(PatchSource([tmp_path], 48), Degradation(nothing), settings, seed=0)(3)
    assert (pairs.y - pairs.z).abs().mean() * 255 < 0.8
    assert (pairs.y - pairs.z.roll(1, dims=0)).abs().mean() * 255 > 3, "the comparison must notice other images"


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # as of processes that were aborted
def test_worker_processes_make_the_same_pairs_as_this_process(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pool_of(workers: int) -> PairPool:
        # Workers have one thread each, as this process has (conftest.py), so that sums are rounded equally.
        settings = DataConfig(
            cache=str(tmp_path / "cache"), patch=8, batch=3, margin=1, pool=6, fresh=2, workers=workers
        )
        patches = PatchSource([photographs], 40, None, settings.cache)
        return PairPool(patches, Degradation(DegradationConfig()), settings, seed=7)

    here, workers = pool_of(0), pool_of(2)
    for step in (0, 1, 9):
        if step == 9:
            assert multiprocessing.active_children()
            workers.close()
            assert not multiprocessing.active_children()
            monkeypatch.setattr(workers._groups, "_workers", 1)  # one is enough to show that new ones start
        ours, theirs = here(step), workers(step)
        assert torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.y, theirs.y)
        assert torch.equal(ours.degradation_mask, theirs.degradation_mask)  # type: ignore[arg-type]
    workers.close()
    here.close()  # does nothing


def test_worker_processes_use_the_images_of_this_process(
    photographs: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the folder has changed since, and in another working directory."""
    monkeypatch.chdir(tmp_path)
    here = PatchSource([Path("photographs")], 40, None, "cache")
    decoded.clear()
    content = pickle.dumps(here)
    assert len(content) < 10_000, "no pixels in it"
    (photographs / "b.png").write_bytes((photographs / "a.png").read_bytes())
    (photographs / "more").rename(tmp_path / "elsewhere")
    monkeypatch.chdir("/")
    there = pickle.loads(content)
    assert not decoded
    ours, theirs = (source(6, np.random.default_rng(0)) for source in (here, there))
    assert torch.equal(ours, theirs)
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    with pytest.raises(OSError, match="data.cache: .* is missing or damaged"):
        pickle.loads(content)


def test_a_pickled_source_without_a_cache_contains_its_pixels(photographs: Path) -> None:
    here = PatchSource([photographs], 40)
    there = pickle.loads(pickle.dumps(here))
    assert torch.equal(here(3, np.random.default_rng(0)), there(3, np.random.default_rng(0)))


@pytest.mark.parametrize(("degrade_on", "expected"), [("auto", "meta"), ("cpu", "cpu")])
def test_images_are_degraded_on_the_device_of_the_settings(
    photographs: Path, monkeypatch: pytest.MonkeyPatch, degrade_on: str, expected: str
) -> None:
    seen: list[str] = []

    def degrade(x: torch.Tensor, seed: int, images_per_recipe: int = 1) -> Degraded:
        seen.append(x.device.type)
        raise NotImplementedError

    settings = DataConfig(patch=8, batch=3, margin=1, pool=6, fresh=2, degrade_on=degrade_on)  # type: ignore[arg-type]
    degradation = Degradation(LIGHT)
    monkeypatch.setattr(Degradation, "__call__", lambda _, *arguments, **options: degrade(*arguments, **options))
    pairs = PairPool(PatchSource([photographs], 40), degradation, settings, seed=7, device=torch.device("meta"))
    with pytest.raises(NotImplementedError):
        pairs(0)
    assert seen == [expected]


def test_images_smaller_than_a_patch_are_left_out(photographs: Path) -> None:
    seen: list[tuple[int, int]] = []
    images = PatchSource([photographs], 32, lambda done, total: seen.append((done, total))).images
    assert len(images) == 2
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_images_that_savl_made_are_left_out_unless_they_are_asked_for(photographs: Path) -> None:
    pixels = np.asarray(Image.open(photographs / "a.png"))
    for name, mark in (("up.webp", UPSCALED), ("low.jpg", DEGRADED), ("more/map.webp", SEVERITY_MAP)):
        Image.fromarray(pixels).save(photographs / name, xmp=add_mark(None, mark))
    Image.fromarray(pixels).save(photographs / "named_x4.png")  # a result by its name alone is a photograph
    assert PatchSource([photographs], 32).excluded_results == 3
    assert len(PatchSource([photographs], 32).images) == 3
    everything = PatchSource([photographs], 32, include_results=True)
    assert (everything.excluded_results, len(everything.images)) == (0, 6)
    (photographs / "more" / "b.jpg").unlink()
    with pytest.raises(ValueError, match=r"data.hr: .* 1 images were made by savl.*--include-results"):
        PatchSource([photographs / "more"], 32)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded from here on."""
    names: list[str] = []

    def record(path: Path) -> np.ndarray:
        names.append(path.name)
        return decode_rgb(path)

    monkeypatch.setattr(patches_module, "decode_rgb", record)
    return names


def test_a_cache_has_the_same_images_and_is_written_once(photographs: Path, tmp_path: Path, decoded: list[str]) -> None:
    cache = tmp_path / "not" / "there yet"
    plain = PatchSource([photographs], 32)
    seen: list[tuple[int, int]] = []
    made = PatchSource([photographs], 32, lambda done, total: seen.append((done, total)), cache)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    del decoded[:]
    found = PatchSource([photographs], 32, lambda *_: pytest.fail("decoded again"), cache)
    assert not decoded
    for source in (made, found):
        assert source.too_small == plain.too_small == 1
        assert len(source.images) == len(plain.images)
        for image, expected in zip(source.images, plain.images, strict=True):
            assert image.dtype == np.uint8
            assert np.array_equal(image, expected)
        drawn = source(5, np.random.default_rng(1))
        assert torch.equal(drawn, plain(5, np.random.default_rng(1)))
    assert not made.images[0].flags.writeable, "what other processes read"
    assert [path.suffix for path in cache.iterdir()] == [".images"]


def test_a_cache_is_written_again_for_changed_images(photographs: Path, tmp_path: Path, decoded: list[str]) -> None:
    PatchSource([photographs], 32, cache=tmp_path / "cache")
    Image.new("RGB", (64, 64), (1, 2, 3)).save(photographs / "a.png")
    del decoded[:]
    images = PatchSource([photographs], 32, cache=tmp_path / "cache").images
    assert decoded == ["a.png", "b.jpg", "small.png"]
    assert (images[0] == (1, 2, 3)).all()


@pytest.mark.parametrize("spoil", [b"", b"short", None, b"x" * 40000, b"\xff" * 40000, bytes(48), bytes(100)])
def test_a_damaged_cache_is_written_again(
    photographs: Path, tmp_path: Path, decoded: list[str], spoil: bytes | None
) -> None:
    expected = PatchSource([photographs], 32).images
    PatchSource([photographs], 32, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[1:] if spoil is None else spoil)
    del decoded[:]
    images = PatchSource([photographs], 32, cache=tmp_path / "cache").images
    assert len(decoded) == 3
    assert all(np.array_equal(*pair) for pair in zip(images, expected, strict=True))


def test_images_that_cannot_be_decoded_leave_no_cache(photographs: Path, tmp_path: Path) -> None:
    (photographs / "c.png").write_bytes(b"no image")
    with pytest.raises(ImageFileError, match=r"c\.png"):
        PatchSource([photographs], 32, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_reported(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"data\.cache: .*file"):
        PatchSource([photographs], 32, cache=tmp_path / "file" / "cache")


def test_all_images_too_small_is_an_error_with_the_size_needed(photographs: Path) -> None:
    with pytest.raises(ValueError, match=r"none of the 3 images is at least 400 pixels .*data.patch"):
        PatchSource([photographs], 400)


def test_a_folder_without_images_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images"):
        PatchSource([tmp_path], 32)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        PatchSource([tmp_path / "nowhere"], 32)


def test_a_corrupt_image_is_reported(photographs: Path) -> None:
    (photographs / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    with pytest.raises(ImageFileError, match="broken.png: truncated or corrupt PNG"):
        PatchSource([photographs], 32)
