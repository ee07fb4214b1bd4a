"""Every ablation is a setting, and attention, posterior and modulation are computed by savl.ops only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from savl import ops
from savl.network import DSCA, SAVL, AmortizedEstimator, DegradationField, SAVLConfig

Small = Callable[..., SAVLConfig]
PerturbParameters = Callable[[Any], Any]
RandomField = Callable[..., DegradationField]


def image(height: int = 7, width: int = 10, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, height, width, dtype=torch.float64)


def influence(model: SAVL, field: DegradationField, **changes: Tensor) -> bool:
    """Return whether changing a part of the field changes the output."""
    torch.manual_seed(3)
    lr = image(field.mu.shape[2], field.mu.shape[3])
    return not torch.equal(model.reconstruct(lr, field), model.reconstruct(lr, dataclasses.replace(field, **changes)))


@pytest.mark.parametrize(
    ("changes", "severity_matters", "mu_matters"),
    [
        pytest.param({}, True, True, id="whole"),
        pytest.param({"modulation_shift": True}, True, True, id="with-beta"),
        pytest.param({"spatial_modulation": False}, False, True, id="no-spatial-modulation"),
        pytest.param({"channel_modulation": False}, True, False, id="no-channel-modulation"),
        pytest.param({"spatial_modulation": False, "channel_modulation": False}, False, False, id="neither"),
    ],
)
def test_the_field_acts_through_the_paths_that_are_on(
    changes: dict[str, Any],
    severity_matters: bool,
    mu_matters: bool,
    small_config: Small,
    perturb_parameters: PerturbParameters,
    random_field: RandomField,
) -> None:
    config = small_config(**changes)
    model, field = perturb_parameters(SAVL(config)), random_field(config, 7, 10)
    assert field.severity is not None
    assert influence(model, field, severity=2 - field.severity) == severity_matters, "the spatial path"
    assert influence(model, field, mu=-field.mu) == mu_matters, "the channel path"


def test_only_mean_and_severity_of_a_field_reach_the_image(network: SAVL) -> None:
    field = network.estimate(image(7, 10))
    assert field is not None
    others = {name: torch.full_like(getattr(field, name), torch.nan) for name in ("logvar", "sample", "kl", "variance")}
    assert not influence(network, field, **others)


def parameter_shapes(config: SAVLConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in SAVL(config).named_parameters()}


def test_ablations_change_their_own_parameters_only(small_config: Small) -> None:
    whole = parameter_shapes(small_config())
    guidance = {name for name in whole if ".guidance." in name}
    head = {"estimator.head.weight", "estimator.head.bias"}
    degradation = {name for name in whole if name.startswith("estimator.") or ".dscas." in name}
    assert len(guidance) == 2 * 5
    assert len(degradation) > len(guidance) + len(head)

    def changed(**changes: Any) -> tuple[set[str], set[str]]:
        """Return the names of parameters that are removed, and of those whose shape differs."""
        ablated = parameter_shapes(small_config(**changes))
        assert set(ablated) <= set(whole)
        return set(whole) - set(ablated), {name for name in ablated if ablated[name] != whole[name]}

    assert changed(spatial_modulation=False) == (set(), set())
    assert changed(channel_modulation=False) == (guidance, set())
    assert changed(modulation_shift=True) == (set(), guidance)
    assert changed(degradation_code="deterministic") == (set(), head)
    assert changed(degradation_code="none") == (degradation, set())


def test_a_deterministic_code_has_a_mean_and_no_severity(
    small_config: Small, perturb_parameters: PerturbParameters, severities_seen: list[Tensor]
) -> None:
    model = perturb_parameters(SAVL(small_config(degradation_code="deterministic")))
    _, field = model(image(), return_field=True)
    assert field.mu.shape == (1, 6, 7, 10)
    assert (field.logvar, field.kl, field.severity, field.variance) == (None, None, None, None)
    assert not severities_seen, "a deterministic code has no severity to attend by"
    assert influence(model, field, mu=-field.mu), "the code must still modulate channels"


def test_without_a_degradation_code_there_is_no_estimator_no_dsca_and_no_field(small_config: Small) -> None:
    model = SAVL(small_config(degradation_code="none")).eval()
    unexpected = [type(module).__name__ for module in model.modules() if isinstance(module, DSCA | AmortizedEstimator)]
    assert not unexpected
    sr, field = model(image().float(), return_field=True)
    assert sr.shape == (1, 3, 28, 40)
    assert field is None
    assert model.estimate(image().float()) is None


# Attention, posterior and modulation live in savl.ops


class OperatorLog(TorchDispatchMode):
    """Record the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def attention_or_sampling(names: set[str]) -> set[str]:
    """Return the operators that only attention, the posterior or its noise needs."""
    telling = ("softmax", "scaled_dot_product", "var_mean", "roll", "unfold", "rand", "normal")
    return {name for name in names if name in ("exp", "expm1") or any(word in name for word in telling)}


def test_attention_posterior_and_modulation_are_called_through_savl_ops_alone(
    network: SAVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    lr = image(8, 8)
    with OperatorLog() as log:
        network(lr)
    assert {"_softmax", "exp", "var_mean", "roll", "unfold"} <= attention_or_sampling(log.names), (
        "the log misses what it looks for"
    )

    calls: dict[str, int] = dict.fromkeys(
        ("window_attention", "overlapping_window_attention", "channel_modulation", "gaussian_posterior"), 0
    )

    def stand_in(name: str, answer: Callable[..., Any]) -> None:
        def called(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return answer(*args, **kwargs)

        monkeypatch.setattr(ops, name, called)

    stand_in("window_attention", lambda qkv, *_, **__: qkv[..., 24:])
    stand_in("overlapping_window_attention", lambda q, *_, **__: q)
    stand_in("channel_modulation", lambda attended, gamma, beta, residual, **_: residual)
    pixels = torch.zeros(1, 8, 8, dtype=torch.float64)
    stand_in("gaussian_posterior", lambda mu, *_, **__: ops.GaussianPosterior(mu, *(pixels,) * 5))
    with OperatorLog() as log:
        network(lr)

    # Groups of 2 and 1 HABs: 3 HABs and 5 DSCAs attend, 2 OCABs attend with overlap, 5 DSCAs modulate.
    assert calls == {
        "window_attention": 8,
        "overlapping_window_attention": 2,
        "channel_modulation": 5,
        "gaussian_posterior": 1,
    }
    outside = attention_or_sampling(log.names)
    assert not outside, f"the network itself runs {outside}"
