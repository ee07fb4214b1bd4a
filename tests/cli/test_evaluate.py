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
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

import savl
from savl.bicubic import bicubic_downsample
from savl.cli.app import app
from savl.evaluation import MetricUnavailable
from savl.network import SAVLConfig


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def message(result: Result) -> str:
    return " ".join(result.stderr.split())


@pytest.fixture(autouse=True)
def no_optional_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the optional metrics unavailable, whatever is installed."""
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, None)

    class NotThere:
        def __init__(self) -> None:
            raise MetricUnavailable("not at hand", "fetch it [here]")

    for name in ("Niqe", "Brisque"):
        monkeypatch.setattr(f"savl.evaluation.comparison.{name}", NotThere)


@pytest.fixture
def lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace LPIPS by a distance that requires images of 64 pixels."""

    class MeanDifference:
        no_value = "too small for AlexNet"

        def __call__(self, sr: Tensor, hr: Tensor) -> float | None:
            return (sr - hr).abs().mean().item() if hr.shape[-1] >= 64 else None

    monkeypatch.setattr("savl.evaluation.comparison.Lpips", MeanDifference)


@pytest.fixture
def darkness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace NIQE by the darkness of an image."""

    class Darkness:
        no_value = "never"

        def __call__(self, image: Tensor) -> float | None:
            return 1 - image.mean().item()

    monkeypatch.setattr("savl.evaluation.comparison.Niqe", Darkness)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pairs lr/a.png and hr/a.png, and weights of a small network."""
    for name in ("lr", "hr"):
        (tmp_path / name).mkdir()
    add_pair(tmp_path, "a", 8)
    save_network(tmp_path / "weights[1].safetensors")
    return tmp_path


def save_network(path: Path, **settings: Any) -> None:
    config = SAVLConfig(
        channels=6, depths=(1,), heads=1, window=4, cab_compress=3, cab_squeeze=3, degradation_code="none", **settings
    )
    savl.save(savl.build(config), path)


def upscale_elsewhere(folder: Path, name: str, *, shift: int = 20) -> Path:
    """Write a folder of results: the originals, made brighter."""
    (folder / name).mkdir()
    for path in (folder / "hr").iterdir():
        pixels = np.asarray(Image.open(path)).astype(int)
        Image.fromarray(np.clip(pixels + shift, 0, 255).astype(np.uint8)).save(folder / name / path.name)
    return folder / name


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
    assert f"skipped a map of severity or strength, {folder / 'lr' / 'a_severity.png'}" in result.stderr.splitlines()
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
            f"{method}_{name}": "" if value is None else repr(value)
            for method in ("bicubic", "model")
            for name, value in image[method].items()
        }
        assert row == {"name": image["name"]} | expected
        assert 0 < float(row["model_lpips"]) < 1
    assert [row["name"] for row in rows] == ["b", "c, d"]
    assert list(rows[0]) == [
        "name",
        "bicubic_psnr_y", "bicubic_ssim_y", "bicubic_psnr_rgb", "bicubic_ssim_rgb",
        "bicubic_lpips", "bicubic_dists", "bicubic_niqe", "bicubic_brisque",
        "model_psnr_y", "model_ssim_y", "model_psnr_rgb", "model_ssim_rgb",
        "model_lpips", "model_dists", "model_niqe", "model_brisque",
    ]  # fmt: skip
    for method, mean in (("bicubic", report["mean"]["bicubic"]), ("model", report["mean"][report["model"]])):
        assert mean["lpips"] == pytest.approx(math.fsum(float(row[f"{method}_lpips"]) for row in rows) / 2)
        assert f"{mean['lpips']:.4f}" in stdout


def test_without_torchvision_the_other_scores_and_the_reason_are_printed(folder: Path) -> None:
    stdout, report, rows = evaluate(folder)
    assert report["lpips_missing"] == "torchvision is not installed"
    lpips, dists, niqe, brisque = stdout.splitlines()[-4:]
    assert lpips.startswith("no LPIPS: torchvision is not installed; install the torchvision made for")
    assert dists.startswith("no DISTS: torchvision is not installed; install the torchvision made for")
    assert niqe == "no NIQE: not at hand; fetch it [here]"
    assert brisque == "no BRISQUE: not at hand; fetch it [here]"
    assert report["niqe_missing"] == "not at hand"
    assert "NIQE" not in stdout.splitlines()[2]
    assert [mean["lpips"] for mean in report["mean"].values()] == [None, None]
    assert [(row["bicubic_lpips"], row["model_lpips"]) for row in rows] == [("", "")]
    assert all(row["model_psnr_y"] for row in rows)


def test_images_too_small_for_lpips_are_reported_and_there_is_no_mean(folder: Path, lpips: None) -> None:
    add_pair(folder, "b[red]", 8)
    add_pair(folder, "c", 16)
    stdout, report, rows = evaluate(folder)
    assert report["lpips_missing"] == "too small for AlexNet: a, b[red]"
    assert "no LPIPS: too small for AlexNet: a, b[red]" in stdout.splitlines()
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


def compare(folder: Path, *arguments: object) -> Result:
    return run("evaluate", "--lr", folder / "lr", "--hr", folder / "hr", *arguments)


def test_several_networks_and_results_are_compared_in_all_reports(folder: Path) -> None:
    add_pair(folder, "b", 8)
    save_network(folder / "other.safetensors")
    upscale_elsewhere(folder, "away")
    upscale_elsewhere(folder, "far", shift=60)
    result = compare(
        folder, "--model", f"mine={folder / 'weights[1].safetensors'}", "--model", folder / "other.safetensors",
        "--sr", f"Else|where={folder / 'away'}", "--sr", folder / "far",
        "--json", folder / "s.json", "--csv", folder / "s.csv",
        "--markdown", folder / "s.md", "--html", folder / "s.html",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    other = str(folder / "other.safetensors")
    labels = ["bicubic", "mine", other, "Else|where", "far"]

    report = json.loads((folder / "s.json").read_text())
    assert report["model"] is None
    assert report["scale"] == 4
    assert [method["label"] for method in report["methods"]] == labels
    assert list(report["mean"]) == labels
    assert [set(image) for image in report["images"]] == [{"name", *labels}] * 2
    assert report["mean"]["Else|where"]["psnr_rgb"] > report["mean"]["far"]["psnr_rgb"] > 12
    assert report["mean"]["far"]["ssim_y"] > report["mean"]["mine"]["ssim_y"]

    with (folder / "s.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["a", "b"]
    assert float(rows[1]["far_psnr_y"]) == report["images"][1]["far"]["psnr_y"]

    table = (folder / "s.md").read_text().splitlines()
    assert table[0] == "| 2 images | PSNR Y ↑ | SSIM Y ↑ | PSNR RGB ↑ | SSIM RGB ↑ |"
    assert table[5].startswith(r"| Else\|where | **")
    assert table[6].startswith("| far | ")
    assert "**" not in table[6]
    assert "No NIQE: not at hand." in table

    page = (folder / "s.html").read_text()
    assert page.count("<figure") == 2 * (3 + len(labels))
    assert page.count("data:image/webp;base64,") == page.count("<img")
    for word in ("Else|where", "far", "PSNR RGB ↑", "<h3>a ", "No DISTS: torchvision is not installed."):
        assert word in page
    for outside in ("http:", "https:", 'src="/', "url("):
        assert outside not in page
    for line in result.stdout.splitlines():
        assert "\x1b" not in line


def test_results_alone_need_no_network(folder: Path) -> None:
    upscale_elsewhere(folder, "away")
    result = compare(folder, "--sr", folder / "away", "--json", folder / "s.json")
    assert result.exit_code == 0, result.stderr
    report = json.loads((folder / "s.json").read_text())
    assert list(report["mean"]) == ["bicubic", "away"]
    assert report["scale"] == 4


def test_scores_without_an_original_are_measured_of_the_originals_too(folder: Path, darkness: None) -> None:
    upscale_elsewhere(folder, "away", shift=60)
    result = compare(folder, "--sr", folder / "away", "--json", folder / "s.json", "--csv", folder / "s.csv")
    assert result.exit_code == 0, result.stderr
    mean = json.loads((folder / "s.json").read_text())["mean"]
    assert mean["away"]["niqe"] < mean["original"]["niqe"]
    assert mean["original"] == {"niqe": pytest.approx(mean["bicubic"]["niqe"], abs=0.01)}
    assert (folder / "s.csv").read_text().splitlines()[0].endswith(",original_niqe")
    assert [line.split()[1] for line in result.stdout.splitlines()[4:7]] == ["bicubic", "away", "original"]


def test_images_of_no_pair_are_left_out_and_reported(folder: Path) -> None:
    away = upscale_elsewhere(folder, "away")
    (away / "a.png").rename(away / "a_out.png")
    (away / "readme_out.png").write_bytes((away / "a_out.png").read_bytes())
    result = compare(folder, "--sr", away)
    assert result.exit_code == 0, result.stderr
    assert f"skipped an image that belongs to no pair, {away / 'readme_out.png'}" in result.stderr.splitlines()


@pytest.mark.parametrize("name", ["a.png", "b.png"])
def test_a_result_of_another_size_is_refused_before_the_evaluation(folder: Path, name: str) -> None:
    add_pair(folder, "b", 8)
    away = upscale_elsewhere(folder, "away")
    Image.new("RGB", (32, 31)).save(away / name)
    result = compare(folder, "--sr", away)
    assert result.exit_code == 2
    expected = f"{away / name} must be as large as {folder / 'hr' / name}: 32x32 pixels, got 32x31"
    assert expected in result.stderr.replace("\n", "")
    assert "evaluating" not in result.stderr


def test_a_missing_result_is_reported_with_the_names_that_are_there(folder: Path) -> None:
    add_pair(folder, "b", 8)
    away = upscale_elsewhere(folder, "away")
    (away / "a.png").rename(away / "z.png")
    result = compare(folder, "--sr", f"X={away}")
    assert result.exit_code == 2
    assert "has no result named a; it has images of other names: z" in message(result)


def test_networks_of_different_scales_are_refused(folder: Path) -> None:
    save_network(folder / "two.safetensors", scale=2)
    result = compare(folder, "--model", "savl-tiny", "--model", f"two={folder / 'two.safetensors'}")
    assert result.exit_code == 2
    assert "the networks must have the same scale, got savl-tiny ×4, two ×2" in message(result)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--model", "savl-tiny", "--model", "savl-tiny"], "the name savl-tiny is already used"),
        (["--model", "savl-tiny", "--sr", "savl-tiny=hr"], "the name savl-tiny is already used"),
        (["--sr", "bicubic=hr"], "the name bicubic is already used"),
        (["--sr", "original=hr"], "the name original is already used"),
        (["--model", "savl-tiny", "--sr", "model=hr"], "the name model is already used"),
        (["--sr", "=hr"], "a label is expected before ="),
        (["--sr", "X="], "a label is expected before ="),
        (["--sr", "nowhere"], "--sr nowhere: nowhere is not a folder"),
    ],
)
def test_labels_must_differ_and_name_something(folder: Path, arguments: list[str], fragment: str) -> None:
    result = compare(folder, *arguments)
    assert result.exit_code == 2
    assert fragment in message(result)


def test_a_folder_whose_name_contains_an_equals_sign_needs_no_label(folder: Path) -> None:
    away = upscale_elsewhere(folder, "x=y")
    assert " x=y " in compare(folder, "--sr", away).stdout


def test_a_page_without_jinja_is_refused_before_the_evaluation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = compare(folder, "--html", folder / "page.html")
    assert result.exit_code == 1
    assert "pip install 'savl[evaluate]'" in message(result)
    assert "evaluating" not in result.stderr
    assert not (folder / "page.html").exists()


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"--lr": "lr[/q]"}, "lr[/q] is not a folder"),
        ({"--model": "zzz"}, "zzz"),
        ({"--json": "none/scores.json"}, "No such file or directory"),
        ({"--json": "scores.json", "--csv": "none/scores.csv"}, "No such file or directory"),
        ({"--json": "scores", "--csv": "hr/../scores"}, "--json and --csv must name two files"),
        ({"--html": "scores", "--markdown": "scores"}, "--markdown and --html must name two files"),
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


FILES = ("--lr", "--hr", "--json", "--csv", "--markdown", "--html")


def _place(folder: Path, name: str, value: str) -> str:
    return str(folder / value) if name in FILES else value


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


def test_the_strength_applies_to_every_network_and_stands_in_the_reports(folder: Path) -> None:
    save_network(folder / "other.safetensors")
    upscale_elsewhere(folder, "away")
    networks = [
        "--model",
        f"mine={folder / 'weights[1].safetensors'}",
        "--model",
        f"other={folder / 'other.safetensors'}",
    ]
    reports = ["--json", folder / "s.json", "--markdown", folder / "s.md", "--html", folder / "s.html"]
    scores, strengths = {}, {}
    for given, arguments in (("auto", []), ("0", ["--strength", "0"]), ("0.5", ["--strength", "0.5"])):
        result = compare(folder, *networks, "--sr", folder / "away", *reports, *arguments)
        assert result.exit_code == 0, result.stderr
        report = json.loads((folder / "s.json").read_text())
        strengths[given] = [method["strength"] for method in report["methods"]]
        scores[given] = report["mean"]
        for text in (result.stdout, (folder / "s.md").read_text(), (folder / "s.html").read_text()):
            assert f"Restoration strength: {given}." in text
    assert strengths == {
        "auto": [None, "auto", "auto", None], "0": [None, 0.0, 0.0, None], "0.5": [None, 0.5, 0.5, None],
    }  # fmt: skip
    assert scores["0"]["mine"] == scores["0"]["other"] == scores["0"]["bicubic"]
    assert len({scores[given]["mine"]["psnr_y"] for given in scores}) == 3
    assert len({scores[given]["away"]["psnr_y"] for given in scores}) == 1


def test_a_comparison_without_a_network_has_no_strength(folder: Path) -> None:
    upscale_elsewhere(folder, "away")
    result = compare(folder, "--sr", folder / "away", "--markdown", folder / "s.md")
    assert "strength" not in result.stdout + (folder / "s.md").read_text()


def test_a_bad_strength_is_a_usage_error(folder: Path) -> None:
    result = compare(folder, "--strength", "2")
    assert result.exit_code == 2
    assert "--strength: strength must be 'auto' or a number from 0 to 1, got 2" in message(result).replace("│ ", "")


@pytest.fixture
def enlarged(folder: Path) -> Path:
    """A folder ``large`` of the pair, whose images both have 34×33 pixels, and ``cropped``, the originals at 32×32."""
    random = np.random.default_rng(1)
    for name in ("large", "large/lr", "large/hr", "cropped"):
        (folder / name).mkdir()
    lr, hr = (random.integers(0, 256, (33, 34, 3), np.uint8) for _ in range(2))
    Image.fromarray(lr).save(folder / "large/lr/a.png")
    Image.fromarray(hr).save(folder / "large/hr/a.png")
    Image.fromarray(hr[:32, :32]).save(folder / "cropped/a.png")
    reduced = bicubic_downsample(torch.from_numpy(lr[:32, :32]).permute(2, 0, 1)[None] / 255, 4)[0]
    Image.fromarray((reduced * 255).round().byte().permute(1, 2, 0).numpy()).save(folder / "lr/a.png")
    Image.fromarray(hr[:32, :32]).save(folder / "hr/a.png")
    return folder / "large"


def test_enlarged_images_are_reduced_if_that_is_asked_for(folder: Path, enlarged: Path) -> None:
    network, json_file, table = ["--model", folder / "weights[1].safetensors"], folder / "s.json", folder / "s.md"
    result = compare(enlarged, *network)
    assert result.exit_code == 2
    assert "has to be reduced (savl evaluate --reduce-lr does so)" in message(result)
    reports = []
    for where, arguments in ((enlarged, ["--reduce-lr"]), (folder, [])):
        files = ["--sr", folder / "cropped", "--json", json_file, "--markdown", table]
        result = compare(where, *network, *files, *arguments)
        assert result.exit_code == 0, result.stderr
        sentence = "Low-resolution images with the size of their originals were reduced."
        assert (sentence in table.read_text()) == (sentence in result.stdout) == bool(arguments)
        reports.append(json.loads(json_file.read_text()))
    assert [report["reduce_lr"] for report in reports] == [True, False]
    assert reports[0]["mean"] == reports[1]["mean"]
    assert reports[0]["mean"]["cropped"]["ssim_y"] == 1


def test_results_have_the_size_of_the_cropped_originals_of_reduced_images(folder: Path, enlarged: Path) -> None:
    network = ["--model", folder / "weights[1].safetensors"]
    result = compare(enlarged, *network, "--sr", enlarged / "hr", "--reduce-lr")
    assert result.exit_code == 2
    assert "32x32 pixels, got 34x33" in message(result)
    assert "evaluating" not in result.stderr
    result = compare(enlarged, "--sr", folder / "cropped", "--reduce-lr")
    assert result.exit_code == 2
    assert "a network is needed, whose scale is used (--model)" in message(result)
