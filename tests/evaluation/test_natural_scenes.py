"""NIQE and BRISQUE: fits of distributions, files of statistics, and the order of images of known quality."""

from __future__ import annotations

import importlib.util
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from savl.evaluation import Brisque, MetricUnavailable, Niqe
from savl.evaluation import natural_scenes as scenes


def texture(seed: int, side: int = 288) -> Tensor:
    """A colourless texture whose spectrum falls with the frequency, as that of photographs does: (3, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.fft.rfft2(torch.randn(side, side, generator=generator))
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None]).clamp_min(1 / side)
    image = torch.fft.irfft2(waves / frequency, s=(side, side))
    return (0.5 + 0.15 * image / image.std()).clamp(0, 1).expand(3, -1, -1)


def blurred(image: Tensor, sigma: float) -> Tensor:
    offsets = torch.arange(-8, 9).float()
    window = (-(offsets**2) / (2 * sigma**2)).exp()
    window /= window.sum()
    padded = F.pad(image[:, None], (8, 8, 8, 8), mode="reflect")
    return F.conv2d(F.conv2d(padded, window[None, None, None]), window[None, None, :, None])[:, 0]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub; packages that carry statistics are hidden."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    find_spec = importlib.util.find_spec
    hidden = ("basicsr", "brisque")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find_spec(name))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def fitted_to_textures(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write statistics of textures into the cache, which are made by scoring against zeros."""
    path = hub / "checkpoints" / "niqe_pris_params.npz"
    np.savez(path, mu_pris_param=np.zeros((1, 36)), cov_pris_param=np.eye(36), gaussian_window=np.eye(7))
    blocks = []
    stack = torch.stack

    def spy(features: list[Tensor], dim: int) -> Tensor:
        blocks.append(stack(features, dim=dim))
        return blocks[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "stack", spy)
        for seed in range(8):
            Niqe()(texture(seed))
    found = torch.cat(blocks)
    assert found.shape == (8 * 9, 36)
    np.savez(path, mu_pris_param=found.mean(dim=0)[None], cov_pris_param=torch.cov(found.T), gaussian_window=np.eye(7))
    return path


def test_niqe_grows_with_blur_and_noise(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted_to_textures(hub, monkeypatch)
    niqe, image = Niqe(), texture(100)
    noise = 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    sharp, soft, softer, noisy = (niqe(each) for each in (image, blurred(image, 1), blurred(image, 2), image + noise))
    assert sharp < soft < softer
    assert sharp < noisy


def test_niqe_reads_the_cache_of_pyiqa(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    path = fitted_to_textures(hub, monkeypatch)
    expected = Niqe()(texture(100))
    statistics = np.load(path)
    path.unlink()
    (hub / "pyiqa").mkdir()
    savemat(
        hub / "pyiqa" / "niqe_modelparameters.mat",
        {"mu_prisparam": statistics["mu_pris_param"], "cov_prisparam": statistics["cov_pris_param"]},
    )
    assert Niqe()(texture(100)) == pytest.approx(expected)


def test_small_and_flat_images_have_no_niqe(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted_to_textures(hub, monkeypatch)
    niqe = Niqe()
    assert niqe(texture(0)[:, :191, :191]) is None  # one block
    assert niqe(texture(0)[:, :191, :192]) is not None
    assert niqe(torch.full((3, 288, 288), 0.5)) is None


def test_missing_statistics_are_reported_with_what_to_do(hub: Path) -> None:
    with pytest.raises(MetricUnavailable, match=r"put niqe_pris_params\.npz of BasicSR into .*checkpoints") as caught:
        Niqe()
    assert str(hub) not in caught.value.reason


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no file of NumPy"])
def test_damaged_statistics_are_reported(hub: Path, content: bytes) -> None:
    path = hub / "checkpoints" / "niqe_pris_params.npz"
    path.write_bytes(content)
    with pytest.raises(MetricUnavailable, match=str(path)) as caught:
        Niqe()
    assert caught.value.reason == "niqe_pris_params.npz cannot be read"


def test_fits_find_the_parameters_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 400, 400, generator=generator, dtype=torch.float64)
    laplace = torch.empty(1, 400, 400, dtype=torch.float64).exponential_(generator=generator) * normal.sign()
    two_sided = torch.where(normal < 0, 3 * normal, normal)
    for values, alpha, left, right in (
        (normal, 2, 1, 1),
        (laplace, 1, math.sqrt(2), math.sqrt(2)),
        (two_sided, None, 3, 1),
    ):
        found = [value.item() for value in scenes._asymmetric(values)]
        assert found[1:] == pytest.approx([left, right], rel=0.02)
        if alpha is not None:
            assert found[0] == pytest.approx(alpha, rel=0.02)


def test_half_size_mirrors_the_border() -> None:
    ramp = torch.arange(16.0, dtype=torch.float64).expand(12, -1)
    half = scenes._halved(ramp)
    assert half.shape == (6, 8)
    assert half[:, 2:-2] == pytest.approx(ramp[:6, 4:-4].unfold(1, 2, 2).mean(dim=2))
    constant = torch.full((10, 10), 7.0, dtype=torch.float64)
    assert scenes._halved(constant) == pytest.approx(torch.full((5, 5), 7.0, dtype=torch.float64))


def carry_model(folder: Path, monkeypatch: pytest.MonkeyPatch, *, ranges: object, svm: str) -> None:
    """Make a package `brisque` that carries a model."""
    (folder / "brisque" / "models").mkdir(parents=True)
    (folder / "brisque" / "__init__.py").write_text("raise ImportError('the package must not be imported')")
    (folder / "brisque" / "models" / "normalize.pickle").write_bytes(pickle.dumps(ranges))
    (folder / "brisque" / "models" / "svm.txt").write_text(svm)
    monkeypatch.syspath_prepend(folder)


HEAD = "svm_type epsilon_svr\nkernel_type rbf\ngamma 0.5\nnr_class 2\ntotal_sv 2\nrho -3\nSV\n"
RANGES = {"min_": [0.0] * 36, "max_": [1.0] * 36}


def test_brisque_evaluates_the_model_without_importing_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry_model(tmp_path, monkeypatch, ranges=RANGES, svm=HEAD + "10 1:1 36:-1\n-2\n")
    asked: list[Tensor] = []
    cat = torch.cat

    def spy(tensors: list[Tensor], dim: int = 0) -> Tensor:
        asked.append(cat(tensors, dim=dim))
        return asked[-1]

    monkeypatch.setattr(torch, "cat", spy)
    score = Brisque()(texture(0, 64))
    (features,) = (each for each in asked if each.shape == (36,))
    scaled = 2 * features - 1
    first = torch.zeros(36, dtype=torch.float64)
    first[0], first[35] = 1, -1
    expected = 10 * math.exp(-0.5 * (first - scaled).square().sum()) - 2 * math.exp(-0.5 * scaled.square().sum()) + 3
    assert score == pytest.approx(expected)


def test_brisque_has_no_value_for_small_and_flat_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carry_model(tmp_path, monkeypatch, ranges=RANGES, svm=HEAD + "10 1:1\n")
    brisque = Brisque()
    assert brisque(texture(0, 16)) is not None
    assert brisque(texture(0, 15)) is None
    assert brisque(torch.zeros(3, 64, 64)) is None


@pytest.mark.parametrize(
    ("ranges", "svm", "fragment"),
    [
        (RANGES, HEAD.replace("rbf", "linear"), "kernel linear"),
        (RANGES, "", "KeyError"),
        ({"min_": [0.0], "max_": [1.0]}, HEAD, "36 features"),
        (Path("code"), HEAD, "is not a plain value"),
    ],
)
def test_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: object, svm: str, fragment: str
) -> None:
    carry_model(tmp_path, monkeypatch, ranges=ranges, svm=svm)
    with pytest.raises(MetricUnavailable, match=fragment) as caught:
        Brisque()
    assert caught.value.reason == "the model of the package brisque cannot be read"


def test_without_the_package_brisque_the_error_says_how_to_install_it(hub: Path) -> None:
    with pytest.raises(MetricUnavailable, match="pip install --no-deps brisque"):
        Brisque()


@pytest.mark.skipif(importlib.util.find_spec("brisque") is None, reason="the package brisque is not installed")
def test_the_model_of_the_package_gives_the_scores_of_the_package() -> None:
    # Computed by brisque 0.2.0 with its conversion to float repaired, opencv-python-headless 5.0 and scikit-image 0.26.
    brisque, image = Brisque(), texture(3, 160)
    assert [brisque(each) for each in (image, blurred(image, 1), blurred(image, 2))] == pytest.approx(
        PACKAGE_SCORES, abs=0.5
    )


PACKAGE_SCORES = [39.82, 42.87, 62.61]
