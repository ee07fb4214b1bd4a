"""The SAVL network: any image size, every scale, severity of the whole image, gradients, state and errors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from savl import ops
from savl.bicubic import bicubic_upscale
from savl.network import CONFIGS, HAB, SAVL, DegradationField, SAVLConfig
from savl.network import reflect_pad_to_multiple as pad

Small = Callable[..., SAVLConfig]
PerturbParameters = Callable[[Any], Any]
RandomField = Callable[..., DegradationField]


@pytest.fixture(scope="module")
def tiny() -> SAVL:
    """Return savl-tiny with parameters different from their initial values, float32, in evaluation mode."""
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


def test_severity_is_normalised_over_the_whole_image_before_any_padding(
    network: SAVL, severities_seen: list[Tensor]
) -> None:
    lr = image(5, 9)
    lr[..., :4] = 0.1  # a flat half, so that the padding would shift the statistics
    _, field = network(lr, return_field=True)
    assert field is not None
    assert field.variance is not None
    severity = ops.normalise_severity(field.variance, *ops.variance_statistics(field.variance))
    padded = pad(field.variance, 4)
    of_padded = ops.normalise_severity(padded, *ops.variance_statistics(padded))
    assert not torch.allclose(of_padded, pad(severity, 4)), "this image cannot tell the two apart"
    assert len(severities_seen) == 5, "one for every DSCA: 2 + 1 before HABs, 2 before OCABs"
    for severity_map in severities_seen:
        torch.testing.assert_close(severity_map, pad(severity, 4), rtol=0, atol=1e-12)


def test_a_tile_keeps_the_severity_it_has_in_the_whole_image(network: SAVL, severities_seen: list[Tensor]) -> None:
    field = network.estimate(image(12, 16))
    assert field is not None
    assert field.severity is not None
    tile = DegradationField(mu=field.mu[..., 4:8, 8:16], severity=field.severity[:, 4:8, 8:16])
    network.reconstruct(image(4, 8), tile)
    assert len(severities_seen) == 5
    assert all(torch.equal(severity_map, field.severity[:, 4:8, 8:16]) for severity_map in severities_seen)


# Batches, dtypes and determinism


def test_images_of_a_batch_do_not_affect_each_other(network: SAVL) -> None:
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


def test_the_input_is_not_modified(network: SAVL) -> None:
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
    changes: dict[str, Any], small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    # A wide squeeze: with three hidden units a ReLU of the channel attention may be dead for a whole batch.
    model = perturb_parameters(SAVL(small_config(cab_squeeze=1, **changes))).train()
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


def test_drop_path_acts_in_training_and_not_in_evaluation(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    model = perturb_parameters(SAVL(small_config(drop_path=0.5)))
    still = perturb_parameters(SAVL(small_config(drop_path=0.0)))
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
def test_an_input_that_is_not_an_image_is_refused_by_name(
    network: SAVL, lr: Any, error: type[Exception], fragments: list[str]
) -> None:
    with pytest.raises(error, match="^lr must") as caught:
        network(lr)
    missing = [fragment for fragment in fragments if fragment not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"


def test_a_field_that_is_missing_or_not_expected_is_reported(
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
        # 5×9 and 7×10 are both padded to 8×12, so only the check of the field can detect the difference.
        pytest.param({"height": 5, "width": 9}, r"field.mu .*\(1, 6, 7, 10\).*got \(1, 6, 5, 9\)", id="size"),
        pytest.param({"height": 7, "width": 10, "batch": 2}, r"field.mu .*got \(2, 6, 7, 10\)", id="batch"),
    ],
)
def test_a_field_of_another_size_is_reported(
    network: SAVL, random_field: RandomField, field_size: dict[str, int], fragment: str
) -> None:
    with pytest.raises(ValueError, match=fragment):
        network.reconstruct(image(), random_field(network.config, **field_size))


def test_a_severity_of_another_size_is_reported(network: SAVL, random_field: RandomField) -> None:
    field = random_field(network.config, 7, 10)
    wrong = dataclasses.replace(field, severity=torch.ones(1, 5, 9))
    with pytest.raises(ValueError, match=r"field.severity must have shape \(1, 7, 10\) to fit lr, got \(1, 5, 9\)"):
        network.reconstruct(image(), wrong)


def test_modules_of_the_network_are_not_shared(network: SAVL) -> None:
    parameters = [parameter for module in network.modules() for parameter in module.parameters(recurse=False)]
    assert len({id(parameter) for parameter in parameters}) == len(parameters)
    assert isinstance(network.groups, nn.ModuleList)


def test_an_image_of_another_dtype_than_the_network_is_reported(tiny: SAVL) -> None:
    with pytest.raises(TypeError, match=r"lr must have the dtype of the network, torch.float32, got torch.float64"):
        tiny(image())
    assert tiny(image().float()).dtype == torch.float32
