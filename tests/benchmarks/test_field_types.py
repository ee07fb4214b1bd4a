"""The study of types prints and writes the figures of `savl analyze`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import savl
from benchmarks.studies.field_types import main
from savl.network import SAVLConfig

SMALL = SAVLConfig(
    channels=6, depths=(1,), heads=1, window=4, cab_compress=3, cab_squeeze=3, upsampler="pixelshuffledirect",
    image_residual=True, latent=4, estimator_width=6, estimator_dilations=(1,),
)  # fmt: skip


def test_the_figures_of_several_networks_have_a_mean_and_a_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "hr").mkdir()
    for number in range(3):
        coarse = Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8))
        coarse.resize((256, 384)).save(tmp_path / f"hr/{number}.png")
    for seed in (0, 1):
        savl.save(savl.build(SMALL), tmp_path / f"{seed}.safetensors")
    weights = [str(tmp_path / f"{seed}.safetensors") for seed in (0, 1)]
    main([*weights, "--hr", str(tmp_path / "hr"), "--repeats", "1", "--json", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["scenes"], found["images"], len(found["networks"])) == (3, 30, 2)
    ratio = found["figures"]["participation_ratio"]
    assert ratio["lowest"] <= ratio["mean"] <= ratio["highest"]
    assert f"mean {ratio['mean']:.3f}, from {ratio['lowest']:.3f} to {ratio['highest']:.3f}" in printed
    assert {"kind", "blur_level", "scene_noise", "cosine_blur_jpeg"} <= set(found["figures"])
