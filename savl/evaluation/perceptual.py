"""LPIPS: how different two images look to AlexNet. Measured where torchvision and the weights are there already."""

from __future__ import annotations

import importlib
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import torch
from torch import Tensor

from savl.evaluation.fidelity import as_8_bit

SMALLEST = 31
"""Pixels on a side; of fewer, AlexNet's second pooling leaves nothing."""

_DOWNLOAD = (
    "AlexNet's weights (233 MB): python -c \"import torchvision; torchvision.models.alexnet(weights='DEFAULT')\""
)


class LpipsUnavailable(RuntimeError):
    """LPIPS cannot be measured on this machine; the message says why and what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        """Why, in few words and without this machine's paths: fit for a report that is kept."""


class Lpips:
    """LPIPS of version 0.1 with AlexNet's features; lower is better, 0 is identical.

    It is computed on the CPU in float32, as the other scores are, so that the device of the network has no say in it.
    """

    def __init__(self) -> None:
        """Load the network, and download nothing.

        Raises:
            LpipsUnavailable: torchvision or torchmetrics is not installed or does not import; or torch.hub's folder of
                checkpoints does not hold AlexNet's weights, or not whole.
        """
        weights = _cached_weights()
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
        except ModuleNotFoundError as error:
            raise LpipsUnavailable("torchmetrics is not installed", "pip install 'savl[lpips]' brings it") from error
        except Exception as error:  # whatever it imports may be broken
            raise LpipsUnavailable(
                "torchmetrics does not import", f"{_first_line(error)}; pip install 'savl[lpips]' brings one that does"
            ) from error
        try:
            self._metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        except Exception as error:  # of a damaged file: UnpicklingError, EOFError, RuntimeError, KeyError …
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
            The distance, or None for images with a side below `SMALLEST`, which AlexNet cannot take.

        Raises:
            ValueError: Shapes differ.
        """
        sr, hr = (image[None].float().cpu() / 255 for image in as_8_bit(sr, hr))
        if min(sr.shape[-2:]) < SMALLEST:
            return None
        distance: Tensor = self._metric(sr, hr)
        self._metric.reset()  # it would keep every score for a mean of its own
        return distance.item()


def _cached_weights() -> Path:
    """The file that torchvision would load AlexNet from.

    Raises:
        LpipsUnavailable: It is not there, or there is no torchvision to say which one it is.
    """
    fitting = f"install the torchvision made for torch {torch.__version__}, then download {_DOWNLOAD}"
    try:
        models = importlib.import_module("torchvision.models")
    except ModuleNotFoundError as error:
        if error.name not in ("torchvision", "torchvision.models"):
            raise _does_not_import(error, fitting) from error
        raise LpipsUnavailable("torchvision is not installed", fitting) from error
    except Exception as error:  # RuntimeError, where its operators were built for another torch
        raise _does_not_import(error, fitting) from error
    # torchmetrics asks for the default weights, and torch.hub keeps files under the last part of their address.
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
