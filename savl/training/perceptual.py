"""The perceptual loss of the GAN stage: distance between VGG-19 features of two images."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_WEIGHTS = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1.0, "conv4_4": 1.0, "conv5_4": 1.0}
"""Weights of the layers, those of Real-ESRGAN (Wang et al., 2021). ``conv3_4`` is the fourth convolution after the
second pooling."""

_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
_FETCH = f"python -c \"import torch; torch.hub.load_state_dict_from_url('{_URL}', check_hash=True)\""
_OTHERWISE = "or set gan.perceptual = 0 in the training configuration"
_SMALLEST = 16  # four poolings come before conv5_4
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class PerceptualUnavailable(RuntimeError):
    """torchvision or the weights of VGG-19 are missing; the message says what is missing and what to do."""


class PerceptualLoss(nn.Module):
    """Weighted L1 distance of VGG-19 features before activation (ESRGAN, Wang et al., 2018), by `LAYER_WEIGHTS`.

    The features are fixed: the module is always in evaluation mode, and its weights are non-persistent buffers. So
    ``parameters()`` and ``state_dict()`` are empty, while ``to(device)`` moves the weights.
    """

    mean: Tensor
    std: Tensor

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
        super().__init__()
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
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, also if a parent module is switched to training mode."""
        return super().train(False)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            sr: ``(B, 3, H, W)`` in [0, 1], H and W at least 16. Gradients flow to it only.
            hr: The originals, of the same shape.

        Returns:
            A float32 scalar: the sum over layers of weight times mean absolute difference.

        Raises:
            ValueError: A shape is not accepted.
        """
        if sr.ndim != 4 or sr.shape[1] != 3 or min(sr.shape[2:]) < _SMALLEST:
            raise ValueError(f"sr must be (B, 3, H, W), H and W at least {_SMALLEST}, got {tuple(sr.shape)}")
        if hr.shape != sr.shape:
            raise ValueError(f"hr must have the shape of sr, {tuple(sr.shape)}, got {tuple(hr.shape)}")
        with torch.no_grad():
            wanted = self._features(hr)
        total = sr.new_zeros((), dtype=torch.float32)
        for name, features in self._features(sr).items():
            total = total + LAYER_WEIGHTS[name] * F.l1_loss(features.float(), wanted[name].float())
        return total

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        x = (images - self.mean) / self.std
        found = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            x = layer(x)
            if name in LAYER_WEIGHTS:
                found[name] = x
        return found


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
