"""The study of bfloat16: its figures, checked by hand, and its reports."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import savl
from benchmarks.studies.bfloat16 import Difference, main
from savl.network import SAVL, SAVLConfig

SMALL = SAVLConfig(
    channels=6, depths=(1,), heads=1, window=4, cab_compress=3, cab_squeeze=3, upsampler="pixelshuffledirect",
    image_residual=True, latent=4, estimator_width=6, estimator_dilations=(1,), restoration_strength=True,
)  # fmt: skip


def test_pixels_are_counted_after_rounding_and_psnr_is_computed_before() -> None:
    exact = torch.full((3, 2, 5), 100 / 255)
    narrow = exact.clone()
    narrow[0, 0, 0] += 0.4 / 255  # the same after rounding
    narrow[:, 0, 1] += 0.6 / 255  # a pixel with three channels
    narrow[1, 1, 4] -= 2 / 255
    found = Difference.between(narrow, exact)
    assert (found.pixels, found.differ, found.above_one, found.worst) == (10, 2, 1, 2)
    assert found.worst_before_rounding == pytest.approx(2, abs=1e-3)
    mean = (0.4**2 + 3 * 0.6**2 + 2**2) / (255**2 * 30)
    assert found.psnr == pytest.approx(-10 * math.log10(mean), abs=1e-3)
    same = Difference.between(exact, exact)
    assert same.psnr == math.inf
    both = Difference.of_set([found, same])
    assert (both.pixels, both.differ, both.above_one, both.worst) == (20, 2, 1, 2)
    assert both.psnr == pytest.approx(found.psnr + 10 * math.log10(2))


@pytest.fixture
def weights(tmp_path: Path) -> str:
    model = SAVL(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    savl.save(model, tmp_path / "small.safetensors")
    return str(tmp_path / "small.safetensors")


def test_sets_with_and_without_originals_are_reported(
    pair_folders: tuple[Path, Path], weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lr, hr = map(str, pair_folders)
    sets = ["--set", "pairs", lr, hr, "--set", "photographs", lr]
    main([*sets, "--model", weights, "--json", str(tmp_path / "report.json")])
    found = json.loads((tmp_path / "report.json").read_text())["sets"]
    assert {name: list(rows) for name, rows in found.items()} == dict.fromkeys(
        ("pairs", "photographs"), ["auto", "1.0"]
    )
    pairs, photographs = found["pairs"]["1.0"], found["photographs"]["1.0"]
    assert photographs == {**pairs, "psnr_float32": None, "psnr_bfloat16": None}
    assert pairs["images"] == 2
    assert 40 < pairs["psnr_between"] < 120
    assert 0 < abs(pairs["psnr_float32"] - pairs["psnr_bfloat16"]) < 0.1
    assert f"| pairs (2) | 1.0 | {pairs['psnr_between']:.1f} |" in capsys.readouterr().out
    main([*sets[:3], "--every", "2", "--model", weights, "--json", str(tmp_path / "report.json")])
    assert json.loads((tmp_path / "report.json").read_text())["sets"]["pairs"]["auto"]["images"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--set", "a"], "a name and one or two folders, got a"), (["--set", "a", "b", "--every", "0"], "got 0")],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
