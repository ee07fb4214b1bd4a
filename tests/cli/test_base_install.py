"""The packages of the base install are enough for `savl upscale` and `savl evaluate`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import savl
from savl.cli.app import app
from savl.evaluation import Lpips, LpipsUnavailable
from savl.network import SAVLConfig

PROGRAM = """
import sys
for extra in ("matplotlib", "torchmetrics", "scipy", "sklearn", "kornia", "jinja2"):
    sys.modules[extra] = None  # importing it fails
from savl.cli import main
for arguments in (
    ["evaluate", "--lr", "lr", "--hr", "hr"], ["upscale", "lr/a.png", "-o", "large.png", "--severity-map"]
):
    try:
        main([*arguments, "--model", "model.safetensors"])
    except SystemExit as stop:
        assert not stop.code, arguments
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pairs, weights, and beside them a torchvision that was made for another torch."""
    for name, side in (("lr", 12), ("hr", 48)):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(tmp_path / name / "a.png")
    torch.manual_seed(0)
    config = SAVLConfig(
        channels=6, depths=(1,), heads=1, window=4, cab_compress=3, cab_squeeze=3, upsampler="pixelshuffledirect",
        latent=6, estimator_width=8, estimator_dilations=(1, 2),
    )  # fmt: skip
    savl.save(savl.build(config), tmp_path / "model.safetensors")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    return tmp_path


def test_evaluation_and_severity_maps_need_no_optional_package(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "SSIM RGB" in done.stdout
    assert "no LPIPS: torchvision does not import" in done.stdout
    assert (folder / "large_severity.png").exists()


def test_lpips_without_torchmetrics_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("savl.evaluation.perceptual._cached_weights", lambda *_: Path("weights.pth"))
    for name in [name for name in sys.modules if name.startswith("torchmetrics.image")] + ["torchmetrics"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LpipsUnavailable, match=r"pip install 'savl\[lpips\]'") as caught:
        Lpips()
    assert caught.value.reason == "torchmetrics is not installed"


def test_a_broken_torchmetrics_is_not_reported_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchmetrics.py").write_text("raise AttributeError('scipy has no attribute x')")
    monkeypatch.setattr("savl.evaluation.perceptual._cached_weights", lambda *_: Path("weights.pth"))
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LpipsUnavailable, match="AttributeError: scipy has no attribute x") as caught:
        Lpips()
    assert caught.value.reason == "torchmetrics does not import"


def test_an_analysis_without_matplotlib_says_so_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setenv("COLUMNS", "300")
    result = CliRunner().invoke(app, ["analyze", "--quick", "-o", str(tmp_path / "report")])
    assert result.exit_code == 1
    assert "needs matplotlib" in result.stderr
    assert "pip install 'savl[analyze]'" in result.stderr
