"""Tests that the study recovers the blur, sharpening and noise of pairs that are made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.studies import camera_blur
from benchmarks.studies.camera_blur import (
    Array,
    agreement,
    bicubic,
    camera,
    fits,
    gaussian,
    noise,
    own_transfer,
    spectra,
)

SIDE = 256
RATIO = 2.5
FY, FX = np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE), indexing="ij")
V = np.hypot(FX, FY)


def scene(seed: int = 0) -> Array:
    """Return ``(3, SIDE, SIDE)`` with the spectrum of a photograph, in 8-bit units."""
    random = np.random.default_rng(seed)
    field = np.fft.ifft2(np.fft.fft2(random.standard_normal((3, SIDE, SIDE))) / np.maximum(V, 1 / SIDE)).real
    return np.asarray(128 + 30 * field / field.std())


def filtered(image: Array, transfer: Array) -> Array:
    return np.asarray(np.fft.ifft2(np.fft.fft2(image) * transfer).real)


def test_an_anisotropic_gaussian_is_found_with_shift_and_gain() -> None:
    high = scene()
    quadratic = 2.0**2 * FX**2 + 1.5**2 * FY**2
    transfer = np.exp(-2 * np.pi**2 * quadratic) * np.exp(-2j * np.pi * (0.3 * FX - 0.2 * FY))
    low = np.array([1.1, 1.0, 0.8])[:, None, None] * filtered(high, transfer)
    found, shift, gain = spectra(high, low)
    assert shift == pytest.approx([0.3, -0.2], abs=0.01)
    assert gain == pytest.approx([1.1, 1.0, 0.8], rel=0.03)
    blur = fits(found, RATIO)["gaussian"]
    assert blur["sigma"] == pytest.approx(np.sqrt((2.0**2 + 1.5**2) / 2), rel=0.03)
    assert blur["axis_ratio"] == pytest.approx(0.75, abs=0.03)
    assert abs(blur["angle_degrees"]) < 3


def test_the_blur_of_one_camera_at_two_focal_lengths_is_found() -> None:
    high = scene()
    enlarged = bicubic(RATIO * FX) * bicubic(RATIO * FY)
    low = filtered(high, camera(RATIO * V, 0.7, 1.2) / camera(V, 0.7, 1.2) * enlarged)
    found, _, _ = spectra(high, low)
    own = fits(found, RATIO)["camera"]
    assert own["own_sigma"] == pytest.approx(0.7, rel=0.03)
    assert own["amount"] == pytest.approx(1.2, rel=0.1)
    u, transfer = own_transfer(found, RATIO)
    assert transfer == pytest.approx(camera(u, 0.7, 1.2), abs=0.06)


def test_the_noise_of_flat_blocks_is_found_and_none_without_noise() -> None:
    flat = np.full((3, SIDE, SIDE), 128.0)
    flat[:, :, SIDE // 2 :] = scene()[:, :, SIDE // 2 :]
    flat[:, : SIDE // 2] = 255.0
    white = np.fft.fft2(np.random.default_rng(1).standard_normal((3, SIDE, SIDE)))
    added = np.fft.ifft2(white * bicubic(RATIO * FX) * bicubic(RATIO * FY)).real
    added *= camera_blur.noise_gain() / added.std()
    assert noise(flat.round()) == 0
    found = noise((flat + 4.0 * added).clip(0, 255).round())
    assert 2.4 < found < 4.0, "the lowest of many blocks is below the mean"


def test_the_spectrum_of_a_camera_agrees_with_that_of_the_same_camera() -> None:
    high = scene()
    enlarged = bicubic(RATIO * FX) * bicubic(RATIO * FY)
    low = filtered(high, camera(RATIO * V, 0.7, 1.2) * enlarged)
    found = agreement(high, low, np.ones(3), RATIO, {"own_sigma": 0.7, "amount": 1.2})
    assert found["fitted camera"] == pytest.approx([0, 0, 0, 0], abs=0.7)
    assert found["published pipeline"][-1] < -3


def test_a_folder_gives_a_table_and_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(camera_blur, "DRAWS", 1)
    for name, ratio in camera_blur.RATIOS.items():
        for number in range(2):
            high = scene(number)
            for level, image in (("H", high), ("L", filtered(high, gaussian(V, 0.6 * np.sqrt(ratio**2 - 1))))):
                (tmp_path / f"{name}_{level}").mkdir(exist_ok=True)
                pixels = image.clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0)
                Image.fromarray(pixels).save(tmp_path / f"{name}_{level}" / f"{number}.png")
    camera_blur.main(["--city100", str(tmp_path), "--json", str(tmp_path / "out.json")])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| gaussian.own_sigma"))
    for cell in row.split("|")[2:4]:
        assert float(cell.split(",")[1]) == pytest.approx(0.6, rel=0.05)
    assert (tmp_path / "out.json").stat().st_size > 1000
