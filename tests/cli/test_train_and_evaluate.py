"""`savl train` and `savl evaluate` as typed: results, errors and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import savl
from savl.cli.app import app
from savl.network import SAVLConfig

CONFIG = """
[model]
channels = 6
depths = [1]
heads = 1
window = 4
cab_compress = 3
cab_squeeze = 3
latent = 4
estimator_width = 6
estimator_dilations = [1]
decoder_width = 6
decoder_depth = 2
[data]
patch = 8
batch = 2
[run]
steps = 2
log_every = 1
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def message(result: Result) -> str:
    return " ".join(result.stderr.split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pairs lr/a.png and hr/a.png, a training configuration, and weights of a small network."""
    random = np.random.default_rng(0)
    for name, side in (("lr", 8), ("hr", 32)):
        (tmp_path / name).mkdir()
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(tmp_path / name / "a.png")
    (tmp_path / "config.toml").write_text(CONFIG)
    config = SAVLConfig(
        channels=6, depths=(1,), heads=1, window=4, cab_compress=3, cab_squeeze=3, degradation_code="none"
    )
    savl.save(savl.build(config), tmp_path / "weights[1].safetensors")
    return tmp_path


def test_training_writes_weights_that_load_and_prints_where(folder: Path) -> None:
    result = run("train", folder / "config.toml", "--hr", folder / "hr", "-o", folder / "run")
    assert result.exit_code == 0, result.stderr
    weights = Path(result.stdout.strip())
    assert weights == folder / "run" / "model.safetensors"
    assert savl.load(weights).config.channels == 6


@pytest.mark.parametrize(
    ("config", "hr", "fragment"),
    [
        ("[foo]\nx = 1", "hr", "unknown table [foo]"),
        ("[data]\nbach = 1", "hr", "[data] has unknown settings ['bach']"),
        (CONFIG, "no[red]where", "no[red]where is not a folder"),
        (CONFIG, "x[/b]", "x[/b] is not a folder"),
        (CONFIG, "lr", "none of the 1 images is at least 32 pixels"),
    ],
)
def test_training_mistakes_are_told_to_the_letter_and_exit_with_2(
    folder: Path, config: str, hr: str, fragment: str
) -> None:
    (folder / "config.toml").write_text(config)
    result = run("train", folder / "config.toml", "--hr", folder / hr, "-o", folder / "run")
    assert result.exit_code == 2
    assert fragment in message(result)
    assert not (folder / "run").exists(), "nothing was trained, nothing should be there"


def test_a_missing_configuration_is_named(folder: Path) -> None:
    result = run("train", folder / "none.toml")
    assert result.exit_code == 2
    assert "none.toml" in message(result)


def test_evaluation_prints_both_rows_and_writes_every_image(folder: Path) -> None:
    result = run(
        "evaluate", "--lr", folder / "lr", "--hr", folder / "hr", "--model", folder / "weights[1].safetensors",
        "--json", folder / "scores.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "bicubic" in result.stdout
    assert "PSNR RGB" in result.stdout
    report = json.loads((folder / "scores.json").read_text())
    assert report["lr"].endswith("/lr")
    assert [image["name"] for image in report["images"]] == ["a"]
    assert set(report["mean"]) == {"bicubic", str(folder / "weights[1].safetensors")}


def test_identical_images_score_null_in_valid_json(folder: Path) -> None:
    for name, side in (("lr", 8), ("hr", 32)):
        Image.new("RGB", (side, side), (9, 9, 9)).save(folder / name / "a.png")
    result = run("evaluate", "--lr", folder / "lr", "--hr", folder / "hr", "--json", folder / "scores.json")
    assert result.exit_code == 0, result.stderr
    assert json.loads((folder / "scores.json").read_text())["mean"]["bicubic"]["psnr_y"] is None


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"--lr": "lr[/q]"}, "lr[/q] is not a folder"),
        ({"--model": "zzz"}, "zzz"),
        ({"--json": "none/scores.json"}, "No such file or directory"),
        ({"--dtype": "float16"}, "float16"),
        ({"--device": "tpu"}, "tpu"),
    ],
)
def test_evaluation_mistakes_are_told_and_leave_nothing(folder: Path, changes: dict[str, str], fragment: str) -> None:
    options = {"--lr": "lr", "--hr": "hr", **changes}
    arguments = [part for name, value in options.items() for part in (name, _place(folder, name, value))]
    result = run("evaluate", *arguments)
    assert result.exit_code in (1, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit), "a traceback reached the user"
    assert fragment in message(result)
    assert sorted(path.name for path in folder.iterdir()) == ["config.toml", "hr", "lr", "weights[1].safetensors"]


def _place(folder: Path, name: str, value: str) -> str:
    return str(folder / value) if name in ("--lr", "--hr", "--json") else value


def test_images_too_small_to_score_are_named(folder: Path) -> None:
    Image.new("RGB", (4, 4)).save(folder / "lr" / "a.png")
    Image.new("RGB", (16, 16)).save(folder / "hr" / "a.png")
    result = run("evaluate", "--lr", folder / "lr", "--hr", folder / "hr")
    assert result.exit_code == 2
    assert "a.png: images must be at least 19 pixels" in message(result)
