"""Agreement of severity maps with degradation masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import savl
from savl.degradation import Degradation, DegradationConfig
from savl.evaluation.severity import rank_correlation, severity_agreement
from savl.network import SAVL, SAVLConfig

ROOT = Path(__file__).resolve().parents[2]
SMALL = SAVLConfig(
    channels=6, depths=(1,), heads=1, window=4, cab_compress=3, cab_squeeze=3, upsampler="pixelshuffledirect",
    latent=4, estimator_width=6, estimator_dilations=(1,),
)  # fmt: skip


def test_rank_correlation_depends_on_the_order_only() -> None:
    a = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    assert rank_correlation(a, a.exp()) == pytest.approx(1.0, abs=1e-5)
    assert rank_correlation(a, -a) == pytest.approx(-1.0, abs=1e-5)
    assert abs(rank_correlation(a, torch.randn(20, 30, generator=torch.Generator().manual_seed(1)))) < 0.15
    assert rank_correlation(a, torch.ones(20, 30)) == 0.0


def test_rank_correlation_gives_equal_values_the_mean_of_their_ranks() -> None:
    # Ranks 1, 2.5, 2.5, 4 and 2, 2, 2, 4: deviations (-1.5, 0, 0, 1.5) and (-0.5, -0.5, -0.5, 1.5).
    found = rank_correlation(torch.tensor([[0.1, 0.4], [0.4, 0.9]]), torch.tensor([[5.0, 5.0], [5.0, 7.0]]))
    assert found == pytest.approx(3 / (4.5 * 3) ** 0.5)


def test_a_network_that_returns_the_mask_agrees_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle's variance is low where the mask is high, so the severity map of the network must be high there."""
    truths: list[Tensor] = []
    degrade = Degradation.__call__

    def remembered(self: Degradation, x: Tensor, seed: Any) -> Any:
        degraded = degrade(self, x, seed)
        truths.append(degraded.degradation_mask)
        return degraded

    monkeypatch.setattr(Degradation, "__call__", remembered)
    model = SAVL(SMALL).eval()
    assert model.estimator is not None
    monkeypatch.setattr(
        model.estimator,
        "forward",
        lambda y: (torch.zeros(1, 4, *y.shape[2:]), (1 - 0.3 * truths[-1])[:, None].log().expand(-1, 4, -1, -1)),
    )
    (found,) = severity_agreement(model, [ROOT / "examples" / "teddy.webp"])
    assert found.correlation > 0.98
    assert found.smoothed > 0.9
    assert found.name == "teddy"


def test_draws_depend_on_the_seed_and_the_mask_is_always_applied() -> None:
    torch.manual_seed(0)
    model = SAVL(SMALL).eval()
    images = [ROOT / "examples" / "teddy.webp"]
    first, again = (list(severity_agreement(model, images, DegradationConfig(strength=(0.5, 0.5)))) for _ in range(2))
    assert first == again
    assert first != list(severity_agreement(model, images, seed=1))


def test_a_network_without_severity_is_refused() -> None:
    with pytest.raises(ValueError, match="variational degradation code .* got 'none'"):
        list(severity_agreement(savl.build("hat-s"), []))
