"""The severity map is the same from the command line, from Python and from the network, and its picture shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from typer.testing import CliRunner

import savl
from savl.cli.app import app
from savl.images.folder import read_rgb
from savl.images.format import PNG
from savl.images.read import read_image
from savl.images.severity_map import draw_severity, viridis
from savl.images.write import write_image
from savl.network import SAVLConfig

HEIGHT, WIDTH = 29, 43


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with an image and with weights whose severity varies over the image."""
    torch.manual_seed(3)
    model = savl.build(
        SAVLConfig(
            channels=6, depths=(1,), heads=1, window=4, cab_compress=3, cab_squeeze=3, upsampler="pixelshuffledirect",
            latent=6, estimator_width=8, estimator_dilations=(1, 2),
        )
    )  # fmt: skip
    assert model.estimator is not None
    with torch.no_grad():
        model.estimator.head.weight.normal_(std=0.25)
    savl.save(model, tmp_path / "model.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[:, WIDTH // 2 :] //= 8
    write_image(tmp_path / "photo.png", pixels, image_format=PNG)
    return tmp_path


def from_shell(folder: Path, tile: int) -> NDArray[np.uint8]:
    """Return the picture that `savl upscale --severity-map` writes."""
    output = folder / f"{tile}.png"
    arguments = ["upscale", folder / "photo.png", "-o", output, "--severity-map", "--tile", tile]
    result = CliRunner().invoke(app, [*map(str, arguments), "--model", str(folder / "model.safetensors")])
    assert result.exit_code == 0, result.stderr
    drawn = read_image(folder / f"{tile}_severity.png").pixels
    assert drawn.dtype == np.uint8
    return np.asarray(drawn, dtype=np.uint8)


def values(drawn: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Read the map back from the colours of its picture: ``(h, w)`` in [0, 2], accurate to about 2/255."""
    factor = round(512 / WIDTH)
    pixels = drawn[12 : 12 + factor * HEIGHT : factor, 12 : 12 + factor * WIDTH : factor].astype(np.int64)
    table = colormaps["viridis"](np.arange(256), bytes=True)[:, :3].astype(np.int64)
    nearest = np.square(pixels[:, :, None] - table).sum(axis=-1).argmin(axis=-1)
    return np.asarray(nearest / 127.5)


def test_shell_python_and_network_agree_whatever_the_tiles(folder: Path) -> None:
    model = savl.load(folder / "model.safetensors")
    y = read_rgb(folder / "photo.png")[None]
    with torch.no_grad():
        _, field = model(y, return_field=True)
    assert field is not None
    assert field.severity is not None
    expected = field.severity[0].numpy()
    assert expected.std() > 0.2, "a constant map would prove nothing"
    for tile in (0, 20):
        upscaled = savl.Upscaler(model, tile=tile)(y).severity[0].numpy()
        np.testing.assert_allclose(upscaled, expected, atol=1e-4)
        np.testing.assert_allclose(values(from_shell(folder, tile)), expected, atol=2 / 127.5)


def test_a_colour_bar_beside_the_map_says_what_colours_mean(folder: Path) -> None:
    drawn = from_shell(folder, 0)
    factor = round(512 / WIDTH)
    bar = drawn[12 : 12 + factor * HEIGHT, 12 + factor * WIDTH + 12 + 10]
    ends = colormaps["viridis"]([0.0, 1.0], bytes=True)[:, :3].astype(int)
    assert np.abs(bar[-4] - ends[0]).max() < 12, "0 below"
    assert np.abs(bar[3] - ends[1]).max() < 12, "2 above"
    labels = drawn[:, 12 + factor * WIDTH + 12 + 20 + 6 :]
    assert (labels.min(axis=2) < 100).mean() > 0.01, "numbers and a name stand beside it"


def test_colours_mean_the_same_in_every_map() -> None:
    low, high = (draw_severity(np.full((40, 60), value, np.float32)) for value in (0.5, 1.5))
    both = draw_severity(np.repeat(np.asarray([[0.5, 1.5]], np.float32), 30, axis=1).repeat(40, axis=0))
    assert low.shape == high.shape == both.shape
    assert (both[20, 20] == low[20, 20]).all()
    assert (both[20, 500] == high[20, 500]).all()
    assert (low[20, 20] != high[20, 20]).any()


def test_viridis_has_the_colours_of_matplotlib() -> None:
    values = np.concatenate([np.linspace(-0.2, 1.2, 5001), [0.0, 1.0]])
    assert (viridis(values) == colormaps["viridis"](values, bytes=True)[:, :3]).all()
    assert viridis(np.asarray([[np.nan]], np.float32)).tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize("limits", [(0.0, 2.0), (0.0, 1.0)])
def test_the_bar_fades_from_one_end_to_the_other(limits: tuple[float, float]) -> None:
    drawn = draw_severity(np.zeros((40, 60), np.float32), limits)
    height, right = drawn.shape[0] - 24, drawn.shape[1] - 92
    bar = drawn[13 : 12 + height - 1, right + 10].astype(int)
    expected = viridis(np.linspace(1, 0, height))[1:-1].astype(int)
    assert (bar == expected).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (700, 3)], ids=str)
def test_a_map_of_any_shape_has_its_bar(size: tuple[int, int]) -> None:
    drawn = draw_severity(np.full(size, 2.0, np.float32))
    factor = max(1, round(512 / max(size)))
    assert drawn.shape == (24 + max(size[0] * factor, 120), 24 + size[1] * factor + 92, 3)
    assert (drawn[12, 12] == viridis(np.ones(1))[0]).all()
    assert (drawn[0] == 255).all(), "white above"
