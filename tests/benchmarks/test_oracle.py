"""Tests that the study of the oracle gives each network the field it names, and compares their scores by image."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import savl
from benchmarks.studies.oracle import (
    CONFIG,
    KNOTS,
    LENGTH,
    constant_field,
    degraded_images,
    main,
    oracle_field,
    summary,
)
from savl.network import SAVL, SAVLConfig
from savl.network.dsca import Guidance
from savl.training import load_config
from savl.training.data import Batch

pytest.importorskip("kornia")
LATENT = 5 * KNOTS + 1
SMALL = [
    "model.channels=6", "model.depths=[1]", "model.heads=1", "model.window=4", "model.cab_compress=3",
    "model.cab_squeeze=3", f"model.latent={LATENT}", "model.estimator_width=6", "model.estimator_dilations=[1]",
    "data.patch=8", "data.batch=5", "data.fresh=2", "data.pool=12", "optimizer.warmup=1",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two images of smooth noise, of 88×96 pixels."""
    random = np.random.default_rng(0)
    (tmp_path / "hr").mkdir()
    for number in range(2):
        pixels = random.integers(0, 256, (22, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 88)).save(tmp_path / "hr" / f"{number}.png")
    return tmp_path / "hr"


def batch(amounts: list[list[float]], mask: float = 1.0) -> Batch:
    """Return grey images with these amounts."""
    count = len(amounts)
    y = torch.full((count, 3, 8, 8), 0.5)
    return Batch(y, y, y, torch.full((count, 8, 8), mask), amounts=torch.tensor(amounts))


def test_the_oracle_encodes_each_operation_in_channels_of_its_own() -> None:
    nan = math.nan
    amounts = [[0.0] * 3, [2.0, 0.0, 0.0], [0.0, 15.0, 0.0], [0.0, 0.0, 80.0], [nan] * 3, [0.78, 0.0, nan]]
    mu = oracle_field(batch(amounts), LATENT).mu[:, :-1, 0, 0].unflatten(1, (5, KNOTS))
    wanted = torch.zeros(6, 5, KNOTS)
    wanted[1:, :, -1] = LENGTH * torch.eye(5)  # blur, noise, JPEG, whole pipeline, camera
    torch.testing.assert_close(mu, wanted)


def test_the_oracle_scales_the_amounts_by_the_mask() -> None:
    half, full = oracle_field(batch([[1.0, 0.0, 0.0]]), LATENT), oracle_field(batch([[2.0, 0.0, 0.0]], 0.5), LATENT)
    assert torch.equal(half.mu, full.mu)
    masked = batch([[2.0, 0.0, 0.0]])
    assert masked.degradation_mask is not None
    masked.degradation_mask[:, :, :4] = 0.0
    field = oracle_field(masked, LATENT)
    assert field.severity is not None
    assert field.severity[0, 0, 7] > 1 > field.severity[0, 0, 0]
    assert (field.mu[:, :, :, :4] == 0).all()


def test_the_constant_field_does_not_depend_on_the_batch() -> None:
    field = constant_field(batch([[2.0, 0.0, 0.0]]), LATENT)
    assert field.severity is not None
    assert (field.severity == 1).all()
    assert (field.mu == 0).all()


def test_the_degradations_of_all_kinds_are_known_to_the_oracle(folder: Path) -> None:
    config = load_config(CONFIG).degradation
    found = degraded_images(str(folder), config, 4)
    known = {kind: images[0][0].amounts for kind, images in found.items()}
    unknown = {kind: amounts.isnan()[0].tolist() for kind, amounts in known.items() if amounts is not None}
    assert unknown.pop("whole pipeline") == [True, True, True]
    assert unknown.pop("camera") == [False, False, True]
    assert list(unknown) == ["blur", "noise", "jpeg", "bicubic reduction"]
    assert not any(map(any, unknown.values()))


def test_shares_are_those_of_the_gains() -> None:
    lower, middle, upper = ({"psnr_y": {"noise": [20.0 + gain, 30.0 + gain]}} for gain in (0.0, 0.3, 0.4))
    found = summary({"bicubic": lower, "constant": lower, "oracle": upper, "file": middle}, "psnr_y")["noise"]
    assert found["share"] == {"file": pytest.approx(0.75)}
    assert found["gain"]["oracle"] == pytest.approx((0.4, 0.0))
    nothing = summary({"bicubic": lower, "constant": lower, "oracle": lower, "file": middle}, "psnr_y")["noise"]
    assert nothing["share"] == {"file": None}


def test_networks_are_trained_with_their_fields_and_compared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    estimator = tmp_path / "estimator.safetensors"
    small = SAVLConfig(
        latent=LATENT, depths=(1,), channels=6, heads=1, window=4, cab_compress=3, cab_squeeze=3,
        upsampler="pixelshuffledirect",
    )  # fmt: skip
    savl.save(SAVL(small), estimator)
    output, report = tmp_path / "runs", tmp_path / "report.json"
    changes = [f"run.output={json.dumps(str(output))}", *SMALL]
    arguments = ["--hr", str(folder), "--test", str(folder), "--estimator", str(estimator), "--steps", "3"]
    main([*arguments, "--json", str(report), *(part for change in changes for part in ("--set", change))])
    networks = {path.name.split("-")[0]: savl.load(path / "model.safetensors") for path in output.iterdir()}
    assert set(networks) == {"constant", "oracle", "learned"}
    for name, network in networks.items():
        guidances = [module for module in network.modules() if isinstance(module, Guidance)]
        assert len(guidances) == 2
        for guidance in guidances:  # gamma reads the field from the first steps, if it is not constant
            assert (guidance.project.weight != 0).any() == (name != "constant")
    written = json.loads(report.read_text())["summary"]["psnr_y"]["noise"]
    assert set(written["gain"]) == {"oracle", str(estimator)}
    assert f"| {written['mean']['oracle']:.3f} |" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"degradation.strength must be \(1, 1\)"):
        main([*arguments, "--set", "degradation.strength=[0.0, 1.0]"])
