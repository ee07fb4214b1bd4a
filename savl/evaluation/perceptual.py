"""LPIPS and DISTS: perceptual distances by the features of networks, if torchvision and their weights are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from savl.evaluation.fidelity import as_8_bit

SMALLEST = 31
"""Smallest side in pixels; AlexNet's second pooling would reduce a smaller image to nothing."""


class MetricUnavailable(RuntimeError):
    """A metric cannot be measured on this machine. The message gives the reason and a remedy."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        """Short reason without paths of this machine, for reports that are kept."""


LpipsUnavailable = MetricUnavailable


class _Perceptual:
    """A metric of torchmetrics, with the weights that torchvision keeps in the cache of torch.hub.

    It is computed on the CPU in float32, so that the result does not depend on the device of the network.
    """

    no_value: ClassVar[str]
    """Reason for which an image has no value."""
    _network: ClassVar[tuple[str, int]]
    """Name of the network in torchvision, and the size of its weights in MB."""
    _smallest: ClassVar[int]

    def __init__(self) -> None:
        """Load the network; nothing is downloaded.

        Raises:
            MetricUnavailable: torchvision or torchmetrics is not installed or cannot be imported, or torch.hub's folder
                of checkpoints has no complete file of the network's weights.
        """
        weights = _cached_weights(*self._network)
        try:
            metric = self._import()
        except ModuleNotFoundError as error:
            raise MetricUnavailable("torchmetrics is not installed", "pip install 'savl[lpips]' brings it") from error
        except Exception as error:  # its dependencies may be broken
            raise MetricUnavailable(
                "torchmetrics does not import", f"{_first_line(error)}; pip install 'savl[lpips]' brings one that does"
            ) from error
        try:
            self._distance = self._build(metric)
        except Exception as error:  # damaged file: UnpicklingError, EOFError, RuntimeError, KeyError …
            raise MetricUnavailable(
                f"{weights.name} in torch.hub's folder of checkpoints cannot be loaded",
                f"{_first_line(error)}; remove {weights}, then download {_download(*self._network)}",
            ) from error

    def _import(self) -> Any:
        """Return the class of torchmetrics."""
        raise NotImplementedError

    def _build(self, metric: Any) -> Callable[[Tensor, Tensor], float]:
        """Return the distance of two images, ``(1, 3, H, W)`` float32 in [0, 1]; the weights are loaded here."""
        raise NotImplementedError

    def __call__(self, sr: Tensor, hr: Tensor) -> float | None:
        """Compare an upscaled image with its original: all channels, whole image.

        Args:
            sr: ``(3, H, W)`` floating in [0, 1]; rounded to 8 bits first, as for the other scores.
            hr: ``(3, H, W)`` floating in [0, 1].

        Returns:
            The distance, or None for an image with a side that is too small for the network.

        Raises:
            ValueError: The shapes differ.
        """
        sr, hr = (image[None].float().cpu() / 255 for image in as_8_bit(sr, hr))
        if min(sr.shape[-2:]) < self._smallest:
            return None
        with torch.inference_mode():
            return self._distance(sr, hr)


class Lpips(_Perceptual):
    """LPIPS of version 0.1 with AlexNet's features (Zhang et al., 2018); lower is better, identical images have 0."""

    no_value = "too small for AlexNet"
    _network = ("AlexNet", 233)
    _smallest = SMALLEST

    def _import(self) -> Any:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity

    def _build(self, metric: Any) -> Callable[[Tensor, Tensor], float]:
        lpips = metric(net_type="alex", normalize=True)

        def distance(sr: Tensor, hr: Tensor) -> float:
            value = float(lpips(sr, hr))
            lpips.reset()  # it would accumulate all scores
            return value

        return distance


class Dists(_Perceptual):
    """DISTS with VGG16's features (Ding et al., 2020); lower is better, identical images have 0.

    Images are compared at their own size; the authors' program reduces large images first.
    """

    no_value = "too small for VGG16"
    _network = ("VGG16", 528)
    _smallest = 16

    def _import(self) -> Any:
        from torchmetrics.functional.image.dists import DISTSNetwork  # the metric itself loads VGG16 for every image

        return DISTSNetwork

    def _build(self, metric: Any) -> Callable[[Tensor, Tensor], float]:
        network = metric().eval()
        return lambda sr, hr: float(network(sr, hr))


def _download(network: str, megabytes: int) -> str:
    call = f"torchvision.models.{network.lower()}(weights='DEFAULT')"
    return f'{network}\'s weights ({megabytes} MB): python -c "import torchvision; {call}"'


def _cached_weights(network: str, megabytes: int) -> Path:
    """Return the file that torchvision would load a network from.

    Raises:
        MetricUnavailable: The file does not exist, or torchvision, which knows its name, is not available.
    """
    fitting = (
        f"install the torchvision made for torch {torch.__version__}, then download {_download(network, megabytes)}"
    )
    try:
        models = importlib.import_module("torchvision.models")
    except ModuleNotFoundError as error:
        if error.name not in ("torchvision", "torchvision.models"):
            raise _does_not_import(error, fitting) from error
        raise MetricUnavailable("torchvision is not installed", fitting) from error
    except Exception as error:  # RuntimeError if its operators were built for another torch
        raise _does_not_import(error, fitting) from error
    # torchmetrics loads the default weights, and torch.hub names files by the last part of their URL.
    name = PurePosixPath(urlsplit(getattr(models, f"{network}_Weights").DEFAULT.url).path).name
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.is_file():
        raise MetricUnavailable(
            f"{name} is not in torch.hub's folder of checkpoints", f"download {_download(network, megabytes)}"
        )
    return path


def _does_not_import(error: Exception, remedy: str) -> MetricUnavailable:
    reason = f"torchvision does not import beside torch {torch.__version__}"
    return MetricUnavailable(reason, f"{_first_line(error)}; {remedy}")


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
