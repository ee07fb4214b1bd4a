"""`savl analyze` on the command line: files, errors and exit codes."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.manifold import TSNE
from typer.testing import CliRunner, Result

import savl
from savl.analysis import controlled_results
from savl.cli.app import app
from savl.network import SAVL, SAVLConfig


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["analyze", *(str(argument) for argument in arguments)])


def message(result: Result) -> str:
    return " ".join(result.stderr.split())


@pytest.fixture(autouse=True)
def short_estimators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controlled_results, "mine", partial(controlled_results.mine, steps=3, width=8))
    monkeypatch.setattr(controlled_results, "club", partial(controlled_results.club, steps=3, width=8))
    monkeypatch.setattr("sklearn.manifold.TSNE", partial(TSNE, max_iter=250))


@pytest.fixture(scope="module")
def original_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, photographs of 260×390 in hr/ and a table of them."""
    tmp_path = tmp_path_factory.mktemp("original")
    random = np.random.default_rng(0)
    (tmp_path / "hr").mkdir()
    for number in range(4):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).resize((390, 260))
        coarse.save(tmp_path / "hr" / f"{number}.png")
    rows = [f"hr/{number}.png,{('a', 'b')[number % 2]},{number}" for number in range(4)]
    (tmp_path / "table.csv").write_text("\n".join(["path,camera,iso", *rows]) + "\n")
    for name, code in (("model", "variational"), ("code", "deterministic"), ("hat", "none")):
        config = SAVLConfig(
            channels=6, depths=(1,), heads=1, window=4, cab_compress=3, cab_squeeze=3, upsampler="pixelshuffledirect",
            latent=4, estimator_width=6, estimator_dilations=(1,), degradation_code=code,  # type: ignore[arg-type]
        )  # fmt: skip
        savl.save(savl.build(config), tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.fixture
def folder(original_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `original_folder`, which is the current folder."""
    shutil.copytree(original_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_report_of_two_networks_is_a_page_and_a_json_file(folder: Path) -> None:
    result = run(
        "--model", "model.safetensors", "--compare", folder / "code.safetensors", "--hr", "hr", "--real", "hr",
        "-o", "new/report", "--quick", "--scenes", 3, "--seed", 5,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "new/report/index.html\n"
    assert names(folder / "new/report") == ["index.html", "report.json", "types.svg"]
    assert (folder / "new/report/types.svg").read_bytes().startswith(b"<?xml")
    report = json.loads((folder / "new/report/report.json").read_text())
    assert [model["name"] for model in report["models"]] == [
        f"{folder.name}/model.safetensors", f"{folder.name}/code.safetensors",
    ]  # fmt: skip
    assert report["summary"]["models"] == [f"{folder.name}/model.safetensors"]
    assert report["config"]["seed"] == 5
    assert len(report["conditions"]["photographs"]) == 3
    assert report["conditions"]["real"] == ["0", "3"]
    assert (folder / "new/report/index.html").read_text().startswith("<!doctype html>")
    assert str(folder) not in (folder / "new/report/index.html").read_text(), "no one else needs to know where it was"
    assert "photographs" in result.stderr
    assert "figures" in result.stderr


def test_only_selects_rows_of_a_table_and_an_older_report_is_replaced(folder: Path) -> None:
    (folder / "report").mkdir()
    (folder / "report/index.html").write_text('<meta name="generator" content="savl analyze">old')
    result = run("-n", "model.safetensors", "--table", "table.csv", "--only", "hr", "-o", "report")
    assert result.exit_code == 0, result.stderr
    report = json.loads((folder / "report/report.json").read_text())
    assert report["conditions"]["tables"] == [{"name": "hr", "images": 4}]
    assert report["models"][0]["factorial"] is None
    assert "old" not in (folder / "report/index.html").read_text()[-3:]


def test_without_images_sample_photographs_are_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def stop(models: dict[str, SAVL], **arguments: Any) -> None:
        given.update(arguments)
        raise ValueError("enough")

    monkeypatch.setattr("savl.analysis.run.analyze", stop)
    result = run("--model", "savl-tiny", "-o", "report")
    assert result.exit_code == 2
    assert "no --hr and no --table: a demonstration" in message(result)
    assert [path.name for path in given["hr"]][:2] == ["china.jpg", "flower.jpg"]
    assert all(path.is_file() for path in given["hr"])
    assert run("--model", "savl-tiny", "-o", "report", "--table", "table.csv").exit_code == 2
    assert given["hr"] == []


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--hr", "none"], "--hr: none is not a folder"),
        (["--hr", "hr", "--real", "none[/q]"], "--real: none[/q] is not a folder"),
        (["--table", "none.csv"], "none.csv: no such file"),
        (["--hr", "hr", "--only", "hr"], "--only picks rows of a --table, and there is none"),
        (["--table", "table.csv", "--only", "else"], "only: 'else' matches no path in table.csv"),
        (["--hr", "hr", "--model", "zzz"], "zzz"),
        (["--hr", "hr", "--model", "hat.safetensors"], "hat.safetensors has no degradation field to analyze"),
        (
            ["--hr", "hr", "--compare", "./model.safetensors"],
            "different weights, got model.safetensors, ./model.safetensors",
        ),
        (["--hr", "hr", "--device", "tpu"], "tpu"),
        (
            ["--hr", "small"],
            "hr: at least 2 photographs, and 4 crops of 256×256 pixels in all, are needed; got 0 and 0 from 1 images",
        ),
        (["--table", "broken.csv"], "broken.png"),
        (["--hr", "hr", "-o", "table.csv/report"], "table.csv"),
        (["--hr", "hr", "-o", "table.csv"], "table.csv"),
    ],
)
def test_errors_are_reported_and_leave_no_files(folder: Path, arguments: list[str], fragment: str) -> None:
    (folder / "small").mkdir()
    Image.new("RGB", (255, 300)).save(folder / "small/a.png")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "broken.csv").write_text("path,iso\nbroken.png,1\nhr/0.png,2\n")
    before = names(folder)
    options = ["--quick", "-o", "new/report", "--model", "model.safetensors", *arguments]
    result = run(*options)
    assert result.exit_code in (1, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit), "a traceback reached the user"
    assert fragment in message(result)
    assert names(folder) == before


def test_a_failure_leaves_the_older_report_unchanged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "report").mkdir()
    old = '<meta name="generator" content="savl analyze">old'
    (folder / "report/index.html").write_text(old)

    def fail(analysis: object) -> bytes:
        raise RuntimeError("nothing left on the disk")

    monkeypatch.setattr("savl.analysis.report.report_json", fail)
    result = run("--model", "model.safetensors", "--table", "table.csv", "-o", "report")
    assert result.exit_code == 1
    assert "nothing left on the disk" in message(result)
    assert names(folder / "report") == ["index.html"]
    assert (folder / "report/index.html").read_text() == old


@pytest.mark.parametrize("name", ["index.html", "report.json", "types.svg"])
def test_files_that_savl_did_not_write_are_not_overwritten(folder: Path, name: str) -> None:
    (folder / name).write_text("<title>My own page</title>")
    result = run("--model", "model.safetensors", "--hr", "hr", "-o", ".")
    assert result.exit_code == 2
    assert f"--output: {name} is there and was not written by savl; choose another folder" in message(result)
    assert (folder / name).read_text() == "<title>My own page</title>"


def test_weights_with_equal_names_are_distinguished(folder: Path) -> None:
    for run_name in ("one", "two"):
        (folder / run_name / "last").mkdir(parents=True)
        (folder / run_name / "last/model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    weights = [f"{run_name}/last/model.safetensors" for run_name in ("one", "two")]
    result = run("--model", weights[0], "--model", weights[1], "--table", "table.csv", "-o", "report")
    assert result.exit_code == 0, message(result)
    report = json.loads((folder / "report/report.json").read_text())
    assert [model["name"] for model in report["models"]] == report["summary"]["models"] == weights


def test_a_missing_jinja_is_reported_before_the_analysis_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr("savl.analysis.run.analyze", lambda *args, **kwargs: pytest.fail("measured"))
    result = run("--model", "model.safetensors", "--table", "table.csv", "-o", "report")
    assert result.exit_code == 1
    assert "needs jinja2, which cannot be imported" in message(result)


def test_the_help_lists_options_and_requirements() -> None:
    text = " ".join(run("--help").stdout.split())
    for part in ("--table", "--compare", "savl[analyze,train]", "MANIFEST.tsv"):
        assert part in text
