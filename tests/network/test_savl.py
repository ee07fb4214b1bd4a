"""The SAVL network: any image size, every ablation, one place for its attention, and gradients everywhere."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from savl import ops
from savl.network import CONFIGS, DSCA, HAB, SAVL, AmortizedEstimator, DegradationField, SAVLConfig
from savl.network import reflect_pad_to_multiple as pad
from savl.network.savl import bicubic_upscale

Small = Callable[..., SAVLConfig]
Awaken = Callable[[Any], Any]
RandomField = Callable[..., DegradationField]


@pytest.fixture(scope="module")
def network(small_config: Small, awaken: Awaken) -> SAVL:
    """The small network, awake, float64, in evaluation mode."""
    torch.manual_seed(0)
    return awaken(SAVL(small_config())).requires_grad_(False)


@pytest.fixture(scope="module")
def tiny() -> SAVL:
    """savl-tiny with parameters moved off their initial values, float32, in evaluation mode."""
    torch.manual_seed(0)
    model = SAVL(CONFIGS["savl-tiny"]).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    return model


def image(height: int = 7, width: int = 10, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, height, width, dtype=torch.float64)


# Sizes and scales


@given(height=st.integers(1, 21), width=st.integers(1, 21), batch=st.integers(1, 2))
@hypothesis_settings(max_examples=40)
def test_any_image_from_one_pixel_up_is_upscaled(network: SAVL, height: int, width: int, batch: int) -> None:
    sr, field = network(image(height, width, batch), return_field=True)
    assert sr.shape == (batch, 3, 4 * height, 4 * width)
    assert torch.isfinite(sr).all()
    assert field is not None
    assert field.mu.shape == (batch, 6, height, width)
    assert field.severity is not None
    assert field.severity.shape == (batch, height, width)


@given(height=st.integers(1, 24), width=st.integers(1, 24))
@hypothesis_settings(max_examples=10)
def test_savl_tiny_upscales_any_image(tiny: SAVL, height: int, width: int) -> None:
    sr = tiny(image(height, width).float())
    assert sr.shape == (1, 3, 4 * height, 4 * width)
    assert torch.isfinite(sr).all()


@pytest.mark.parametrize("upsampler", ["pixelshuffle", "pixelshuffledirect"])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_every_scale_can_be_built(scale: int, upsampler: str, small_config: Small) -> None:
    model = SAVL(small_config(scale=scale, upsampler=upsampler)).eval()
    assert model(image(5, 6).float()).shape == (1, 3, 5 * scale, 6 * scale)


@pytest.mark.parametrize(("height", "width"), [(5, 6), (1, 1), (3, 9)])
def test_padding_is_mirrored_image_and_is_cut_off_again(
    height: int, width: int, network: SAVL, random_field: RandomField
) -> None:
    lr, field = image(height, width), random_field(network.config, height, width)
    assert field.severity is not None
    padded_field = DegradationField(mu=pad(field.mu, 4), severity=pad(field.severity, 4))
    whole = network.reconstruct(pad(lr, 4), padded_field)
    expected = whole[..., : 4 * height, : 4 * width]
    torch.testing.assert_close(network.reconstruct(lr, field), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("image_residual", [False, True])
def test_an_empty_batch_gives_an_empty_batch(image_residual: bool, small_config: Small) -> None:
    model = SAVL(small_config(degradation_code="none", image_residual=image_residual))
    assert model(torch.rand(0, 3, 5, 6)).shape == (0, 3, 20, 24)


# What the output is made of


@pytest.mark.parametrize("code", ["variational", "none"])
def test_the_network_is_its_stages_one_after_another(
    code: str, small_config: Small, awaken: Awaken, random_field: RandomField
) -> None:
    model = awaken(SAVL(small_config(degradation_code=code)))
    lr = image(8, 12)
    field = random_field(model.config, 8, 12) if code == "variational" else None
    mu = None if field is None else field.mu.permute(0, 2, 3, 1)
    severity = None if field is None else field.severity

    shallow = model.conv_first((lr - model.rgb_mean).permute(0, 2, 3, 1))
    deep = model.norm_first(shallow)
    for group in model.groups:
        deep = group(deep, mu, severity)
    features = shallow + model.conv_last(model.norm_last(deep))
    expected = model.upsampler(features.permute(0, 3, 1, 2)) + model.rgb_mean

    torch.testing.assert_close(model.reconstruct(lr, field), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("scale", "factors"), [(2, [2]), (3, [3]), (4, [2, 2]), (8, [2, 2, 2])])
def test_the_pixelshuffle_upsampler_is_that_of_hat(
    scale: int, factors: list[int], small_config: Small, awaken: Awaken
) -> None:
    upsampler = awaken(SAVL(small_config(scale=scale))).upsampler
    features = torch.randn(1, 12, 3, 4, dtype=torch.float64)
    convolutions = [module for module in upsampler.modules() if isinstance(module, nn.Conv2d)]
    first, *stages, last = convolutions
    expected = F.leaky_relu(F.conv2d(features, first.weight, first.bias, padding=1), 0.01)
    for convolution, factor in zip(stages, factors, strict=True):
        expected = F.pixel_shuffle(F.conv2d(expected, convolution.weight, convolution.bias, padding=1), factor)
    expected = F.conv2d(expected, last.weight, last.bias, padding=1)
    torch.testing.assert_close(upsampler(features), expected, rtol=0, atol=1e-12)


def test_the_direct_upsampler_is_one_convolution_and_one_shuffle(small_config: Small, awaken: Awaken) -> None:
    upsampler = awaken(SAVL(small_config(upsampler="pixelshuffledirect"))).upsampler
    features = torch.randn(1, 12, 3, 4, dtype=torch.float64)
    (convolution,) = (module for module in upsampler.modules() if isinstance(module, nn.Conv2d))
    expected = F.pixel_shuffle(F.conv2d(features, convolution.weight, convolution.bias, padding=1), 4)
    torch.testing.assert_close(upsampler(features), expected, rtol=0, atol=1e-12)


def test_the_colours_of_a_network_without_features_are_the_mean(small_config: Small) -> None:
    model = SAVL(small_config(rgb_mean=(0.1, 0.2, 0.3)))
    with torch.no_grad():
        for parameter in model.upsampler.to_image.parameters():
            parameter.zero_()
    sr = model(torch.rand(1, 3, 4, 4))
    torch.testing.assert_close(sr, torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1).expand_as(sr))


def test_only_the_difference_from_the_mean_colour_is_looked_at(small_config: Small, awaken: Awaken) -> None:
    low = awaken(SAVL(small_config(rgb_mean=(0.1, 0.1, 0.1))))
    high = copy.deepcopy(low)
    high.rgb_mean += 0.5
    lr = image()
    torch.testing.assert_close(high(lr + 0.5), low(lr) + 0.5, rtol=0, atol=1e-12)


def test_a_fresh_network_with_image_residual_is_bicubic_interpolation() -> None:
    model = SAVL(CONFIGS["savl-tiny"]).eval()
    lr = torch.rand(1, 3, 9, 6)
    sr = model(lr)
    for channel in range(3):
        picture = Image.fromarray(lr[0, channel].numpy())
        expected = np.asarray(picture.resize((24, 36), Image.Resampling.BICUBIC))
        torch.testing.assert_close(sr[0, channel].detach(), torch.from_numpy(expected.copy()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_bicubic_upscaling_leaves_a_uniform_image_uniform(scale: int) -> None:
    white = torch.ones(1, 3, 5, 1)
    torch.testing.assert_close(bicubic_upscale(white, scale), torch.ones(1, 3, 5 * scale, scale), rtol=0, atol=1e-6)


def test_bicubic_upscaling_of_bfloat16_is_computed_in_float32() -> None:
    lr = torch.rand(1, 3, 4, 4).bfloat16()
    assert torch.equal(bicubic_upscale(lr, 4), bicubic_upscale(lr.float(), 4).bfloat16())


def test_the_image_residual_is_added_to_what_the_network_learns(small_config: Small, awaken: Awaken) -> None:
    with_residual = awaken(SAVL(small_config(image_residual=True)))
    without = SAVL(small_config()).double().eval()
    without.load_state_dict(with_residual.state_dict())
    lr = image()
    learned = without(lr) - without.rgb_mean
    torch.testing.assert_close(with_residual(lr), learned + bicubic_upscale(lr, 4), rtol=0, atol=1e-12)


# The field


def test_return_field_gives_the_output_and_the_field_of_the_image(network: SAVL) -> None:
    lr = image()
    sr, field = network(lr, return_field=True)
    assert torch.equal(sr, network(lr))
    estimated = network.estimate(lr)
    assert field is not None
    assert estimated is not None
    for name in ("mu", "logvar", "severity", "kl", "variance", "sample"):
        assert torch.equal(getattr(field, name), getattr(estimated, name)), name


def test_reconstructing_with_the_estimated_field_is_the_whole_network(network: SAVL) -> None:
    lr = image()
    assert torch.equal(network.reconstruct(lr, network.estimate(lr)), network(lr))


def test_a_seed_changes_the_sample_of_the_field_and_not_the_image(network: SAVL) -> None:
    lr = image()
    quiet, seeded = network.estimate(lr), network.estimate(lr, seed=4)
    assert quiet is not None
    assert seeded is not None
    assert torch.equal(quiet.sample, quiet.mu)
    assert not torch.equal(seeded.sample, seeded.mu)
    assert torch.equal(network.reconstruct(lr, quiet), network.reconstruct(lr, seeded))


def severities_seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The severity maps that reach window attention from now on."""
    seen: list[Tensor] = []
    attend = ops.window_attention

    def spy(qkv: Tensor, bias_table: Tensor, severity: Tensor | None = None, **windows: int) -> Tensor:
        if severity is not None:
            seen.append(severity)
        return attend(qkv, bias_table, severity, **windows)

    monkeypatch.setattr(ops, "window_attention", spy)
    return seen


def test_severity_is_normalised_over_the_whole_image_before_any_padding(
    network: SAVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    lr = image(5, 9)
    lr[..., :4] = 0.1  # a flat half, so that the padding would shift the statistics
    seen = severities_seen(monkeypatch)
    _, field = network(lr, return_field=True)
    assert field is not None
    assert field.variance is not None
    severity = ops.normalise_severity(field.variance, *ops.variance_statistics(field.variance))
    padded = pad(field.variance, 4)
    of_padded = ops.normalise_severity(padded, *ops.variance_statistics(padded))
    assert not torch.allclose(of_padded, pad(severity, 4)), "this image cannot tell the two apart"
    assert len(seen) == 5, "one for every DSCA: 2 + 1 before HABs, 2 before OCABs"
    for severity_map in seen:
        torch.testing.assert_close(severity_map, pad(severity, 4), rtol=0, atol=1e-12)


def test_a_tile_keeps_the_severity_it_has_in_the_whole_image(network: SAVL, monkeypatch: pytest.MonkeyPatch) -> None:
    field = network.estimate(image(12, 16))
    assert field is not None
    assert field.severity is not None
    tile = DegradationField(mu=field.mu[..., 4:8, 8:16], severity=field.severity[:, 4:8, 8:16])
    seen = severities_seen(monkeypatch)
    network.reconstruct(image(4, 8), tile)
    assert len(seen) == 5
    assert all(torch.equal(severity_map, field.severity[:, 4:8, 8:16]) for severity_map in seen)


# Ablations


def influence(model: SAVL, field: DegradationField, **changes: Tensor) -> bool:
    """Whether changing a part of the field changes the output."""
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
    awaken: Awaken,
    random_field: RandomField,
) -> None:
    config = small_config(**changes)
    model, field = awaken(SAVL(config)), random_field(config, 7, 10)
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
        """Names gone, and names whose shape is another."""
        ablated = parameter_shapes(small_config(**changes))
        assert set(ablated) <= set(whole)
        return set(whole) - set(ablated), {name for name in ablated if ablated[name] != whole[name]}

    assert changed(spatial_modulation=False) == (set(), set())
    assert changed(channel_modulation=False) == (guidance, set())
    assert changed(modulation_shift=True) == (set(), guidance)
    assert changed(degradation_code="deterministic") == (set(), head)
    assert changed(degradation_code="none") == (degradation, set())


def test_a_deterministic_code_has_a_mean_and_no_severity(
    small_config: Small, awaken: Awaken, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = awaken(SAVL(small_config(degradation_code="deterministic")))
    seen = severities_seen(monkeypatch)
    _, field = model(image(), return_field=True)
    assert field.mu.shape == (1, 6, 7, 10)
    assert (field.logvar, field.kl, field.severity, field.variance) == (None, None, None, None)
    assert not seen, "a deterministic code has no severity to attend by"
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
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def attention_or_sampling(names: set[str]) -> set[str]:
    """Those operators that only attention, the posterior or its noise would need."""
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
    stand_in("channel_modulation", lambda attended, gamma, beta, residual: residual)
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


# Batches, dtypes and determinism


def test_images_of_a_batch_do_not_see_each_other(network: SAVL) -> None:
    lr = image(6, 9, batch=3)
    lr[0] *= 0.1
    batch, field = network(lr, return_field=True)
    for index in range(3):
        alone, own = network(lr[index : index + 1], return_field=True)
        torch.testing.assert_close(batch[index], alone[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(field.severity[index], own.severity[0], rtol=0, atol=1e-10)


def test_inputs_in_any_memory_layout_give_the_same_output(network: SAVL) -> None:
    lr = image(batch=2)
    expected = network(lr)
    torch.testing.assert_close(network(lr.contiguous(memory_format=torch.channels_last)), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(network(lr.mT.contiguous().mT), expected, rtol=0, atol=1e-12)


def test_the_same_seed_builds_the_same_network_and_evaluation_is_deterministic(small_config: Small) -> None:
    lr = image().float()
    outputs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        model = SAVL(small_config()).eval()
        outputs.append(model(lr))
        assert torch.equal(model(lr), outputs[-1])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_the_input_is_left_alone(network: SAVL) -> None:
    lr = image()
    before = lr.clone()
    network(lr)
    assert torch.equal(lr, before)


@pytest.mark.parametrize("code", ["variational", "deterministic", "none"])
def test_a_bfloat16_network_runs_and_stays_finite(code: str, small_config: Small) -> None:
    model = SAVL(small_config(degradation_code=code, image_residual=True)).bfloat16().eval()
    sr, field = model(image().bfloat16(), return_field=True)
    assert sr.dtype == torch.bfloat16
    assert torch.isfinite(sr).all()
    if field is not None:
        assert torch.isfinite(field.mu).all()


def test_autocast_runs_forward_and_backward(tiny: SAVL) -> None:
    model = copy.deepcopy(tiny).train().requires_grad_(True)
    lr = image(9, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        sr, field = model(lr, return_field=True)
        assert field is not None
        assert field.mu.dtype == torch.bfloat16, "autocast had no effect on the estimator"
        loss = sr.float().square().mean() + field.kl.float().mean()
    loss.backward()
    assert sr.dtype == torch.float32, "the image residual keeps the output in float32"
    not_finite = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not not_finite, f"gradients of {not_finite} are missing or not finite"
    # bfloat16 keeps 8 bits; the network is a correction of the bicubic image, which stays float32.
    with torch.no_grad():
        correction = tiny(lr) - bicubic_upscale(lr, 4)
        error = (sr.detach() - tiny(lr)).abs().max() / correction.abs().max()
    assert float(error) < 0.25, f"autocast moves the correction by {100 * float(error):.0f} %"


# Training


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="variational"),
        pytest.param({"modulation_shift": True, "image_residual": True}, id="with-beta-and-residual"),
        pytest.param({"degradation_code": "deterministic", "upsampler": "pixelshuffledirect"}, id="deterministic"),
        pytest.param({"degradation_code": "none"}, id="hat"),
    ],
)
def test_gradients_of_the_image_reach_every_parameter(
    changes: dict[str, Any], small_config: Small, awaken: Awaken
) -> None:
    # A wide squeeze: with three hidden units a ReLU of the channel attention may be dead for a whole batch.
    model = awaken(SAVL(small_config(cab_squeeze=1, **changes))).train()
    sr = model(image(7, 10, batch=2))
    (sr * torch.randn_like(sr)).sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent, f"no gradient reaches {silent}"


def test_severity_carries_gradients_back_to_the_log_variance(network: SAVL) -> None:
    model = copy.deepcopy(network).requires_grad_(True)
    sr = model(image(7, 10))
    (sr * torch.randn_like(sr)).sum().backward()
    assert model.estimator is not None
    logvar_rows = model.estimator.head.weight.grad[6:]
    assert bool(logvar_rows.any()), "the variance half of the estimator's head learns nothing from the image"


def test_the_initial_guidance_is_zero_and_all_else_is_not(small_config: Small) -> None:
    model = SAVL(small_config(modulation_shift=True))
    zero = {
        name
        for name, p in model.named_parameters()
        if p.dim() > 1 and not p.any()  # biases start at zero anyway
    }
    assert zero == {name for name, _ in model.named_parameters() if name.endswith("guidance.project.weight")}


def test_drop_path_grows_along_the_network_from_zero_to_its_setting(small_config: Small) -> None:
    model = SAVL(small_config(depths=(2, 3), drop_path=0.2))
    rates = [module.drop_path.probability for module in model.modules() if isinstance(module, HAB)]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_drop_path_acts_in_training_and_not_in_evaluation(small_config: Small, awaken: Awaken) -> None:
    model = awaken(SAVL(small_config(drop_path=0.5)))
    still = awaken(SAVL(small_config(drop_path=0.0)))
    still.load_state_dict(model.state_dict())
    lr = image(batch=4)
    assert torch.equal(model(lr), model(lr))
    assert torch.equal(model(lr), still(lr))
    assert not torch.equal(model.train()(lr), model(lr)), "training with drop_path should be random"
    assert torch.equal(still.train()(lr), still.eval()(lr)), "training without drop_path should not be"


# State


def test_the_state_holds_parameters_and_nothing_else(small_config: Small) -> None:
    model = SAVL(small_config())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_a_network_built_anew_from_configuration_and_state_gives_the_same_image(network: SAVL) -> None:
    config = SAVLConfig.from_dict(network.config.to_dict())
    again = SAVL(config).double().eval()
    again.load_state_dict(network.state_dict())
    lr = image()
    assert torch.equal(again(lr), network(lr))


def test_a_network_can_be_built_without_memory_and_filled_afterwards(network: SAVL) -> None:
    with torch.device("meta"):
        empty = SAVL(network.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert {name: p.shape for name, p in empty.named_parameters()} == {
        name: p.shape for name, p in network.named_parameters()
    }


# Errors


@pytest.mark.parametrize(
    ("lr", "error", "fragments"),
    [
        pytest.param("photo.jpg", TypeError, ["str", "(B, 3, h, w)", "[0, 1]"], id="path"),
        pytest.param(np.zeros((1, 3, 4, 4), np.float32), TypeError, ["ndarray", "torch.Tensor"], id="numpy"),
        pytest.param(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, ["uint8", "floating"], id="uint8"),
        pytest.param(torch.zeros(3, 4, 4), ValueError, ["(3, 4, 4)", "(B, 3, h, w)"], id="no-batch"),
        pytest.param(torch.zeros(1, 1, 4, 4), ValueError, ["(1, 1, 4, 4)", "(B, 3, h, w)"], id="gray"),
        pytest.param(torch.zeros(1, 4, 4, 4), ValueError, ["(1, 4, 4, 4)", "(B, 3, h, w)"], id="rgba"),
        pytest.param(torch.zeros(1, 4, 4, 3), ValueError, ["(1, 4, 4, 3)", "(B, 3, h, w)"], id="channels-last"),
        pytest.param(torch.zeros(1, 3, 0, 4), ValueError, ["(1, 3, 0, 4)", "at least 1 pixel"], id="no-rows"),
        pytest.param(torch.zeros(1, 3, 4, 0), ValueError, ["(1, 3, 4, 0)", "at least 1 pixel"], id="no-columns"),
    ],
)
def test_what_is_no_image_is_named(network: SAVL, lr: Any, error: type[Exception], fragments: list[str]) -> None:
    with pytest.raises(error, match="^lr must") as caught:
        network(lr)
    missing = [fragment for fragment in fragments if fragment not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"


def test_a_field_that_is_missing_or_not_expected_is_named(
    network: SAVL, small_config: Small, random_field: RandomField
) -> None:
    with pytest.raises(ValueError, match="field must be a DegradationField .*='variational', got NoneType"):
        network.reconstruct(image(), None)
    plain = SAVL(small_config(degradation_code="none"))
    with pytest.raises(ValueError, match="field must be None for degradation_code='none', got DegradationField"):
        plain.reconstruct(image().float(), random_field(plain.config, 7, 10))


@pytest.mark.parametrize(
    ("field_size", "fragment"),
    [
        # 5×9 and 7×10 are both padded to 8×12, so that nothing further down would notice.
        pytest.param({"height": 5, "width": 9}, r"field.mu .*\(1, 6, 7, 10\).*got \(1, 6, 5, 9\)", id="size"),
        pytest.param({"height": 7, "width": 10, "batch": 2}, r"field.mu .*got \(2, 6, 7, 10\)", id="batch"),
    ],
)
def test_a_field_of_another_size_is_named(
    network: SAVL, random_field: RandomField, field_size: dict[str, int], fragment: str
) -> None:
    with pytest.raises(ValueError, match=fragment):
        network.reconstruct(image(), random_field(network.config, **field_size))


def test_a_severity_of_another_size_is_named(network: SAVL, random_field: RandomField) -> None:
    field = random_field(network.config, 7, 10)
    wrong = dataclasses.replace(field, severity=torch.ones(1, 5, 9))
    with pytest.raises(ValueError, match=r"field.severity must have shape \(1, 7, 10\) to fit lr, got \(1, 5, 9\)"):
        network.reconstruct(image(), wrong)


def test_a_module_of_the_network_is_never_shared(network: SAVL) -> None:
    parameters = [parameter for module in network.modules() for parameter in module.parameters(recurse=False)]
    assert len({id(parameter) for parameter in parameters}) == len(parameters)
    assert isinstance(network.groups, nn.ModuleList)
