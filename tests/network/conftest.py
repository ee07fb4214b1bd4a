"""Fixtures for the tests of the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from savl.network import SAVL, SAVLConfig

Small = Callable[..., SAVLConfig]
PerturbParameters = Callable[[Any], Any]


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """Compute with one thread."""


@pytest.fixture(scope="module")
def network(small_config: Small, perturb_parameters: PerturbParameters) -> SAVL:
    """Return the small network with parameters away from zero, float64, in evaluation mode."""
    torch.manual_seed(0)
    return perturb_parameters(SAVL(small_config())).requires_grad_(False)
