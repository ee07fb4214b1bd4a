"""From features to the image: the stages, the upsamplers and the image residual."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from savl import ops
from savl.bicubic import bicubic_upscale
from savl.network import CONFIGS, SAVL, DegradationField, SAVLConfig
from savl.network.savl import weight_before_shuffle

Small = Callable[..., SAVLConfig]
PerturbParameters = Callable[[Any], Any]
RandomField = Callable[..., DegradationField]


def image(height: int = 7, width: int = 10, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, height, width, dtype=torch.float64)


@pytest.mark.parametrize("code", ["variational", "none"])
def test_the_network_is_its_stages_one_after_another(
    code: str, small_config: Small, perturb_parameters: PerturbParameters, random_field: RandomField
) -> None:
    model = perturb_parameters(SAVL(small_config(degradation_code=code)))
    lr = image(8, 12)
    field = random_field(model.config, 8, 12) if code == "variational" else None
    mu = None if field is None else field.mu.permute(0, 2, 3, 1)
    severity = None if field is None else field.severity

    shallow = model.conv_first((lr - model.rgb_mean).permute(0, 2, 3, 1))
    deep = model.norm_first(shallow)
    for group in model.groups:
        deep = group(deep, mu, severity)
    features = shallow + model.conv_last(model.norm_last(deep))
    expected = model.upsampler(features) + model.rgb_mean

    torch.testing.assert_close(model.reconstruct(lr, field), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("scale", "factors"), [(2, [2]), (3, [3]), (4, [2, 2]), (8, [2, 2, 2])])
def test_the_pixelshuffle_upsampler_is_that_of_hat(
    scale: int, factors: list[int], small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    upsampler = perturb_parameters(SAVL(small_config(scale=scale))).upsampler
    features = torch.randn(1, 12, 3, 4, dtype=torch.float64)
    convolutions = [module for module in upsampler.modules() if isinstance(module, nn.Conv2d)]
    first, *stages, last = convolutions
    expected = F.leaky_relu(F.conv2d(features, first.weight, first.bias, padding=1), 0.01)
    for convolution, factor in zip(stages, factors, strict=True):
        expected = F.pixel_shuffle(F.conv2d(expected, convolution.weight, convolution.bias, padding=1), factor)
    expected = F.conv2d(expected, last.weight, last.bias, padding=1)
    torch.testing.assert_close(upsampler(features.permute(0, 2, 3, 1)), expected, rtol=0, atol=1e-12)


def test_the_direct_upsampler_is_one_convolution_and_one_shuffle(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    upsampler = perturb_parameters(SAVL(small_config(upsampler="pixelshuffledirect"))).upsampler
    features = torch.randn(1, 12, 3, 4, dtype=torch.float64)
    (convolution,) = (module for module in upsampler.modules() if isinstance(module, nn.Conv2d))
    expected = F.pixel_shuffle(F.conv2d(features, convolution.weight, convolution.bias, padding=1), 4)
    torch.testing.assert_close(upsampler(features.permute(0, 2, 3, 1)), expected, rtol=0, atol=1e-12)


def test_the_colours_of_a_network_without_features_are_the_mean(small_config: Small) -> None:
    model = SAVL(small_config(rgb_mean=(0.1, 0.2, 0.3)))
    with torch.no_grad():
        for parameter in model.upsampler.to_image.parameters():
            parameter.zero_()
    sr = model(torch.rand(1, 3, 4, 4))
    torch.testing.assert_close(sr, torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1).expand_as(sr))


def test_only_the_difference_from_the_mean_colour_matters(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    low = perturb_parameters(SAVL(small_config(rgb_mean=(0.1, 0.1, 0.1))))
    high = copy.deepcopy(low)
    high.rgb_mean += 0.5
    lr = image()
    torch.testing.assert_close(high(lr + 0.5), low(lr) + 0.5, rtol=0, atol=1e-12)


def test_an_untrained_network_with_image_residual_is_bicubic_interpolation() -> None:
    model = SAVL(CONFIGS["savl-tiny"]).eval()
    lr = torch.rand(1, 3, 9, 6)
    sr = model(lr)
    for channel in range(3):
        picture = Image.fromarray(lr[0, channel].numpy())
        expected = np.asarray(picture.resize((24, 36), Image.Resampling.BICUBIC))
        torch.testing.assert_close(sr[0, channel].detach(), torch.from_numpy(expected.copy()), rtol=0, atol=1e-5)


def test_the_image_residual_is_added_to_the_output(small_config: Small, perturb_parameters: PerturbParameters) -> None:
    with_residual = perturb_parameters(SAVL(small_config(image_residual=True)))
    without = SAVL(small_config()).double().eval()
    without.load_state_dict(with_residual.state_dict())
    lr = image()
    learned = without(lr) - without.rgb_mean
    torch.testing.assert_close(with_residual(lr), learned + bicubic_upscale(lr, 4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [2, 3])
def test_a_convolution_before_a_pixel_shuffle_equals_one_after_it(factor: int) -> None:
    weight = torch.randn(3, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    planes = torch.randn(2, 5 * factor**2, 4, 6, dtype=torch.float64)
    after = F.conv2d(F.pixel_shuffle(planes, factor), weight, padding=1)
    before = F.pixel_shuffle(F.conv2d(planes, weight_before_shuffle(weight, factor), padding=1), factor)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-12)
    gradient = torch.randn_like(after)
    expected, found = (torch.autograd.grad(each, weight, gradient)[0] for each in (after, before))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_fused_upsampler_computes_nothing_at_the_size_of_the_image(
    scale: int, small_config: Small, perturb_parameters: PerturbParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    upsampler = perturb_parameters(SAVL(small_config(scale=scale))).upsampler
    features = torch.randn(1, 3, 4, 12, dtype=torch.float64)
    expected = upsampler(features)
    heights, compute = [], ops.convolution

    def convolve(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        heights.append(x.shape[1])
        return compute(x, *arguments, **options)

    monkeypatch.setattr(ops, "fuses_convolution", lambda *_: True)
    monkeypatch.setattr(ops, "convolution", convolve)
    torch.testing.assert_close(upsampler(features), expected, rtol=0, atol=1e-12)
    assert max(heights) == 3 * scale // (3 if scale == 3 else 2)
