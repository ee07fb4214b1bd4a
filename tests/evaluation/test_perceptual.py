"""LPIPS and DISTS with a stand-in for torchvision, which loads random weights by torch.hub as torchvision does."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torchmetrics.functional.image.dists as dists_module
import torchmetrics.functional.image.lpips as functional
import torchmetrics.image.lpip as metric
from torch import Tensor, nn

from savl.evaluation import Dists, Lpips, LpipsUnavailable, MetricUnavailable

URL = "https://weights.example/models/alexnet-standin-0123abcd.pth"


def features() -> nn.Sequential:
    """The part of AlexNet that LPIPS uses."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


def alexnet(*, weights: SimpleNamespace) -> SimpleNamespace:
    net = features()
    net.load_state_dict(torch.hub.load_state_dict_from_url(weights.url, weights_only=True))
    return SimpleNamespace(features=net)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide a torchvision and cached weights; a download fails the test."""
    models = ModuleType("torchvision.models")
    models.__dict__.update(alexnet=alexnet, AlexNet_Weights=SimpleNamespace(DEFAULT=SimpleNamespace(url=URL)))
    torchvision = ModuleType("torchvision")
    torchvision.__dict__.update(models=models)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    for module in (functional, metric):  # looked up once, when they were imported
        monkeypatch.setattr(module, "_TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("something was downloaded"))
    path = tmp_path / "checkpoints" / "alexnet-standin-0123abcd.pth"
    path.parent.mkdir()
    torch.manual_seed(0)
    torch.save(features().state_dict(), path)
    return path


def by_hand(path: Path, sr: Tensor, hr: Tensor) -> float:
    """Return the distance by the paper's formula, with the weights that torchmetrics ships."""
    net = features()
    net.load_state_dict(torch.load(path))
    heads = torch.load(Path(functional.__file__).parent / "lpips_models" / "alex.pth", map_location="cpu")
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = (((2 * image - 1) - shift[:, None, None]) / scale[:, None, None] for image in (sr, hr))
    total = 0.0
    relus = 0
    with torch.no_grad():
        for layer in net:
            a, b = layer(a), layer(b)
            if isinstance(layer, nn.ReLU):
                unit_a, unit_b = (image / image.norm(dim=0, keepdim=True).clamp_min(1e-4) for image in (a, b))
                head = heads[f"lin{relus}.model.1.weight"][0]
                total += (head * (unit_a - unit_b) ** 2).sum(dim=0).mean().item()
                relus += 1
    return total


def image(side: int = 64) -> Tensor:
    return torch.randint(0, 256, (3, side, side + 8), generator=torch.Generator().manual_seed(1)) / 255


def noise(strength: float) -> Tensor:
    return strength * torch.randn(image().shape, generator=torch.Generator().manual_seed(2))


def test_identical_images_are_at_distance_zero(cached: Path) -> None:
    assert Lpips()(image(), image()) == 0


def test_the_distance_grows_with_the_noise(cached: Path) -> None:
    lpips = Lpips()
    distances = [lpips(image() + noise(strength), image()) for strength in (0.02, 0.1, 0.5)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_the_distance_is_that_of_the_formula_on_values_from_minus_one_to_one(cached: Path) -> None:
    sr = ((image() + noise(0.2)).clamp(0, 1) * 255).round() / 255
    assert Lpips()(sr, image()) == pytest.approx(by_hand(cached, sr, image()), rel=1e-4)


def test_a_second_image_is_not_averaged_with_the_first(cached: Path) -> None:
    lpips = Lpips()
    assert lpips(image() + noise(0.5), image()) > 0
    assert lpips(image(), image()) == 0


def test_images_are_compared_as_the_8_bit_files_they_become(cached: Path) -> None:
    assert Lpips()(image() + 0.4 / 255, image()) == 0


def test_images_too_small_for_alexnet_have_no_distance(cached: Path) -> None:
    lpips = Lpips()
    assert lpips(image(31), image(31)) == 0
    assert lpips(image(30), image(30)) is None


def test_shapes_that_differ_are_reported(cached: Path) -> None:
    with pytest.raises(ValueError, match=r"got \(3, 64, 72\) and \(3, 65, 73\)"):
        Lpips()(image(64), image(65))


def test_without_torchvision_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LpipsUnavailable, match=r"install the torchvision made for torch .* python -c") as caught:
        Lpips()
    assert caught.value.reason == "torchvision is not installed"


def test_a_broken_torchvision_is_distinguished_from_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LpipsUnavailable, match=r"RuntimeError: operator torchvision::nms does not exist") as caught:
        Lpips()
    assert caught.value.reason == f"torchvision does not import beside torch {torch.__version__}"


def test_missing_weights_are_reported_and_not_downloaded(cached: Path) -> None:
    cached.unlink()
    with pytest.raises(LpipsUnavailable, match=r"alexnet-standin-0123abcd\.pth is not .* python -c") as caught:
        Lpips()
    assert str(cached.parent) not in caught.value.reason
    assert not cached.exists()


def test_a_damaged_file_of_weights_is_reported(cached: Path) -> None:
    cached.write_bytes(cached.read_bytes()[:1000])
    with pytest.raises(LpipsUnavailable, match="remove .*alexnet-standin-0123abcd.pth") as caught:
        Lpips()
    assert str(cached.parent) not in caught.value.reason


VGG_URL = "https://weights.example/models/vgg16-standin-0123abcd.pth"
VGG_CHANNELS = (64, 64, None, 128, 128, None, 256, 256, 256, None, 512, 512, 512, None, 512, 512, 512, None)


def vgg_features() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for outputs in VGG_CHANNELS:
        if outputs is None:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU()]
        channels = outputs
    return nn.Sequential(*layers)


@pytest.fixture
def cached_vgg(cached: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide VGG16 with cached weights, of which torchmetrics keeps its own references."""
    loads = []

    def vgg16(*, weights: SimpleNamespace) -> SimpleNamespace:
        loads.append(weights)
        assert len(loads) == 1, "the weights are loaded once"
        net = vgg_features()
        net.load_state_dict(torch.hub.load_state_dict_from_url(weights.url, weights_only=True))
        return SimpleNamespace(features=net)

    kind = SimpleNamespace(DEFAULT=SimpleNamespace(url=VGG_URL))
    monkeypatch.setattr(sys.modules["torchvision.models"], "VGG16_Weights", kind, raising=False)
    for name, value in {"_TORCHVISION_AVAILABLE": True, "vgg16": vgg16, "VGG16_Weights": kind}.items():
        monkeypatch.setattr(dists_module, name, value, raising=False)
    path = cached.with_name("vgg16-standin-0123abcd.pth")
    torch.manual_seed(0)
    torch.save(vgg_features().state_dict(), path)
    return path


def test_dists_is_zero_for_identical_images_and_grows_with_the_noise(cached_vgg: Path) -> None:
    dists = Dists()
    assert dists(image() + 0.4 / 255, image()) == pytest.approx(0, abs=1e-4)  # equal as 8-bit images
    distances = [dists(image() + noise(strength), image()) for strength in (0.02, 0.1, 0.5)]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert dists(image(16), image(16)) == pytest.approx(0, abs=1e-4)
    assert dists(image(15), image(15)) is None


def test_dists_without_weights_names_vgg16(cached_vgg: Path) -> None:
    cached_vgg.unlink()
    with pytest.raises(MetricUnavailable, match=r"VGG16's weights .* torchvision\.models\.vgg16") as caught:
        Dists()
    assert caught.value.reason == "vgg16-standin-0123abcd.pth is not in torch.hub's folder of checkpoints"
