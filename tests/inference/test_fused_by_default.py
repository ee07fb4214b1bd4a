"""`savl.upscale` and `savl.Upscaler` use the fused kernels by default; networks that are called directly do not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import savl
from savl.network import SAVL, SAVLConfig
from savl.ops import KernelSettings, kernel_report, scopes
from savl.ops.scopes import current_settings


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scopes, "process", scopes.ProcessSettings(None))


@pytest.fixture
def model(small_config: Callable[..., SAVLConfig]) -> SAVL:
    return SAVL(small_config(depths=(1,))).eval()


@pytest.fixture
def served(model: SAVL, monkeypatch: pytest.MonkeyPatch) -> set[bool]:
    """Return whether the fused kernels were requested: once for the estimator, once for the rest of the network."""
    seen: set[bool] = set()

    def spy(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            settings = current_settings() if model.kernels is None else model.kernels
            seen.add(settings.window_attention is True)
            return method(*arguments)

        return call

    monkeypatch.setattr(model, "estimate", spy(model.estimate))
    monkeypatch.setattr(model, "reconstruct", spy(model.reconstruct))
    return seen


def upscale_array(model: SAVL) -> None:
    savl.upscale(np.zeros((9, 7, 3), np.uint8), model=model, device="cpu")


def run_upscaler(model: SAVL) -> None:
    savl.Upscaler(model, tile=8, device="cpu")(torch.rand(2, 3, 9, 17))


def in_two_threads(model: SAVL) -> None:
    upscaler = savl.Upscaler(model, device="cpu")
    threads = [threading.Thread(target=upscaler, args=(torch.rand(1, 3, 5, 6),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("use", [upscale_array, run_upscaler, in_two_threads])
def test_pictures_are_upscaled_with_the_fused_kernels(
    use: Callable[[SAVL], None], model: SAVL, served: set[bool]
) -> None:
    use(model)
    assert served == {True}
    assert current_settings() == KernelSettings.of(False), "the switch was left on"


def test_a_network_called_directly_stays_eager_before_and_after(model: SAVL, served: set[bool]) -> None:
    model(torch.rand(1, 3, 5, 6))
    assert served == {False}
    served.clear()
    upscale_array(model)
    assert served == {True}
    served.clear()
    model(torch.rand(1, 3, 5, 6))
    assert served == {False}


@pytest.mark.parametrize("use", [upscale_array, run_upscaler, in_two_threads])
def test_a_call_of_the_switch_rules_over_pictures_and_networks(
    use: Callable[[SAVL], None], model: SAVL, served: set[bool]
) -> None:
    savl.use_fused_kernels(False)
    use(model)
    assert served == {False}
    served.clear()
    savl.use_fused_kernels()
    use(model)
    model(torch.rand(1, 3, 5, 6))
    assert served == {True}


@pytest.mark.parametrize(
    ("block", "fused"),
    [
        (lambda model: savl.use_fused_kernels(False), False),
        (lambda model: savl.use_fused_kernels(window_attention=False), False),
        (lambda model: savl.use_fused_kernels(False, model=model), False),
        (lambda model: savl.use_fused_kernels(True, model=model), True),
        (lambda model: nullcontext(), True),
    ],
    ids=["block", "one op", "model off", "model on", "nothing"],
)
def test_blocks_and_a_model_of_its_own_setting_rule_over_the_default(
    block: Callable[[SAVL], AbstractContextManager[Any]], fused: bool, model: SAVL, served: set[bool]
) -> None:
    with block(model):
        run_upscaler(model)
    assert served == {fused}


@pytest.mark.usefixtures("built_extension")
@pytest.mark.parametrize("tile", [0, 16])
def test_fused_and_eager_pictures_agree_within_rounding(tile: int, model: SAVL) -> None:
    lr = torch.rand(1, 3, 21, 34)
    upscaler = savl.Upscaler(model, tile=tile, tile_pad=8, device="cpu")
    fused = upscaler(lr)
    with savl.use_fused_kernels(False):
        eager = upscaler(lr)
    torch.testing.assert_close(fused.sr, eager.sr, atol=2e-6, rtol=0)
    torch.testing.assert_close(fused.severity, eager.severity, atol=1e-4, rtol=0)
    assert not torch.equal(fused.sr, eager.sr), "both were computed by the same kernels"


class SeesState:
    """Substitute for CUDA's capture that runs its function and stores the settings during the recording."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.settings: list[KernelSettings] = []

    def record(self, function: Callable[[], Tensor], warm_ups: int) -> tuple[Callable[[], object], Tensor]:
        self.settings.append(current_settings())
        output = function()
        return lambda: output.copy_(function()), output

    def release(self) -> None:
        """Do nothing: recordings share no memory."""


def test_graphs_are_recorded_under_the_settings_in_force(model: SAVL) -> None:
    from savl.inference.graphs import GraphCache

    upscaler, capture = savl.Upscaler(model, tile=0, device="cpu"), SeesState()
    upscaler.graphs = GraphCache(capture)
    lr = torch.rand(1, 3, 8, 8)
    upscaler(lr)
    with savl.use_fused_kernels(False):
        upscaler(lr)
    upscaler(lr)
    assert capture.settings == [KernelSettings.of(True), KernelSettings.of(False)]


@pytest.mark.usefixtures("built_extension")
def test_the_report_distinguishes_the_kernels_of_images_and_of_networks() -> None:
    report = kernel_report()
    assert report.serving("window_attention") == "eager"
    reason = next(s.reason for s in report.statuses if (s.op, s.backend) == ("window_attention", "cpp"))
    assert "serves savl.upscale and savl.Upscaler" in reason
    assert "savl.use_fused_kernels() switches it on for networks" in reason
    with savl.use_fused_kernels(False):
        assert "savl.upscale" not in str(kernel_report())
