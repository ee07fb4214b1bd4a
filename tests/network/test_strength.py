"""The restoration strength: its map, what it does to the image, and the networks that have none."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import savl
from savl.bicubic import bicubic_upscale
from savl.network import SAVL, DegradationField, SAVLConfig

Small = Callable[..., SAVLConfig]
PerturbParameters = Callable[[Any], Any]

KINDS = pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="variational"),
        pytest.param({"image_residual": True, "upsampler": "pixelshuffledirect"}, id="image-residual"),
        pytest.param({"degradation_code": "deterministic"}, id="deterministic"),
    ],
)


@pytest.fixture
def build(small_config: Small, perturb_parameters: PerturbParameters) -> Callable[..., SAVL]:
    """Build a small network with a strength, its parameters away from zero, float64."""

    def network(**changes: Any) -> SAVL:
        torch.manual_seed(0)
        model: SAVL = perturb_parameters(SAVL(small_config(**{"restoration_strength": True} | changes)))
        return model.requires_grad_(False)

    return network


def image(height: int = 7, width: int = 10, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, height, width, dtype=torch.float64)


def estimated(model: SAVL, lr: Tensor) -> tuple[DegradationField, Tensor]:
    field = model.estimate(lr)
    assert field is not None
    assert field.strength is not None
    return field, field.strength


# The map


@KINDS
def test_the_initial_strength_is_095_everywhere(changes: dict[str, Any], small_config: Small) -> None:
    _, strength = estimated(SAVL(small_config(restoration_strength=True, **changes)), image(9, 6, batch=2).float())
    assert strength.shape == (2, 9, 6)
    torch.testing.assert_close(strength, torch.full_like(strength, 3.0).sigmoid())


@KINDS
def test_the_rest_of_the_network_begins_with_the_same_weights(changes: dict[str, Any], small_config: Small) -> None:
    states = []
    for strength in (False, True):
        torch.manual_seed(1)
        states.append(SAVL(small_config(restoration_strength=strength, **changes)).state_dict())
    without, with_strength = states
    assert all(torch.equal(without[name], with_strength[name]) for name in without)
    assert {name.split(".")[0] for name in with_strength.keys() - without.keys()} == {"strength"}


@KINDS
def test_the_map_follows_the_field_pixel_by_pixel(changes: dict[str, Any], build: Callable[..., SAVL]) -> None:
    model = build(**changes)
    field, strength = estimated(model, image(16, 16))
    assert 0 < float(strength.min()) < float(strength.max()) < 1
    assert model.strength is not None
    with torch.no_grad():
        moved = field.mu.clone()
        moved[..., 8, 8] += 1.0
        differs = (model.strength(moved, field.logvar) != strength)[0]
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[6:11, 6:11] = True
    assert torch.equal(differs, expected), "the average has 5×5 pixels"


def test_away_from_the_border_the_map_of_a_crop_is_the_crop_of_the_map(build: Callable[..., SAVL]) -> None:
    model, lr = build(), image(40, 40)
    margin = model.config.receptive_field // 2 + 2
    _, whole = estimated(model, lr)
    _, crop = estimated(model, lr[..., 4:36, 4:36])
    inner = slice(4 + margin, 36 - margin)
    expected, found = whole[..., inner, inner], crop[..., margin:-margin, margin:-margin]
    assert found.numel() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    wider = crop[..., margin - 1 : 1 - margin, margin - 1 : 1 - margin]
    assert not torch.allclose(wider, whole[..., 3 + margin : 37 - margin, 3 + margin : 37 - margin], rtol=0, atol=1e-12)


@KINDS
def test_no_gradient_of_the_strength_reaches_the_estimator(changes: dict[str, Any], build: Callable[..., SAVL]) -> None:
    model = build(**changes).requires_grad_(True)
    _, strength = estimated(model, image())
    strength.sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {
        f"strength.{part}" for part in ("expand.weight", "expand.bias", "contract.weight", "contract.bias")
    }


def test_the_image_trains_the_strength_and_still_the_estimator(build: Callable[..., SAVL]) -> None:
    model = build(cab_squeeze=1).requires_grad_(True)
    sr = model(image(7, 10, batch=2))
    (sr * torch.randn_like(sr)).sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_the_map_is_float32_under_autocast_and_in_a_bfloat16_network(build: Callable[..., SAVL]) -> None:
    model, lr = build().float(), image(20, 20).float()
    assert model.strength is not None
    with torch.autocast("cpu", torch.bfloat16):
        field, strength = estimated(model, lr)
    assert field.mu.dtype == torch.bfloat16
    assert strength.dtype == torch.float32
    assert field.logvar is not None
    assert torch.equal(strength, model.strength(field.mu.float(), field.logvar.float())), "computed in half precision"
    half = copy.deepcopy(model).bfloat16()
    _, strength = estimated(half, lr.bfloat16())
    assert strength.dtype == torch.float32
    assert strength.unique().numel() > 200, "rounded to bfloat16"
    for changes in ({}, {"image_residual": True}):
        narrow = build(**changes).bfloat16()
        assert narrow(lr.bfloat16()).dtype == torch.bfloat16
        assert torch.isfinite(narrow(lr.bfloat16(), strength=0.3)).all()


# The image


@KINDS
def test_strength_scales_the_difference_from_bicubic_interpolation(
    changes: dict[str, Any], build: Callable[..., SAVL]
) -> None:
    model, lr = build(**changes), image(7, 10, batch=2)
    field, own = estimated(model, lr)
    bicubic = bicubic_upscale(lr, 4)
    full = model.reconstruct(lr, dataclasses.replace(field, strength=None))
    assert torch.equal(model.reconstruct(lr, field, strength=1.0), full)
    assert torch.equal(model(lr, strength=1), full)
    assert torch.equal(model(lr, strength=0.0), bicubic)
    for number in (0.25, 0.5, 0.9):
        expected = bicubic + number * (full - bicubic)
        torch.testing.assert_close(model(lr, strength=number), expected, rtol=0, atol=1e-12)
        everywhere = torch.full((2, 7, 10), number, dtype=torch.float64)
        torch.testing.assert_close(model(lr, strength=everywhere), expected, rtol=0, atol=1e-12)
    drawn = torch.rand(2, 7, 10, dtype=torch.float64)
    for given, sr in ((own, model(lr)), (drawn, model(lr, strength=drawn))):
        map_ = torch.nn.functional.interpolate(given[:, None], scale_factor=4, mode="bilinear", align_corners=False)
        torch.testing.assert_close(sr, bicubic + map_ * (full - bicubic), rtol=0, atol=1e-12)
    sr, returned = model(lr, return_field=True, strength=0.5)
    assert torch.equal(sr, model(lr, strength=0.5))
    assert torch.equal(returned.strength, own), "the field keeps what the network has learned"


@pytest.mark.parametrize("image_residual", [False, True])
def test_networks_without_a_strength_compute_what_they_did(
    image_residual: bool, build: Callable[..., SAVL], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build(restoration_strength=False, image_residual=image_residual)
    with_strength = build(image_residual=image_residual)
    plain.load_state_dict({n: t for n, t in with_strength.state_dict().items() if not n.startswith("strength.")})
    lr = image()
    field = plain.estimate(lr)
    assert field is not None
    assert field.strength is None
    assert torch.equal(plain(lr), with_strength(lr, strength=1.0))
    torch.testing.assert_close(plain(lr, strength=0.4), with_strength(lr, strength=0.4), rtol=0, atol=0)
    calls = []
    monkeypatch.setattr("savl.network.savl.bicubic_upscale", lambda *a: calls.append(a) or bicubic_upscale(*a))
    plain(lr)
    assert len(calls) == image_residual, "the bicubic image is computed without need"


def test_hat_takes_a_strength_too(build: Callable[..., SAVL]) -> None:
    hat, lr = build(degradation_code="none", restoration_strength=False), image()
    bicubic = bicubic_upscale(lr, 4)
    torch.testing.assert_close(hat(lr, strength=0.5), (bicubic + hat(lr)) / 2, rtol=0, atol=1e-12)
    assert torch.equal(hat(lr, strength=0), bicubic)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (5, 1)])
def test_images_of_one_pixel_have_a_strength(height: int, width: int, build: Callable[..., SAVL]) -> None:
    sr, field = build()(image(height, width), return_field=True)
    assert field.strength.shape == (1, height, width)
    assert torch.isfinite(sr).all()


# Compilers, checkpointing, files


@pytest.fixture
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_and_exported_networks_have_the_same_strength(build: Callable[..., SAVL]) -> None:
    model, lr, drawn = build(depths=(1,)).float(), image().float(), torch.rand(1, 7, 10)
    model.groups = nn.ModuleList()  # tracing takes a third as long; test_fused_network.py compiles networks with blocks
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for strength in (None, 0.3, drawn):
        torch.testing.assert_close(compiled(lr, strength=strength), model(lr, strength=strength), rtol=0, atol=1e-5)
    program = torch.export.export(model, (lr,))
    assert "autocast" not in str(program.graph)
    other = image().float()
    torch.testing.assert_close(program.module()(other), model(other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant: bool, build: Callable[..., SAVL]) -> None:
    gradients = []
    for checkpointed in (False, True):
        model, lr = build().requires_grad_(True), torch.linspace(0, 1, 210).view(1, 3, 7, 10).double().requires_grad_()
        sr = checkpoint(model, lr, use_reentrant=use_reentrant) if checkpointed else model(lr)
        sr.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_file_keeps_the_strength(build: Callable[..., SAVL], tmp_path: Path) -> None:
    model, lr = build().float(), image().float()
    savl.save(model, tmp_path / "x.safetensors")
    again = savl.load(tmp_path / "x.safetensors")
    assert again.config.restoration_strength
    assert torch.equal(again(lr), model(lr))


# Errors


def test_a_strength_without_a_field_is_refused(small_config: Small) -> None:
    with pytest.raises(ValueError, match="restoration_strength needs .*degradation_code='none'"):
        small_config(degradation_code="none", restoration_strength=True)


@pytest.mark.parametrize(
    ("strength", "error", "message"),
    [
        (1.5, ValueError, r"strength must be a number in \[0, 1\], .*got 1.5"),
        (-0.1, ValueError, r"got -0.1"),
        (float("nan"), ValueError, r"got nan"),
        (True, TypeError, r"got bool True"),
        ("strong", TypeError, r"got str 'strong'"),
        (torch.ones(1, 7, 10, dtype=torch.int64), TypeError, r"floating tensor \(B, h, w\).*torch.int64"),
        (torch.ones(1, 28, 40), ValueError, r"strength must have shape \(1, 7, 10\) to fit lr, got \(1, 28, 40\)"),
        (torch.tensor(0.5), ValueError, r"\(1, 7, 10\) to fit lr, got \(\)"),
    ],
)
def test_a_strength_that_is_none_is_refused_by_name(
    strength: Any, error: type[Exception], message: str, build: Callable[..., SAVL]
) -> None:
    with pytest.raises(error, match=message):
        build()(image(), strength=strength)


def test_a_field_with_a_strength_of_another_size_is_reported(build: Callable[..., SAVL]) -> None:
    model, lr = build(), image()
    field, _ = estimated(model, lr)
    wrong = dataclasses.replace(field, strength=torch.ones(1, 5, 9))
    with pytest.raises(ValueError, match=r"field.strength must have shape \(1, 7, 10\) to fit lr, got \(1, 5, 9\)"):
        model.reconstruct(lr, wrong)
