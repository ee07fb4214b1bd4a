"""The int8 study: simulated layers compute what oneDNN computes, and a run prints and writes times and scores."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import savl
from benchmarks.studies import int8
from savl.network import SAVLConfig
from savl.network.layers import ChannelsLastConv2d

SMALL = SAVLConfig(
    channels=16, depths=(1,), heads=1, window=4, cab_compress=2, cab_squeeze=4, upsampler="pixelshuffledirect",
    image_residual=True, latent=4, estimator_width=6, estimator_dilations=(1,),
)  # fmt: skip
SIDE = 8
timed = pytest.mark.skipif(int8.why_not_timed() is not None, reason=f"int8 layers: {int8.why_not_timed()}")


def network_of(layer: int8.Layer) -> nn.Module:
    """Return a network of one layer, ``block.qkv``."""
    return nn.Sequential(OrderedDict(block=nn.Sequential(OrderedDict(qkv=layer))))


@timed
@pytest.mark.parametrize("convolution", [False, True])
def test_a_simulated_layer_computes_what_onednn_computes(convolution: bool) -> None:
    torch.manual_seed(0)
    layer = ChannelsLastConv2d(12, 24, 3) if convolution else nn.Linear(12, 24)
    x = int8.features(12, SIDE)
    shifted = 0.5 * x.abs() - 0.1  # another scale and zero point than those that weights are packed with
    calls = int8.variants(layer, SIDE)
    static = int8.simulated(network_of(layer), {"block.qkv": int8.bounds_of(x)})
    dynamic = int8.simulated(network_of(layer), None)
    with torch.no_grad():
        for values, name, network in ((x, int8.STATIC, static), (shifted, int8.DYNAMIC, dynamic)):
            expected = network(values)
            assert not torch.allclose(expected, layer(values), rtol=1e-5, atol=1e-5), "nothing was rounded"
            torch.testing.assert_close(calls[name](values).float(), expected, rtol=2**-8, atol=1e-5)


def test_static_ranges_cover_all_calibration_images() -> None:
    images = [torch.linspace(0, 1, 4000).view(1000, 4), torch.linspace(-1, 0, 4000).view(1000, 4)]
    ranges = int8.calibrated(network_of(nn.Linear(4, 4)), images)
    assert ranges[100.0]["block.qkv"] == (-1, 1)
    assert ranges[99.9]["block.qkv"] == pytest.approx((-0.999, 0.999), abs=1e-4)


@pytest.mark.parametrize("reason", [None, "missing: avx512_vnni"])
def test_a_run_prints_and_writes_times_and_scores(
    reason: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason is not None:
        monkeypatch.setattr(int8, "why_not_timed", lambda: reason)
    elif int8.why_not_timed() is not None:
        pytest.skip(f"int8 layers: {int8.why_not_timed()}")
    random = np.random.default_rng(0)
    for folder, side in (("lr", 8), ("hr", 32), ("calibration", 12)):
        (tmp_path / folder).mkdir()
        for number in range(2):
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    torch.manual_seed(0)
    model = savl.build(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = str(tmp_path / "small.safetensors")
    savl.save(model, weights)
    folders = [f"--{name}={tmp_path / name}" for name in ("lr", "hr", "calibration")]
    output = tmp_path / "out.json"
    int8.main([*folders, "--networks", weights, "--side", str(SIDE), "--rounds", "2", "--json", str(output)])
    printed = capsys.readouterr().out
    found = json.loads(output.read_text())["networks"][weights]
    quality = found["quality"]
    for name, scores in quality.items():
        assert scores["lost"] == pytest.approx(quality["float32"]["psnr_y"] - scores["psnr_y"]), name
    assert 20 < quality[int8.DYNAMIC]["float32"] < 80
    if reason is not None:
        assert "times" not in found
        assert f"Times were not measured, {reason}" in printed
        return
    times = found["times"]
    linear = {f"linear {channels}" for channels in ("16 → 48", "16 → 16", "16 → 32", "32 → 16")}
    assert set(times["layers"]) == linear | {"conv 3×3 16 → 8", "conv 3×3 8 → 16"}
    alone = sum(layer["count"] * layer["seconds"][int8.STATIC] for layer in times["layers"].values())
    assert times["estimated"][int8.STATIC] == pytest.approx(times["tile"][int8.REST] + alone)
    speedup = times["tile"][int8.BFLOAT16] / times["tile"][int8.STATIC]
    assert f"{1e3 * times['tile'][int8.STATIC]:.1f} ({speedup:.2f})" in printed
