"""LPIPS: a perceptual distance by AlexNet's features, available if torchvision and its weights are installed."""

from __future__ import annotations

import importlib
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import torch
from torch import Tensor

from savl.evaluation.fidelity import as_8_bit

SMALLEST = 31
"""Smallest side in pixels; AlexNet's second pooling would reduce a smaller image to nothing."""

_DOWNLOAD = (
    "AlexNet's weights (233 MB): python -c \"import torchvision; torchvision.models.alexnet(weights='DEFAULT')\""
)


class LpipsUnavailable(RuntimeError):
    """LPIPS cannot be measured on this machine; the message says why and what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        """Short reason without paths of this machine, for reports that are kept."""


class Lpips:
    """LPIPS of version 0.1 with AlexNet's features; lower is better, identical images have 0.

    It is computed on the CPU in float32, so that the result does not depend on the device of the network.
    """

    def __init__(self) -> None:
        """Load the network; nothing is downloaded.

        Raises:
            LpipsUnavailable: torchvision or torchmetrics is not installed or cannot be imported, or torch.hub's folder
                of checkpoints has no complete file of AlexNet's weights.
        """
        weights = _cached_weights()
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
        except ModuleNotFoundError as error:
            raise LpipsUnavailable("torchmetrics is not installed", "pip install 'savl[lpips]' brings it") from error
        except Exception as error:  # its dependencies may be broken
            raise LpipsUnavailable(
                "torchmetrics does not import", f"{_first_line(error)}; pip install 'savl[lpips]' brings one that does"
            ) from error
        try:
            self._metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        except Exception as error:  # damaged file: UnpicklingError, EOFError, RuntimeError, KeyError …
            raise LpipsUnavailable(
                f"{weights.name} in torch.hub's folder of checkpoints cannot be loaded",
                f"{_first_line(error)}; remove {weights}, then download {_DOWNLOAD}",
            ) from error

    def __call__(self, sr: Tensor, hr: Tensor) -> float | None:
        """Compare an upscaled image with its original: all channels, whole image.

        Args:
            sr: ``(3, H, W)`` floating in [0, 1]; rounded to 8 bits first, as for the other scores.
            hr: ``(3, H, W)`` floating in [0, 1].

        Returns:
            The distance, or None for images with a side below `SMALLEST`, which AlexNet cannot process.

        Raises:
            ValueError: The shapes differ.
        """
        sr, hr = (image[None].float().cpu() / 255 for image in as_8_bit(sr, hr))
        if min(sr.shape[-2:]) < SMALLEST:
            return None
        distance: Tensor = self._metric(sr, hr)
        self._metric.reset()  # it would accumulate all scores
        return distance.item()


def _cached_weights() -> Path:
    """Return the file that torchvision would load AlexNet from.

    Raises:
        LpipsUnavailable: The file does not exist, or torchvision, which knows its name, is not available.
    """
    fitting = f"install the torchvision made for torch {torch.__version__}, then download {_DOWNLOAD}"
    try:
        models = importlib.import_module("torchvision.models")
    except ModuleNotFoundError as error:
        if error.name not in ("torchvision", "torchvision.models"):
            raise _does_not_import(error, fitting) from error
        raise LpipsUnavailable("torchvision is not installed", fitting) from error
    except Exception as error:  # RuntimeError if its operators were built for another torch
        raise _does_not_import(error, fitting) from error
    # torchmetrics loads the default weights, and torch.hub names files by the last part of their URL.
    name = PurePosixPath(urlsplit(models.AlexNet_Weights.DEFAULT.url).path).name
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.is_file():
        raise LpipsUnavailable(f"{name} is not in torch.hub's folder of checkpoints", f"download {_DOWNLOAD}")
    return path


def _does_not_import(error: Exception, remedy: str) -> LpipsUnavailable:
    reason = f"torchvision does not import beside torch {torch.__version__}"
    return LpipsUnavailable(reason, f"{_first_line(error)}; {remedy}")


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
