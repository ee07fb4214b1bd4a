"""DA-RHAG: [DSCA → HAB] × depth → DSCA → OCAB → conv, with a residual around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from savl.network import DARHAG, DSCA, HAB, OCAB, SAVLConfig

Small = Callable[..., SAVLConfig]
Awaken = Callable[[Any], Any]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 8, 12, 12, dtype=torch.float64)
    mu = torch.randn(2, 8, 12, 6, dtype=torch.float64)
    severity = 2 * torch.rand(2, 8, 12, dtype=torch.float64)
    return x, mu, severity


def stages_run_by(group: DARHAG, *arguments: Tensor | None) -> list[nn.Module]:
    """The blocks in the order in which a forward pass calls them."""
    called: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: called.append(module))
        for module in group.modules()
        if isinstance(module, DSCA | HAB | OCAB) or module is group.conv
    ]
    group(*arguments)
    for hook in hooks:
        hook.remove()
    return called


def test_a_dsca_comes_before_every_hab_and_before_the_ocab(small_config: Small) -> None:
    group = DARHAG(small_config(), [0.0] * 3).double()
    kinds = [type(module).__name__ for module in stages_run_by(group, *inputs())]
    assert kinds == ["DSCA", "HAB"] * 3 + ["DSCA", "OCAB", "ChannelsLastConv2d"]


def test_without_a_degradation_code_the_group_is_that_of_hat(small_config: Small) -> None:
    group = DARHAG(small_config(degradation_code="none"), [0.0] * 3).double()
    x, _, _ = inputs()
    kinds = [type(module).__name__ for module in stages_run_by(group, x, None, None)]
    assert kinds == ["HAB"] * 3 + ["OCAB", "ChannelsLastConv2d"]
    assert not any("dsca" in name for name, _ in group.named_parameters())


def test_the_group_is_its_stages_one_after_another_around_a_residual(small_config: Small, awaken: Awaken) -> None:
    group = awaken(DARHAG(small_config(), [0.0, 0.0]))
    x, mu, severity = inputs()
    features = x
    for dsca, block in zip(group.dscas, [*group.habs, group.ocab], strict=True):
        features = block(dsca(features, mu, severity))
    expected = x + group.conv(features)
    torch.testing.assert_close(group(x, mu, severity), expected, rtol=0, atol=1e-12)


def test_windows_shift_in_every_second_block_and_dsca_takes_the_other_partition(small_config: Small) -> None:
    group = DARHAG(small_config(), [0.0] * 4)
    assert [hab.shift for hab in group.habs] == [0, 2, 0, 2]
    assert [dsca.shift for dsca in group.dscas] == [2, 0, 2, 0, 2], "the last one stands before the unshifted OCAB"


def test_every_dsca_has_its_own_parameters(small_config: Small) -> None:
    group = DARHAG(small_config(), [0.0] * 2)
    owned = [parameter for dsca in group.dscas for parameter in dsca.parameters()]
    assert len({id(parameter) for parameter in owned}) == len(owned)
    assert len(list(group.parameters())) == len({id(parameter) for parameter in group.parameters()})


def test_drop_paths_go_to_the_habs_in_order(small_config: Small) -> None:
    group = DARHAG(small_config(), [0.0, 0.1, 0.3])
    assert [hab.drop_path.probability for hab in group.habs] == [0.0, 0.1, 0.3]


@pytest.mark.parametrize("code", ["variational", "none"])
def test_a_group_whose_convolution_is_silent_is_the_identity(code: str, small_config: Small, awaken: Awaken) -> None:
    group = awaken(DARHAG(small_config(degradation_code=code), [0.0]))
    with torch.no_grad():
        group.conv.weight.zero_()
        group.conv.bias.zero_()
    x, mu, severity = inputs()
    out = group(x, mu, severity) if code == "variational" else group(x, None, None)
    assert torch.equal(out, x)
