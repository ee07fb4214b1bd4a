"""Tests of the pairs that are made of City100, on images of its layout that are made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.studies.camera_blur import RATIOS
from benchmarks.studies.city100_pairs import main


def test_pairs_have_the_pitch_of_the_camera_and_show_the_same_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ramp = np.add.outer(np.arange(256), np.arange(256))[..., None].repeat(3, axis=2) / 2
    for camera in RATIOS:
        for kind in ("H", "L"):
            (tmp_path / f"{camera}_{kind}").mkdir()
            Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / f"{camera}_{kind}" / "001.png")
    main(["--city100", str(tmp_path), "--output", str(tmp_path / "pairs")])
    assert "2 pairs" in capsys.readouterr().out
    for camera, ratio in RATIOS.items():
        low, high = (
            np.asarray(Image.open(tmp_path / "pairs" / camera / kind / "001.png"), float)[..., 0]
            for kind in ("LR", "HR")
        )
        side = round(256 / ratio)
        assert low.shape == (side, side)
        assert high.shape == (4 * side, 4 * side)
        assert np.abs(low - high.reshape(side, 4, side, 4).mean(axis=(1, 3))).max() < 2, "no shift"
