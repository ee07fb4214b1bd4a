"""Fixtures and helpers for all tests: seeds, small networks, and error bounds derived from rounding."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: threads that wait must not spin
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from hypothesis import settings
from PIL import Image
from torch import Tensor, nn

from savl import ops
from savl.build_info import build_info
from savl.network import DegradationField, SAVLConfig

# benchmarks/ is not installed; last, so that the savl which is installed comes before the one beside it.
sys.path.append(str(Path(__file__).resolve().parents[1]))

# The same examples on every run: a failure seen once is seen by everyone. No deadline: machines differ in speed.
settings.register_profile("savl", deadline=None, derandomize=True)
settings.load_profile("savl")


def _declare_operators_of_torchvision() -> None:
    """Let torchvision from PyPI import beside a CPU build of torch.

    Its compiled library needs CUDA libraries and does not load there. Python code of torchvision, which spandrel
    imports, needs only the schemas of two operators in it.
    """
    try:
        builds = [installed_version(name).partition("+")[2] for name in ("torch", "torchvision")]
    except PackageNotFoundError:
        return
    if builds == ["cpu", ""]:
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


_declare_operators_of_torchvision()


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist begin files in the order in which they are collected; its own is those of most tests first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first under pytest-xdist, so that no worker runs them alone at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def built_extension() -> ModuleType:
    """The extension module; the test is skipped where savl was installed without it."""
    module: ModuleType = pytest.importorskip("savl._C", reason=str(build_info()["reason"]), exc_type=ImportError)
    return module


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread: small tensors take less processor time, and on a busy machine much less."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pair_folders(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of LR images and originals: a.png and b.png, noise of 8×8 and of 32×32 pixels."""
    random = np.random.default_rng(0)
    for side, folder in ((8, "lr"), (32, "hr")):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{name}.png")
    return tmp_path / "lr", tmp_path / "hr"


@pytest.fixture(scope="session")
def small_config() -> Callable[..., SAVLConfig]:
    """Settings of a network with every part of savl-base and next to no work; keyword arguments change some."""
    small = SAVLConfig(
        channels=12,
        depths=(2, 1),
        heads=2,
        window=4,
        cab_compress=3,
        cab_squeeze=4,
        cab_scale=0.1,
        drop_path=0.0,
        upsample_features=8,
        latent=6,
        estimator_width=8,
        estimator_dilations=(1, 2),
        decoder_width=8,
        decoder_depth=3,
    )

    def make(**changes: Any) -> SAVLConfig:
        return dataclasses.replace(small, **changes)

    return make


# Constructor arguments of small models of spandrel, by architecture. Several are of one architecture.
FOREIGN_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ESRGAN": ("ESRGAN", {"num_filters": 8, "num_blocks": 1}),
    "Compact": ("Compact", {"num_feat": 8, "num_conv": 2, "upscale": 4}),
    "Compact x3": ("Compact", {"num_feat": 8, "num_conv": 1, "upscale": 3}),
    "SwinIR": (
        "SwinIR",
        {"img_size": 32, "window_size": 8, "depths": [2], "embed_dim": 12, "num_heads": [2], "mlp_ratio": 2.0}
        | {"upscale": 4, "upsampler": "pixelshuffledirect", "resi_connection": "1conv"},
    ),
    "SwinIR gray": (
        "SwinIR",
        {"img_size": 32, "window_size": 8, "depths": [2], "embed_dim": 12, "num_heads": [2], "mlp_ratio": 2.0}
        | {"upscale": 2, "upsampler": "pixelshuffledirect", "resi_connection": "1conv", "in_chans": 1},
    ),
    "Compact x8": ("Compact", {"num_feat": 8, "num_conv": 1, "upscale": 8}),
    "DAT": (
        "DAT",
        {"img_size": 32, "split_size": [4, 8], "depth": [2], "embed_dim": 16, "num_heads": [2]}
        | {"expansion_factor": 2.0, "upscale": 2, "upsampler": "pixelshuffledirect", "resi_connection": "1conv"},
    ),
    "NAFNet": (
        "NAFNet",
        {"img_channel": 3, "width": 8, "middle_blk_num": 1, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
    ),
}


@pytest.fixture(scope="session")
def spandrel() -> ModuleType:
    """The package spandrel. The test is skipped where it is not installed."""
    return pytest.importorskip("spandrel", reason='needs pip install "savl[models]"', exc_type=ImportError)


@pytest.fixture(scope="session")
def foreign_model(spandrel: ModuleType) -> Callable[[str], nn.Module]:
    """Return a function that builds a small model of `FOREIGN_MODELS` with random weights, in evaluation mode."""

    def make(name: str) -> nn.Module:
        architecture, arguments = FOREIGN_MODELS[name]
        package = importlib.import_module(f"spandrel.architectures.{architecture}")
        torch.manual_seed(5)
        model: nn.Module = getattr(package, architecture)(**arguments)
        if architecture == "ESRGAN":  # its own random weights give almost black images
            last = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
            with torch.no_grad():
                last.weight.mul_(20)
                assert last.bias is not None
                last.bias.fill_(0.4)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def perturb_parameters() -> Callable[[Any], Any]:
    """Return a function that adds noise to every parameter, because a weight that is initially 0 hides earlier layers.

    The function returns the module, in float64 and evaluation mode, so that comparisons can have small tolerances.
    """

    def perturb_parameters(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        module = module.double().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return module

    return perturb_parameters


@pytest.fixture(scope="session")
def random_field() -> Callable[..., DegradationField]:
    """Return a function that makes a random float64 field of a given size. Its severity is independent of its mean."""

    def make(config: SAVLConfig, height: int, width: int, batch: int = 1, seed: int = 2) -> DegradationField:
        generator = torch.Generator().manual_seed(seed)
        mu = torch.randn(batch, config.latent, height, width, generator=generator, dtype=torch.float64)
        severity = 2 * torch.rand(batch, height, width, generator=generator, dtype=torch.float64)
        return DegradationField(mu=mu, severity=severity)

    return make


@pytest.fixture(scope="session")
def attention_rounding_bound() -> Callable[..., float]:
    """Return a function that bounds the rounding error of attention outputs. A larger error is a mistake.

    With unit roundoff u, the error of a logit is at most δ = (d + 6)·u times the sum of the magnitudes of its terms. d
    stands for the sum of d products, and 6 for the roundings of two severities, scaling, bias, cast of the bias, and
    storage. Softmax turns this into a relative error of e^{2δ} − 1 per weight. Normalising, weighting and adding
    ``keys`` values adds (keys + 8)·u. Low-precision products are accumulated in float32, so d and keys do not count
    for them.
    """

    def bound(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, heads: int, keys: int) -> float:
        unit = torch.finfo(dtype).eps / 2
        head_dim = q.shape[-1] // heads
        added, summed = (head_dim, keys) if dtype in (torch.float32, torch.float64) else (0, 0)
        largest = 4 * float(q.abs().max() * k.abs().max()) * math.sqrt(head_dim)  # severity is at most 2 at both ends
        delta = (added + 6) * unit * (largest + float(bias.abs().max()))
        return float(v.abs().max()) * (math.expm1(2 * delta) + (summed + 8) * unit)

    return bound


@pytest.fixture
def severities_seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The severity maps that reach window attention during the test."""
    seen: list[Tensor] = []
    attend = ops.window_attention

    def spy(qkv: Tensor, bias_table: Tensor, severity: Tensor | None = None, **others: Any) -> Tensor:
        if severity is not None:
            seen.append(severity)
        return attend(qkv, bias_table, severity, **others)

    monkeypatch.setattr(ops, "window_attention", spy)
    return seen
