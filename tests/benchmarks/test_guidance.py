"""Tests that each change of the degradation field replaces the part that its name states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import savl
from benchmarks.studies.guidance import changes, main, measure
from savl.network import SAVL, DegradationField, SAVLConfig
from savl.ops.scopes import explicit_settings

SMALL = SAVLConfig(
    channels=6, depths=(1,), heads=1, window=4, cab_compress=3, cab_squeeze=3, upsampler="pixelshuffledirect",
    image_residual=True, latent=4, estimator_width=6, estimator_dilations=(1,),
)  # fmt: skip


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[str, str]:
    """Write three pairs of noise images, of 12×16 pixels and of four times that size."""
    random = np.random.default_rng(0)
    for folder, size in (("lr", (12, 16)), ("hr", (48, 64))):
        (tmp_path / folder).mkdir()
        for number in range(3):
            pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    return str(tmp_path / "lr"), str(tmp_path / "hr")


def test_each_change_replaces_the_named_part_of_the_field() -> None:
    field = DegradationField.from_posterior(torch.randn(1, 4, 5, 6), torch.randn(1, 4, 5, 6))
    means = torch.randn(3, 4)
    as_it_is, flat, others, none, even, neither = (change(field, 2) for change in changes(means).values())
    assert as_it_is is field
    for changed, mean in (
        (flat, means[2]),
        (others, means[0]),
        (none, means.mean(dim=0)),
        (neither, means.mean(dim=0)),
    ):
        assert torch.equal(changed.mu, mean[None, :, None, None].expand(1, 4, 5, 6))
    assert flat.severity is others.severity is none.severity is field.severity
    assert torch.equal(even.mu, field.mu)
    for changed in (even, neither):
        assert changed.severity is not None
        assert (changed.severity == 1).all()


def test_only_parts_that_the_network_reads_change_the_scores(pairs: tuple[str, str]) -> None:
    torch.manual_seed(0)
    model = SAVL(SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    guided = measure(model, *pairs)
    assert len(set(guided.values())) == len(guided), "each part matters to a network that reads them all"
    deaf = SAVL(SAVLConfig(**{**SMALL.to_dict(), "channel_modulation": False, "spatial_modulation": False})).eval()
    with torch.no_grad():
        deaf.upsampler.to_image.weight.normal_()
    assert len(set(measure(deaf, *pairs).values())) == 1


def test_a_network_without_severity_is_refused(pairs: tuple[str, str]) -> None:
    code = SAVL(SAVLConfig(**{**SMALL.to_dict(), "degradation_code": "deterministic"})).eval()
    with pytest.raises(ValueError, match="variational degradation code, got 'deterministic'"):
        measure(code, *pairs)


def test_the_setting_of_the_process_stays_as_it_is(pairs: tuple[str, str], tmp_path: Path) -> None:
    savl.save(SAVL(SMALL), tmp_path / "small.safetensors")
    before = explicit_settings()
    main(["--lr", pairs[0], "--hr", pairs[1], "--model", str(tmp_path / "small.safetensors")])
    assert explicit_settings() == before
