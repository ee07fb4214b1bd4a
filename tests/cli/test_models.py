"""Models of other architectures on the command line, and `savl models info`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import savl
from savl.cli.app import app
from savl.images.format import PNG
from savl.images.read import read_image
from savl.images.write import write_image

Make = Callable[[str], nn.Module]


@pytest.fixture
def folder(foreign_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with weights of several architectures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    for name, file in (("Compact x3", "compact"), ("SwinIR", "swinir"), ("NAFNet", "nafnet")):
        torch.save({"params": foreign_model(name).state_dict()}, f"{file}.pth")
    save_file(
        foreign_model("SwinIR gray").state_dict(),
        "gray.safetensors",
        metadata={"modelspec.license": "CC-BY-4.0", "modelspec.title": "Gray\nscans", "other": "x"},
    )
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_a_picture_with_alpha_and_16_bits_is_upscaled(folder: Path) -> None:
    random = np.random.default_rng(0)
    write_image("scan.png", random.integers(0, 65536, (9, 14, 4), dtype=np.uint16), image_format=PNG)
    result = run("upscale", "scan.png", "--model", "compact.pth", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    out = read_image("scan_x3.png").pixels
    assert out.shape == (27, 42, 4)
    assert out.dtype == np.uint16


@pytest.mark.parametrize(("model", "scale"), [("nafnet.pth", 1), ("gray.safetensors", 2), ("swinir.pth", 4)])
def test_the_default_scale_and_suffix_are_those_of_the_model(model: str, scale: int, folder: Path) -> None:
    Image.new("RGB", (5, 3), (10, 200, 90)).save("photo.png")
    result = run("upscale", "photo.png", "--model", model, "--device", "cpu", "--tile", "16")
    assert result.exit_code == 0, result.stderr
    assert read_image(f"photo_x{scale}.png").pixels.shape == (3 * scale, 5 * scale, 3)


def test_a_severity_map_is_refused_for_models_without_a_field(folder: Path) -> None:
    Image.new("RGB", (5, 3)).save("photo.png")
    result = run("upscale", "photo.png", "--model", "compact.pth", "--severity-map")
    assert result.exit_code == 2
    assert "--severity-map: model compact.pth has no degradation field" in result.stderr
    with pytest.raises(ValueError, match="severity_map must be None, because the model has no degradation field"):
        savl.upscale_file("photo.png", "out.png", model="compact.pth", severity_map="map.png")
    assert not (folder / "out.png").exists()


def test_evaluate_compares_models_of_the_same_scale(folder: Path, pair_folders: tuple[Path, Path]) -> None:
    lr, hr = map(str, pair_folders)
    arguments = ["--lr", lr, "--hr", hr, "--device", "cpu", "--json", "scores.json"]
    result = run("evaluate", *arguments, "--model", "SwinIR=swinir.pth", "--model", "savl-tiny")
    assert result.exit_code == 0, result.output
    assert "SwinIR" in result.stdout
    result = run("evaluate", *arguments, "--model", "swinir.pth", "--model", "nafnet.pth")
    assert result.exit_code == 2
    assert "the networks must have the same scale, got swinir.pth ×4, nafnet.pth ×1" in result.stderr


def test_evaluate_scores_restoration_models(folder: Path, pair_folders: tuple[Path, Path]) -> None:
    hr = pair_folders[1]
    noisy = shutil.copytree(hr, folder / "noisy")
    result = run("evaluate", "--lr", str(noisy), "--hr", str(hr), "--device", "cpu", "--model", "nafnet.pth")
    assert result.exit_code == 0, result.output


def test_info_says_what_a_file_is(folder: Path) -> None:
    result = run("models", "info", "gray.safetensors")
    assert result.exit_code == 0, result.output
    lines = dict(line.split("  ", 1) for line in result.stdout.splitlines() if "  " in line)
    lines = {label: value.strip() for label, value in lines.items()}
    assert lines["architecture"] == "SwinIR"
    assert lines["scale"] == "x2"
    assert lines["images"] == "gray, each colour channel by itself"
    assert lines["parameters"] == "6,688"
    assert lines["image sizes"] == "at least 16; images are padded"
    assert lines["tiles"] == "discouraged"
    assert lines["licence"] == "CC-BY-4.0"
    assert "scans" in lines["metadata: modelspec.title"]


def test_info_as_json_has_the_same_facts(folder: Path) -> None:
    found = json.loads(run("models", "info", "nafnet.pth", "--json").stdout)
    assert (found["architecture"], found["purpose"], found["scale"]) == ("NAFNet", "Restoration", 1)
    assert found["licence"] is None
    assert found["acceleration"]
    found = json.loads(run("models", "info", "savl-tiny", "--json").stdout)
    assert (found["architecture"], found["parameters"], found["licence"]) == ("SAVL", 473_597, "Apache-2.0")


def test_info_states_what_would_be_accelerated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("savl.inference.network.uses_fused_attention", lambda device: True)
    monkeypatch.setattr("savl.inference.network.accelerated", lambda network: (network, "2 of 2 blocks"))
    assert run("models", "info", "swinir.pth").stdout.endswith("\n2 of 2 blocks\n")
    monkeypatch.setattr("savl.inference.network.uses_fused_attention", lambda device: False)
    assert "not accelerated: no fused kernel" in run("models", "info", "swinir.pth").stdout


def test_info_refuses_what_cannot_be_loaded(folder: Path) -> None:
    torch.save({"a": torch.zeros(1)}, "other.pth")
    result = run("models", "info", "other.pth")
    assert result.exit_code == 2
    assert "spandrel does not recognise its tensors" in result.stderr
    assert run("models", "info", "missing.pth").exit_code == 1
