"""The perceptual loss: its features and weights, and errors if VGG-19 is missing."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from savl.training.perceptual import PerceptualLoss, PerceptualUnavailable

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
CONVS = [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34]
"""Indices of the convolutions in torchvision's vgg19().features."""
COMPARED = {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}


def vgg(width: int = 3) -> nn.Sequential:
    """The layers of VGG-19 in the order and the manner of torchvision, with ``width`` channels throughout."""
    layers: list[nn.Module] = []
    for convs in (2, 2, 4, 4, 4):
        for _ in range(convs):
            layers += [nn.Conv2d(width if layers else 3, width, 3, padding=1), nn.ReLU(inplace=True)]
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


def lens() -> nn.Sequential:
    """A VGG that passes what is positive unchanged."""
    features = vgg()
    for index in CONVS:
        nn.init.dirac_(features[index].weight)
        nn.init.zeros_(features[index].bias)
    return features


def plain(colour: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 16, 16)


LIGHT, LIGHTER = plain((0.6, 0.7, 0.8)), plain((0.9, 0.75, 0.85))  # above the mean: no ReLU changes them
DISTANCE = float(((LIGHTER - LIGHT) / STD).mean())


def test_uniform_images_differ_by_their_normalised_colours_at_every_layer() -> None:
    assert float(PerceptualLoss(lens())(LIGHT, LIGHTER)) == pytest.approx(3.2 * DISTANCE, rel=1e-5)


def test_normalisation_is_that_of_imagenet() -> None:
    features = vgg()
    seen: list[Tensor] = []
    loss = PerceptualLoss(features)
    next(iter(loss.layers)).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    sr, hr = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    loss(sr, hr)
    assert len(seen) == 2
    for image in (sr, hr):
        assert any(torch.allclose(x, (image - MEAN) / STD, atol=1e-6) for x in seen)


@pytest.mark.parametrize(("last", "weight"), [(2, 0.1), (7, 0.2), (16, 1.2), (25, 2.2), (34, 3.2)])
def test_each_layer_has_its_weight(last: int, weight: float) -> None:
    features = lens()
    for index in CONVS:
        if index > last:
            nn.init.zeros_(features[index].weight)  # blind from here on
    assert float(PerceptualLoss(features)(LIGHT, LIGHTER)) == pytest.approx(weight * DISTANCE, rel=1e-5)


def test_features_are_compared_before_activation() -> None:
    features = lens()
    with torch.no_grad():
        features[2].weight.neg_()  # conv1_2 gives negative numbers, of which the ReLU behind it leaves nothing
    assert float(PerceptualLoss(features)(LIGHT, LIGHTER)) == pytest.approx(0.1 * DISTANCE, rel=1e-5)


def test_the_loss_of_random_features_equals_that_of_hooked_features() -> None:
    features = vgg(5)
    loss = PerceptualLoss(features)
    reference = copy.deepcopy(features)[:35]  # the last pooling leaves nothing of images this small
    for layer in reference:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    sr, hr = torch.rand(2, 3, 32, 24), torch.rand(2, 3, 32, 24)
    seen: dict[int, list[Tensor]] = {index: [] for index in COMPARED}
    for index in COMPARED:
        reference[index].register_forward_hook(lambda _, __, output, index=index: seen[index].append(output))
    with torch.no_grad():
        for image in (sr, hr):
            reference((image - MEAN) / STD)
    distances = {index: F.l1_loss(*pair) for index, pair in seen.items()}
    assert all(float(distance) > 0 for distance in distances.values())
    expected = sum(weight * distances[index] for index, weight in COMPARED.items())
    torch.testing.assert_close(loss(sr, hr), expected)


def test_the_loss_of_equal_images_is_0() -> None:
    image = torch.rand(2, 3, 16, 16)
    assert float(PerceptualLoss(vgg())(image, image.clone())) == 0


def test_the_gradient_flows_to_the_first_image_only_and_lowers_the_loss() -> None:
    features = vgg(6)
    loss = PerceptualLoss(features)
    sr = torch.rand(1, 3, 16, 16, requires_grad=True)
    hr = torch.rand(1, 3, 16, 16, requires_grad=True)
    before = loss(sr, hr)
    before.backward()
    assert sr.grad is not None
    assert hr.grad is None
    assert all(p.grad is None for p in features.parameters())
    with torch.no_grad():
        assert float(loss(sr - 0.1 * sr.grad / sr.grad.norm(), hr)) < float(before)


def test_features_are_neither_parameters_nor_state() -> None:
    holder = nn.Module()
    holder.loss = PerceptualLoss(vgg())
    holder.train()
    assert not list(holder.parameters())
    assert not holder.state_dict()
    assert not any(module.training for module in holder.loss.modules())
    assert not any(buffer.requires_grad for buffer in holder.buffers())
    image = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    assert float(holder.double().loss(image, 1 - image)) > 0, "they move with the module all the same"


def test_features_given_are_copied_and_left_as_they_were() -> None:
    features = vgg().train()
    loss = PerceptualLoss(features)
    before = float(loss(LIGHT, LIGHTER))
    assert len(list(features.parameters())) == 32
    assert all(p.requires_grad for p in features.parameters())
    assert all(layer.inplace for layer in features if isinstance(layer, nn.ReLU))
    with torch.no_grad():
        features[0].weight.zero_()
    assert float(loss(LIGHT, LIGHTER)) == before


def test_the_distance_is_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        distance = PerceptualLoss(lens())(LIGHT, LIGHTER)
    assert distance.dtype == torch.float32
    assert float(distance) == pytest.approx(3.2 * DISTANCE, rel=0.02)


def test_layers_that_are_not_vgg_19_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"features must have the layers of VGG-19, .*\['conv4_4', 'conv5_4'\] not"):
        PerceptualLoss(vgg()[:19])


@pytest.mark.parametrize("shape", [(1, 3, 15, 16), (1, 3, 16, 8), (1, 4, 16, 16), (3, 16, 16)])
def test_shapes_that_are_not_accepted_are_reported(shape: tuple[int, ...]) -> None:
    loss = PerceptualLoss(vgg())
    with pytest.raises(ValueError, match=r"sr must be \(B, 3, H, W\), H and W at least 16, got \(") as caught:
        loss(torch.rand(shape), torch.rand(shape))
    assert str(shape) in str(caught.value)


def test_images_of_two_shapes_are_reported() -> None:
    with pytest.raises(ValueError, match=r"hr must have the shape of sr, \(1, 3, 16, 16\), got \(1, 3, 16, 32\)"):
        PerceptualLoss(vgg())(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 32))


class FakeVGG(nn.Module):
    """Stands in for torchvision's VGG: the same names, next to no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.features = vgg()
        self.classifier = nn.Linear(3, 2)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in an empty torch.hub cache where the weights belong; a download fails the test."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def download(url: str, *_: object, **__: object) -> None:
        pytest.fail(f"downloaded {url} unasked")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / "vgg19-dcbb9e9d.pth"


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchvision with a small vgg19."""
    models = ModuleType("torchvision.models")
    models.vgg19 = FakeVGG  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


def test_a_missing_torchvision_is_an_error_with_the_remedies(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.models", raising=False)
    with pytest.raises(PerceptualUnavailable) as caught:
        PerceptualLoss()
    message = str(caught.value)
    assert "torchvision cannot be imported (ModuleNotFoundError" in message
    assert f"install the torchvision that belongs to torch {torch.__version__}" in message
    assert f"not at {hub}" in message, "what else is missing is said in the same breath"
    assert "set gan.perceptual = 0 in the training configuration" in message


def test_a_torchvision_of_another_torch_counts_as_missing(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.touch()
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms is unknown')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(PerceptualUnavailable, match=r"RuntimeError: operator torchvision::nms is unknown") as caught:
        PerceptualLoss()
    assert "fetch" not in str(caught.value)


@pytest.mark.usefixtures("torchvision")
def test_missing_weights_are_an_error_with_the_download_command(hub: Path) -> None:
    with pytest.raises(PerceptualUnavailable) as caught:
        PerceptualLoss()
    message = str(caught.value)
    assert f"the weights of VGG-19 are not at {hub}" in message
    assert "torchvision cannot" not in message
    assert "torch.hub.load_state_dict_from_url('https://download.pytorch.org/models/vgg19-dcbb9e9d.pth'" in message
    assert "set gan.perceptual = 0" in message


@pytest.mark.usefixtures("torchvision")
def test_weights_in_the_cache_are_used_without_drawing_random_numbers(hub: Path) -> None:
    trained = FakeVGG()
    torch.save(trained.state_dict(), hub)
    generator = torch.get_rng_state()
    loss = PerceptualLoss()
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(loss(LIGHT, LIGHTER), PerceptualLoss(trained.features)(LIGHT, LIGHTER))


@pytest.mark.usefixtures("torchvision")
def test_weights_are_downloaded_on_request(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = FakeVGG()

    def download(url: str, path: str, hash_prefix: str, **_: object) -> None:
        assert url.endswith(hub.name)
        assert hash_prefix == "dcbb9e9d", "what arrives is to be checked"
        torch.save(trained.state_dict(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    loss = PerceptualLoss(download=True)
    assert torch.equal(loss(LIGHT, LIGHTER), PerceptualLoss(trained.features)(LIGHT, LIGHTER))


@pytest.mark.usefixtures("torchvision")
def test_a_failed_download_and_a_damaged_file_are_errors_with_the_remedy(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("name resolution failed")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(PerceptualUnavailable, match="cannot be loaded .OSError: name resolution failed") as caught:
        PerceptualLoss(download=True)
    assert "set gan.perceptual = 0" in str(caught.value)
    hub.write_bytes(b"half a file")
    with pytest.raises(PerceptualUnavailable, match=f"weights at {hub} cannot be loaded .*fetch it again") as caught:
        PerceptualLoss()
    assert isinstance(caught.value, RuntimeError)
