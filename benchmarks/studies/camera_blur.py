"""Measure the blur between two photographs of one scene at a short and a long focal length (City100).

    python -m benchmarks.studies.camera_blur --city100 FOLDER [--json FILE]

City100 (Chen et al., CVPR 2019) has pairs of images on one pixel grid: H at the long focal length, and L at the short
one, enlarged onto the grid of H. In every pair the transfer function from H to L is estimated from the cross spectrum,
and three models are fitted to it by weighted least squares, at frequencies below the Nyquist frequency of L. L is
shifted and its channels are scaled first, so that phase and lowest frequencies agree.

- *gaussian*: L = H blurred by a Gaussian, isotropic or not. σ in pixels of H.
- *unsharp*: the same, then sharpened by an unsharp mask, 1 + a · (1 − Gaussian of 0.8 pixels of L).
- *camera*: the camera has one transfer function M(u), u in cycles per pixel of the camera, at both focal lengths: a
  Gaussian of σ0 pixels, then the unsharp mask. The transfer function from H to L is M(ratio · v) / M(v), times that of
  the interpolation that enlarged L.

The spectra of images that the pipeline degrades are then compared with that of L.

Without a model of M, M(u) is the product of the measured transfer function at u / ratio, u / ratio² and so on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import least_squares

from savl.bicubic import bicubic_downsample
from savl.degradation import Degradation, DegradationConfig
from savl.degradation.config import CameraConfig
from savl.evaluation import match_pairs
from savl.images.folder import read_rgb

Array = NDArray[np.float64]

RATIOS = {"Nikon": 2.889, "iPhone": 2.451}
"""Pixels of H per pixel of the camera in L: the period of the second differences of L, which interpolation makes
periodic. The authors give 2.9 (Nikon D5500, 55 and 18 mm) and 2.4 (iPhone X)."""
INTERPOLATION = -0.75
"""Parameter of the bicubic interpolation that enlarged L. The ratio of the spectra of L at u and 1 − u, which depends
on the interpolation alone, is 0.16, 0.32 and 0.58 at u = 0.35, 0.4 and 0.45; -0.75 gives 0.16, 0.32 and 0.57, -0.5
gives 0.23, 0.38 and 0.62, linear interpolation 0.29, 0.44 and 0.67."""
RADIUS = 0.8
"""σ of the Gaussian in the unsharp mask, in pixels of the camera. The data hardly determine it: from 0.2 to 0.9, the
misfit of the model *camera* to all scenes changes by 13 % (Nikon) and 3 % (iPhone)."""
RINGS = 64
SECTORS = 8
FLOOR = 0.01
"""Standard error of the transfer function by registration and lens distortion, which averaging does not reduce."""
BLOCK = 16
"""Side of the blocks in which noise is measured, in pixels of H."""
OCTAVES = ((1 / 32, 1 / 16), (1 / 16, 1 / 8), (1 / 8, 1 / 4), (1 / 4, 1 / 2))
"""Ranges of frequency in cycles per pixel of L in which spectra are compared."""
DRAWS = 6
"""Number of recipes whose results are compared with L."""
CLIPPED = (10.0, 245.0)
"""Blocks that are darker or brighter in any channel, in 8-bit units, are not used for noise."""


@dataclass(frozen=True)
class Spectra:
    """Cross spectrum of one pair, in rings of frequency and sectors of direction, summed over the channels."""

    cross: Array
    """``(RINGS, SECTORS)``: sum of Re(L · conj(H))."""
    power: Array
    """``(RINGS, SECTORS)``: sum of abs(H)²."""
    low: Array
    """``(RINGS, SECTORS)``: sum of abs(L)²."""
    count: Array
    """``(RINGS, SECTORS)``: number of coefficients."""

    def __add__(self, other: Spectra) -> Spectra:
        return Spectra(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))

    def normalised(self) -> Spectra:
        """Return the spectra of an image of mean power 1, so that sums weigh all scenes equally."""
        total = self.power.sum()
        return Spectra(self.cross / total, self.power / total, self.low / total, self.count)

    @property
    def transfer(self) -> Array:
        """``(RINGS, SECTORS)``: least-squares estimate of the transfer function."""
        return self.cross / np.maximum(self.power, 1e-30)

    @property
    def error(self) -> Array:
        """``(RINGS, SECTORS)``: standard error of `transfer`, from the residual of each ring."""
        rings = [part.sum(axis=1, keepdims=True) for part in (self.low, self.cross, self.power, self.count)]
        residual = np.maximum(rings[0] - rings[1] ** 2 / np.maximum(rings[2], 1e-30), 0) / np.maximum(rings[3], 1)
        return np.asarray(np.sqrt(residual / np.maximum(self.power, 1e-30) + FLOOR**2))


def frequencies() -> tuple[Array, Array]:
    """Return frequency in cycles per pixel of H and direction in radians of the cells, ``(RINGS, SECTORS)`` each."""
    ring = (np.arange(RINGS) + 0.5) * (0.5 / RINGS)
    sector = (np.arange(SECTORS) + 0.5) * (np.pi / SECTORS)
    return np.meshgrid(ring, sector, indexing="ij")  # type: ignore[return-value]


def gaussian(frequency: Array | float, sigma: float) -> Array:
    """Return the transfer function of a Gaussian blur of standard deviation ``sigma``."""
    return np.asarray(np.exp(-2 * (np.pi * sigma * np.asarray(frequency)) ** 2))


def camera(frequency: Array | float, sigma: float, amount: float) -> Array:
    """Return the transfer function of a Gaussian blur and an unsharp mask, in pixels of the camera."""
    return gaussian(frequency, sigma) * (1 + amount * (1 - gaussian(frequency, RADIUS)))


def bicubic(frequency: Array) -> Array:
    """Return the transfer function of bicubic interpolation (Keys, 1981), in cycles per pixel of the small image."""
    u = np.maximum(np.abs(frequency), 1e-3)
    one, two, four = (np.sinc(times * u) for times in (1, 2, 4))
    parameter = INTERPOLATION * 2 * (3 * two**2 - 2 * two - four)
    return np.asarray((3 * (one**2 - two) + parameter) / (np.pi * u) ** 2)


def noise_gain() -> float:
    """Return the factor by which the interpolation that enlarged L changes the standard deviation of white noise."""
    u = np.linspace(0.0, 4.0, 4001)
    # Interpolation along one axis multiplies the variance by this integral, along both axes by its square.
    return float(2 * np.trapezoid(bicubic(u) ** 2, u))


def spectra(high: Array, low: Array) -> tuple[Spectra, Array, Array]:
    """Return the spectra of a pair, the shift of L in pixels (x, y), and the factor on each channel.

    Args:
        high: ``(3, n, n)`` H, in 8-bit units.
        low: ``(3, n, n)`` L.
    """
    side = high.shape[-1]
    window = np.outer(np.hanning(side), np.hanning(side))
    h, lo = (np.fft.fft2((image - image.mean(axis=(1, 2), keepdims=True)) * window) for image in (high, low))
    fy, fx = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij")
    radius = np.hypot(fx, fy)
    cross = (lo * h.conj()).sum(axis=0)
    # Phase of the cross spectrum, by least squares on a plane.
    fitted = (radius > 0) & (radius < 0.1)
    weight = np.sqrt(np.abs(cross[fitted]))
    plane = -2 * np.pi * np.stack((fx[fitted], fy[fitted]), axis=1)
    shift = np.linalg.lstsq(plane * weight[:, None], np.angle(cross[fitted]) * weight, rcond=None)[0]
    lo = lo * np.exp(2j * np.pi * (fx * shift[0] + fy * shift[1]))
    lowest = (radius > 0) & (radius < 0.02)
    gain = (lo * h.conj()).real[:, lowest].sum(axis=1) / (np.abs(h[:, lowest]) ** 2).sum(axis=1)
    lo = lo / gain[:, None, None]
    ring = (radius * (RINGS / 0.5)).astype(int)
    sector = np.minimum((np.arctan2(fy, fx) % np.pi * (SECTORS / np.pi)).astype(int), SECTORS - 1)
    inside = (ring < RINGS) & (radius > 0)
    cell = (ring * SECTORS + sector)[inside]

    def summed(values: Array) -> Array:
        sums = np.bincount(cell, values[inside].ravel(), RINGS * SECTORS)
        return np.asarray(sums.reshape(RINGS, SECTORS), dtype=np.float64)

    parts = (
        (lo * h.conj()).real.sum(axis=0),
        (np.abs(h) ** 2).sum(axis=0),
        (np.abs(lo) ** 2).sum(axis=0),
        np.ones((side, side)),
    )
    return Spectra(*map(summed, parts)), shift, gain


def fit(model: Callable[..., Array], start: Sequence[float], found: Spectra, ratio: float) -> tuple[list[float], float]:
    """Return the parameters of a model and the weighted root mean square residual, 1 if only noise remains."""
    ring, sector = frequencies()
    used = (ring > 0.01) & (ring < 0.5 / ratio) & (found.count > 0)
    value, error = found.transfer[used], found.error[used]

    def residual(parameters: Array) -> Array:
        return np.asarray((model(ring[used], sector[used], *parameters) - value) / error)

    solution = least_squares(residual, start)
    return [float(each) for each in solution.x], float(np.sqrt(np.mean(solution.fun**2)))


def fits(found: Spectra, ratio: float) -> dict[str, dict[str, float]]:
    """Fit the three models; ``own_sigma`` is the σ0 of a blur that is the same in own pixels at both focal lengths."""

    def blur(v: Array, phi: Array, mean: float, cosine: float, sine: float) -> Array:
        variance = mean + cosine * np.cos(2 * phi) + sine * np.sin(2 * phi)
        return np.asarray(np.exp(-2 * (np.pi * v) ** 2 * variance))

    def sharpened(v: Array, phi: Array, mean: float, cosine: float, sine: float, amount: float) -> Array:
        return blur(v, phi, mean, cosine, sine) * (1 + amount * (1 - gaussian(v, ratio * RADIUS)))

    def same(v: Array, phi: Array, sigma: float, amount: float) -> Array:
        enlarged = bicubic(ratio * v * np.cos(phi)) * bicubic(ratio * v * np.sin(phi))
        return camera(ratio * v, sigma, amount) / camera(v, sigma, amount) * enlarged

    def axes(mean: float, cosine: float, sine: float) -> dict[str, float]:
        spread = float(np.hypot(cosine, sine))
        return {
            "sigma": float(np.sqrt(mean)),
            "own_sigma": float(np.sqrt(mean / (ratio**2 - 1))),
            "axis_ratio": float(np.sqrt(max(mean - spread, 0.0) / (mean + spread))),
            "angle_degrees": float(np.degrees(np.arctan2(sine, cosine) / 2)),
        }

    plain, plain_misfit = fit(blur, [1.5, 0.0, 0.0], found, ratio)
    sharp, sharp_misfit = fit(sharpened, [2.5, 0.0, 0.0, 0.5], found, ratio)
    own, own_misfit = fit(same, [0.5, 0.5], found, ratio)
    return {
        "gaussian": {**axes(*plain), "misfit": plain_misfit},
        "unsharp": {**axes(*sharp[:3]), "amount": sharp[3], "misfit": sharp_misfit},
        "camera": {"own_sigma": own[0], "amount": own[1], "misfit": own_misfit},
    }


def noise(low: Array) -> float:
    """Return the lowest standard deviation of a block of L that is not clipped, in 8-bit units.

    The value is converted to white noise before L was enlarged, per channel, without the rounding to 8 bits. It is an
    upper bound of the noise of the camera: the content of the scene and the grain of the photographed print add to it.

    Args:
        low: ``(3, n, n)`` L, in 8-bit units.
    """
    count = low.shape[-1] // BLOCK
    tiles = low[:, : count * BLOCK, : count * BLOCK].reshape(3, count, BLOCK, count, BLOCK)
    levels, variance = tiles.mean(axis=(2, 4)), tiles.var(axis=(2, 4)) * BLOCK**2 / (BLOCK**2 - 1)
    usable = (levels.min(axis=0) > CLIPPED[0]) & (levels.max(axis=0) < CLIPPED[1])
    lowest = variance.mean(axis=0)[usable].min(initial=np.inf)
    return float(np.sqrt(max(lowest - 1 / 12, 0.0))) / noise_gain()


def own_transfer(found: Spectra, ratio: float) -> tuple[Array, Array]:
    """Return u in cycles per pixel and M(u), without a model of M; the interpolation that enlarged L is removed."""
    ring, sector = frequencies()
    v = ring[:, 0]
    measured = found.cross.sum(axis=1) / found.power.sum(axis=1)
    enlarged = (bicubic(ratio * ring * np.cos(sector)) * bicubic(ratio * ring * np.sin(sector))).mean(axis=1)
    step = np.where(ratio * v < 0.6, measured / enlarged, 0.0)
    u = np.arange(0.02, 0.501, 0.02)
    product = np.ones_like(u)
    for power in range(1, 8):
        product = product * np.interp(u / ratio**power, np.r_[0.0, v], np.r_[1.0, step])
    return u, product


def agreement(high: Array, low: Array, gain: Array, ratio: float, fitted: dict[str, float]) -> dict[str, list[float]]:
    """Compare the spectra of images that are degraded here with that of L.

    H is enlarged so that 3 of its pixels span one pixel of L, and then degraded by scale 3. The camera has already
    blurred H, like photographs to train on.

    Args:
        high: ``(3, n, n)`` H, in 8-bit units.
        low: ``(3, n, n)`` L.
        gain: Factor on each channel of H.
        ratio: Pixels of H per pixel of L.
        fitted: Parameters of the model *camera*.

    Returns:
        For every degradation the power of its result divided by that of L, without the interpolation that enlarged L,
        in dB, for each of `OCTAVES`.
    """
    side = round(high.shape[-1] / ratio)
    ratio = high.shape[-1] / side
    scene = torch.from_numpy(high * gain[:, None, None] / 255.0).float()[None]
    x = F.interpolate(scene, size=(3 * side, 3 * side), mode="bicubic").clamp(0.0, 1.0)
    fy, fx = np.meshgrid(*(np.fft.fftfreq(low.shape[-1]),) * 2, indexing="ij")
    enlarged = bicubic(ratio * fx) * bicubic(ratio * fy)
    wanted = _octaves(_power(low / 255.0) / (ratio * np.maximum(enlarged, 0.1)) ** 2, ratio)

    def level(y: torch.Tensor) -> Array:
        return np.asarray(10 * np.log10(_octaves(_power(y[0].double().numpy()), 1.0) / wanted))

    sigma, amount = abs(fitted["own_sigma"]), max(fitted["amount"], 0.0)
    cameras = {
        "fitted camera": CameraConfig(1.0, (sigma, sigma), (amount, amount), (1.0, 1.0)),
        "default camera": CameraConfig(1.0),
        "published pipeline": CameraConfig(),
    }
    found = {"bicubic": level(bicubic_downsample(x, 3)).tolist()}
    for name, camera_config in cameras.items():
        degradation = Degradation(DegradationConfig(camera=camera_config), 3)
        found[name] = np.mean([level(degradation(x, seed).y) for seed in range(DRAWS)], axis=0).tolist()
    return found


def _power(image: Array) -> Array:
    window = np.outer(np.hanning(image.shape[-1]), np.hanning(image.shape[-1]))
    spectrum = np.fft.fft2((image - image.mean(axis=(1, 2), keepdims=True)) * window)
    return np.asarray((np.abs(spectrum) ** 2).sum(axis=0) / (window**2).sum())


def _octaves(power: Array, ratio: float) -> Array:
    frequency = np.fft.fftfreq(power.shape[-1]) * ratio
    u = np.hypot(*np.meshgrid(frequency, frequency))
    return np.array([power[(u >= low) & (u < high)].mean() for low, high in OCTAVES])


def quartiles(values: Sequence[float]) -> list[float]:
    """Return lower quartile, median and upper quartile."""
    return [float(each) for each in np.quantile(np.asarray(values), (0.25, 0.5, 0.75))]


def rounded(value: Any) -> Any:
    """Return nested dictionaries and lists with four decimals."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def measure(folder: Path, name: str) -> dict[str, Any]:
    """Measure all pairs of one camera."""
    ratio = RATIOS[name]
    pairs = match_pairs(str(folder / f"{name}_L"), str(folder / f"{name}_H"))
    images = [tuple(255.0 * read_rgb(path).double().numpy() for path in (pair.hr, pair.lr)) for pair in pairs]
    measured = [spectra(high, low) for high, low in images]
    pooled = measured[0][0].normalised()
    for each, _, _ in measured[1:]:
        pooled = pooled + each.normalised()
    whole = fits(pooled, ratio)
    scenes = []
    for (_, low), (each, shift, gain), pair in zip(images, measured, pairs, strict=True):
        numbers = {"shift": shift.tolist(), "gain": gain.tolist(), "noise": noise(low)}
        scenes.append({"name": pair.lr.stem, **numbers, **fits(each, ratio)})
    spread = {
        f"{model}.{key}": quartiles([scene[model][key] for scene in scenes])
        for model in ("gaussian", "unsharp", "camera")
        for key in whole[model]
        if key != "angle_degrees"
    }
    compared = [
        agreement(high, low, gain, ratio, whole["camera"])
        for (high, low), (_, _, gain) in zip(images, measured, strict=True)
    ]
    u, own_mtf = own_transfer(pooled, ratio)
    sums = {key: part.sum(axis=1) for key, part in vars(pooled).items()}
    return {
        "ratio": ratio,
        "scenes": len(scenes),
        "pooled": whole,
        "quartiles": {**spread, "noise": quartiles([scene["noise"] for scene in scenes])},
        "transfer": {
            "cycles_per_pixel_of_H": frequencies()[0][:, 0].tolist(),
            "H_to_L": (sums["cross"] / sums["power"]).tolist(),
            "coherence": (sums["cross"] / np.sqrt(sums["power"] * sums["low"])).tolist(),
            "cycles_per_own_pixel": u.tolist(),
            "camera": own_mtf.tolist(),
        },
        "power_ratio_db": {
            name: {
                "mean": np.mean([scene[name] for scene in compared], axis=0).tolist(),
                "deviation": np.std([scene[name] for scene in compared], axis=0).tolist(),
            }
            for name in compared[0]
        },
        "per_scene": scenes,
    }


def table(report: dict[str, Any]) -> str:
    """Return the quartiles as a Markdown table."""
    cameras = report["cameras"]
    lines = [f"| lower quartile, median, upper quartile | {' | '.join(cameras)} |", "|---|" + "---|" * len(cameras)]
    for key in next(iter(cameras.values()))["quartiles"]:
        cells = [", ".join(f"{value:.3f}" for value in each["quartiles"][key]) for each in cameras.values()]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    lines += ["", "| power against L, dB per octave up to 1/2 cycle per pixel | |", "|---|---|"]
    for camera_name, each in cameras.items():
        for name, ratio in each["power_ratio_db"].items():
            lines.append(f"| {camera_name}, {name} | {', '.join(f'{value:+.1f}' for value in ratio['mean'])} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both cameras, print the result and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--city100", type=Path, required=True, metavar="FOLDER", help="with Nikon_H, Nikon_L, iPhone_H and iPhone_L"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    report = {"cameras": {name: measure(options.city100, name) for name in RATIOS}}
    if options.json is not None:
        options.json.write_text(json.dumps(rounded(report)) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
