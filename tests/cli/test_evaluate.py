"""`savl evaluate` on the command line: results, errors and exit codes."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

import savl
from savl.cli.app import app
from savl.network import SAVLConfig


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def message(result: Result) -> str:
    return " ".join(result.stderr.split())


@pytest.fixture(autouse=True)
def no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make LPIPS unavailable, whatever is installed."""
    monkeypatch.setitem(sys.modules, "torchvision", None)


@pytest.fixture
def lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace LPIPS by a distance that requires images of 64 pixels."""

    class MeanDifference:
        def __call__(self, sr: Tensor, hr: Tensor) -> float | None:
            return (sr - hr).abs().mean().item() if hr.shape[-1] >= 64 else None

    monkeypatch.setattr("savl.evaluation.Lpips", MeanDifference)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pairs lr/a.png and hr/a.png, and weights of a small network."""
    for name in ("lr", "hr"):
        (tmp_path / name).mkdir()
    add_pair(tmp_path, "a", 8)
    config = SAVLConfig(
        channels=6, depths=(1,), heads=1, window=4, cab_compress=3, cab_squeeze=3, degradation_code="none"
    )
    savl.save(savl.build(config), tmp_path / "weights[1].safetensors")
    return tmp_path


def add_pair(folder: Path, name: str, side: int) -> None:
    random = np.random.default_rng(0)
    for where, pixels in (("lr", side), ("hr", 4 * side)):
        Image.fromarray(random.integers(0, 256, (pixels, pixels, 3), np.uint8)).save(folder / where / f"{name}.png")


def evaluate(folder: Path) -> tuple[str, dict[str, Any], list[dict[str, str]]]:
    """Evaluate the small network; return the output, the JSON and the rows of the CSV."""
    result = run(
        "evaluate", "--lr", folder / "lr", "--hr", folder / "hr", "--model", folder / "weights[1].safetensors",
        "--json", folder / "scores.json", "--csv", folder / "scores.csv",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        return result.stdout, json.loads((folder / "scores.json").read_text()), list(csv.DictReader(file))


def test_evaluation_reports_the_severity_maps_it_leaves_out(folder: Path) -> None:
    Image.open(folder / "lr" / "a.png").save(folder / "lr" / "a_severity.png")
    result = run("evaluate", "--lr", folder / "lr", "--hr", folder / "hr", "--model", folder / "weights[1].safetensors")
    assert result.exit_code == 0, result.stderr
    assert f"skipped a severity map, {folder / 'lr' / 'a_severity.png'}" in result.stderr.splitlines()
    assert "1 images" in result.stdout


def test_evaluation_prints_both_rows_and_writes_every_image(folder: Path) -> None:
    stdout, report, _ = evaluate(folder)
    assert "bicubic" in stdout
    assert "PSNR RGB" in stdout
    assert report["lr"].endswith("/lr")
    assert [image["name"] for image in report["images"]] == ["a"]
    assert set(report["mean"]) == {"bicubic", str(folder / "weights[1].safetensors")}


def test_every_image_is_a_row_of_the_csv_with_the_scores_of_the_json(folder: Path, lpips: None) -> None:
    (folder / "lr" / "a.png").unlink()
    (folder / "hr" / "a.png").unlink()
    add_pair(folder, "b", 16)
    add_pair(folder, "c, d", 16)
    stdout, report, rows = evaluate(folder)
    assert report["lpips_missing"] is None
    assert "no LPIPS" not in stdout
    for row, image in zip(rows, report["images"], strict=True):
        expected = {
            f"{method}_{name}": repr(value) for method in ("bicubic", "model") for name, value in image[method].items()
        }
        assert row == {"name": image["name"]} | expected
        assert 0 < float(row["model_lpips"]) < 1
    assert [row["name"] for row in rows] == ["b", "c, d"]
    assert list(rows[0]) == [
        "name",
        "bicubic_psnr_y", "bicubic_ssim_y", "bicubic_psnr_rgb", "bicubic_ssim_rgb", "bicubic_lpips",
        "model_psnr_y", "model_ssim_y", "model_psnr_rgb", "model_ssim_rgb", "model_lpips",
    ]  # fmt: skip
    for method, mean in (("bicubic", report["mean"]["bicubic"]), ("model", report["mean"][report["model"]])):
        assert mean["lpips"] == pytest.approx(math.fsum(float(row[f"{method}_lpips"]) for row in rows) / 2)
        assert f"{mean['lpips']:.4f}" in stdout


def test_without_torchvision_the_other_scores_and_the_reason_are_printed(folder: Path) -> None:
    stdout, report, rows = evaluate(folder)
    assert report["lpips_missing"] == "torchvision is not installed"
    assert stdout.splitlines()[-1].startswith(
        "no LPIPS: torchvision is not installed; install the torchvision made for"
    )
    assert [mean["lpips"] for mean in report["mean"].values()] == [None, None]
    assert [(row["bicubic_lpips"], row["model_lpips"]) for row in rows] == [("", "")]
    assert all(row["model_psnr_y"] for row in rows)


def test_images_too_small_for_lpips_are_reported_and_there_is_no_mean(folder: Path, lpips: None) -> None:
    add_pair(folder, "b[red]", 8)
    add_pair(folder, "c", 16)
    stdout, report, rows = evaluate(folder)
    assert report["lpips_missing"] == "too small for AlexNet: a, b[red]"
    assert stdout.splitlines()[-1] == "no LPIPS: too small for AlexNet: a, b[red]"
    assert report["mean"]["bicubic"]["lpips"] is None
    assert [row["model_lpips"] == "" for row in rows] == [True, True, False]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_with_invalid_utf_8_is_written_to_the_csv_unchanged(folder: Path) -> None:
    for name in ("lr", "hr"):
        (folder / name / "a.png").rename(folder / name / os.fsdecode(b"caf\xe9.png"))
    result = run("evaluate", "--lr", folder / "lr", "--hr", folder / "hr", "--csv", folder / "scores.csv")
    assert result.exit_code == 0, result.stderr
    assert (folder / "scores.csv").read_bytes().splitlines()[1].startswith(b"caf\xe9,")


def test_identical_images_score_null_in_valid_json_and_inf_in_csv(folder: Path) -> None:
    for name, side in (("lr", 8), ("hr", 32)):
        Image.new("RGB", (side, side), (9, 9, 9)).save(folder / name / "a.png")
    _, report, rows = evaluate(folder)
    assert report["mean"]["bicubic"]["psnr_y"] is None
    assert rows[0]["bicubic_psnr_y"] == "inf"


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"--lr": "lr[/q]"}, "lr[/q] is not a folder"),
        ({"--model": "zzz"}, "zzz"),
        ({"--json": "none/scores.json"}, "No such file or directory"),
        ({"--json": "scores.json", "--csv": "none/scores.csv"}, "No such file or directory"),
        ({"--json": "scores", "--csv": "hr/../scores"}, "--json and --csv must name two files"),
        ({"--dtype": "float16"}, "float16"),
        ({"--device": "tpu"}, "tpu"),
    ],
)
def test_errors_are_reported_and_leave_no_files(folder: Path, changes: dict[str, str], fragment: str) -> None:
    options = {"--lr": "lr", "--hr": "hr", **changes}
    arguments = [part for name, value in options.items() for part in (name, _place(folder, name, value))]
    result = run("evaluate", *arguments)
    assert result.exit_code in (1, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit), "a traceback reached the user"
    assert fragment in message(result)
    assert sorted(path.name for path in folder.iterdir()) == ["hr", "lr", "weights[1].safetensors"]


def _place(folder: Path, name: str, value: str) -> str:
    return str(folder / value) if name in ("--lr", "--hr", "--json", "--csv") else value


def test_images_too_small_to_score_are_reported(folder: Path) -> None:
    Image.new("RGB", (4, 4)).save(folder / "lr" / "a.png")
    Image.new("RGB", (16, 16)).save(folder / "hr" / "a.png")
    result = run("evaluate", "--lr", folder / "lr", "--hr", folder / "hr")
    assert result.exit_code == 2
    assert "a.png: images must be at least 19 pixels" in message(result)


@pytest.mark.skipif(sys.platform == "win32", reason="such names are forbidden there")
def test_control_characters_in_a_name_are_escaped(folder: Path) -> None:
    for side in ("lr", "hr"):
        (folder / side / "new\nline\x1b[31m.png").write_bytes(b"no image")
    result = run("evaluate", "--lr", folder / "lr", "--hr", folder / "hr", "--model", folder / "weights[1].safetensors")
    assert result.exit_code == 1
    assert r"new\nline\x1b[31m.png" in message(result)
    assert "\x1b" not in message(result)
