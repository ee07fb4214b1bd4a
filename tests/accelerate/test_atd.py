"""ATD of spandrel: windowed, category and dictionary attention.

Rounding decides which category a token has when two are equally close, and then changes a whole group of tokens. In
float32 the layers are therefore compared one by one, on the same inputs. In float64 whole networks are.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from checks import SIZES, drawn
from copies import renamed
from gradients import check_gradients
from spandrel_import import architecture
from torch import Tensor, nn

from savl.accelerate import AccelerationReport, accelerate
from savl.ops.equivalence import Budget, measure


def atd(**settings: object) -> nn.Module:
    sizes = {"img_size": 16, "embed_dim": 12, "depths": (2,), "num_heads": (2,), "window_size": 8, "upscale": 2}
    more = {"category_size": 24, "num_tokens": 16, "reducted_dim": 4, "upsampler": "pixelshuffledirect"}
    return drawn(architecture("ATD", "atd_arch").ATD(**{**sizes, **more, **settings}))


def layers(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if hasattr(module, "attn_aca")]


def single(value: Any) -> Any:
    """Return arguments in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: single(each) for key, each in value.items()}
    return tuple(single(each) for each in value) if isinstance(value, tuple) else value


def exact(value: Any) -> Any:
    """Return arguments in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return {key: exact(each) for key, each in value.items()} if isinstance(value, dict) else value


@torch.no_grad()
def check_layers(network: nn.Module) -> AccelerationReport:
    """Compare every layer with the original by the rule of equivalence, on the inputs that it has in the network."""
    original, reference = copy.deepcopy(network), copy.deepcopy(network).double()
    report = accelerate(network)
    budgets: dict[str, list[Budget]] = {}
    calls = 0
    triples = list(zip(layers(network), layers(original), layers(reference), strict=True))
    assert report.served == len(triples), report
    inputs: dict[nn.Module, tuple[Any, ...]] = {}
    for _, _, layer in triples:
        layer.register_forward_pre_hook(lambda layer, args: inputs.update({layer: args}))
    for batch, height, width in SIZES:
        reference(torch.rand(batch, 3, height, width, dtype=torch.float64))
        network(torch.rand(batch, 3, height, width))
        for fused, eager, layer in triples:
            arguments = single(inputs[layer])
            wanted = layer(*map(exact, arguments))
            for name, mine, theirs, value in zip(("tokens", "dictionary"), fused(*arguments), eager(*arguments), wanted,
                                                 strict=True):  # fmt: skip
                budgets.setdefault(name, []).append(measure(name, mine, theirs, value, 4096))
        calls += 2 * len(triples)  # in the network, and alone
    served, fallen_back = report.calls()
    assert (served, dict(fallen_back)) == (calls, {}), report
    for each in budgets.values():
        assert Budget.pooled(each).kept, Budget.pooled(each)
    return report


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window_size": 4, "num_heads": (3,), "category_size": 1024},
        {"qkv_bias": False, "category_size": 32, "convffn_kernel_size": 7},
    ],
    ids=["incomplete groups", "one group", "no bias"],
)
def test_atd_computes_the_same(settings: dict[str, object]) -> None:
    check_layers(atd(**settings))
    for size in SIZES[1:]:
        check_gradients(atd(**settings), 2, size)


def test_scales_above_the_largest_are_clamped() -> None:
    network = atd()
    with torch.no_grad():
        for layer in layers(network):
            layer.attn_aca.logit_scale.fill_(6.0)
            layer.attn_aca.proj.weight *= 0.1
    check_gradients(network, 2, (1, 16, 16))


def test_atd_in_training_mode_passes_the_proof_with_gradients() -> None:
    network = atd().train()
    report = accelerate(network)
    assert report.served == 2, report


def test_atd_in_bfloat16_passes_the_proof() -> None:
    assert accelerate(atd().bfloat16()).served == 2


def test_networks_made_or_called_in_inference_mode_are_served() -> None:
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            network, image = atd().double(), torch.rand(1, 3, 16, 16, dtype=torch.float64)
        with torch.inference_mode():
            expected = network(image)
            report = accelerate(network)
            for _ in range(2):
                torch.testing.assert_close(network(image), expected, rtol=0, atol=1e-10)
        assert report.calls() == (4, {})


def test_copies_with_other_names_of_classes_are_served() -> None:
    check_layers(renamed(atd()))


def test_a_mask_that_is_no_shift_mask_falls_back() -> None:
    network = atd()
    report = accelerate(network)
    layer = next(each for each in layers(network) if each.shift_size > 0)
    params = {"attn_mask": -torch.rand(4, 64, 64), "rpi_sa": network.relative_position_index_SA}
    tokens, dictionary = torch.randn(1, 256, 12), torch.randn(1, 16, 12)
    with torch.no_grad():
        mine = layer(tokens, dictionary, (16, 16), params)
        report.undo()
        theirs = layer(tokens, dictionary, (16, 16), params)
    assert report.calls()[1]["its mask is unknown"] == 1
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_a_scale_of_its_own_and_another_convolution_are_left_alone() -> None:
    network = atd()
    first, second = layers(network)
    first.attn_win.scale = 0.5
    second.convffn.dwconv.depthwise_conv[1] = nn.SiLU()
    report = accelerate(network)
    assert report.served == 0
    assert "its scale is 0.5" in str(report)
    assert "its norms or its ConvFFN are of other kinds" in str(report)
