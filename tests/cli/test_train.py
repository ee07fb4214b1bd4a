"""`savl train` as typed: results, errors and exit codes."""

from __future__ import annotations

import os
import signal
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.progress import Progress, TaskID
from typer.testing import CliRunner, Result

import savl
from savl.cli.app import app
from savl.images.result_mark import SEVERITY_MAP, add_mark

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
margin = 0
pool = 4
fresh = 1
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
    """Pairs lr/a.png and hr/a.png, and a training configuration."""
    random = np.random.default_rng(0)
    for name, side in (("lr", 8), ("hr", 32)):
        (tmp_path / name).mkdir()
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(tmp_path / name / "a.png")
    (tmp_path / "config.toml").write_text(CONFIG)
    return tmp_path


def test_the_estimator_alone_is_trained_from_given_weights(folder: Path) -> None:
    first = run("train", folder / "config.toml", "--hr", folder / "hr", "-o", folder / "run")
    changes = [f"run.initial_weights={first.stdout.strip()}", "objective.freeze_network=true"]
    settings = [argument for change in changes for argument in ("--set", change)]
    result = run("train", folder / "config.toml", "--hr", folder / "hr", "-o", folder / "second", *settings)
    assert result.exit_code == 0, result.output
    before, after = (savl.load(each.stdout.strip()).state_dict() for each in (first, result))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert all(name.startswith("estimator.") for name in changed)


def test_training_writes_weights_and_prints_their_path(folder: Path) -> None:
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
def test_mistakes_are_printed_literally_and_exit_with_2(folder: Path, config: str, hr: str, fragment: str) -> None:
    (folder / "config.toml").write_text(config)
    result = run("train", folder / "config.toml", "--hr", folder / hr, "-o", folder / "run")
    assert result.exit_code == 2
    assert fragment in message(result)
    assert not (folder / "run").exists(), "nothing was trained, nothing should be there"


def test_real_pairs_are_trained_on_and_those_that_do_not_fit_are_listed(folder: Path) -> None:
    random = np.random.default_rng(2)
    for number in range(3):
        small = random.integers(0, 256, (12, 12, 3), np.uint8)
        large = Image.fromarray(small).resize((48, 48), Image.Resampling.BICUBIC)
        large.save(folder / "hr" / f"{number} [x]_x1.png")
        Image.fromarray(small if number else small[::-1].copy()).save(folder / "lr" / f"{number} [x]_x4.png")
    for name in ("lr", "hr"):
        (folder / name / "a.png").unlink()
    command = ("train", folder / "config.toml", "--hr", folder / "hr", "--lr", folder / "lr", "--steps", 1)
    result = run(*command, "-o", folder / "run")
    assert result.exit_code == 0, result.stderr
    assert Path(result.stdout.strip()).is_file()
    assert "pairs skipped because their images do not fit each other: 1 0 [x] (" in message(result)
    mixed = run(*command, "-o", folder / "mixed", "--set", "pairs.share=0.5", "--set", f'data.hr=["{folder / "hr"}"]')
    assert mixed.exit_code == 0, mixed.stderr
    for changes, fragment in (
        (("--set", "pairs.share=0.5"), "data.hr: no folder of images was given"),
        (("--set", "pairs.unsuitable=refuse"), "1 are unsuitable: 0 [x] ("),
        (("--lr", folder / "lr"), "each --lr needs an --hr, got 2 --lr and 1 --hr"),
    ):
        refused = run(*command, "-o", folder / "refused", *changes)
        assert refused.exit_code == 2
        assert fragment in message(refused)


def test_a_former_name_of_a_setting_is_a_warning_of_one_line(folder: Path) -> None:
    (folder / "config.toml").write_text(CONFIG.replace("fresh = 1", "fresh = 1\nalike = 1"))
    result = run("train", folder / "config.toml", "--hr", folder / "hr", "-o", folder / "run", "--steps", 1)
    assert result.exit_code == 0, result.stderr
    assert "warning: data.alike is now called data.images_per_recipe" in result.stderr.splitlines()
    (folder / "config.toml").write_text(CONFIG.replace("fresh = 1", "fresh = 1\nalike = 1\nimages_per_recipe = 1"))
    result = run("train", folder / "config.toml", "--hr", folder / "hr", "-o", folder / "run")
    assert result.exit_code == 2
    assert "data.alike is now called data.images_per_recipe: both were given" in message(result)


def test_images_that_are_too_small_are_counted(folder: Path) -> None:
    Image.new("RGB", (10, 40)).save(folder / "hr" / "narrow.png")
    result = run("train", folder / "config.toml", "--hr", folder / "hr", "-o", folder / "run", "--set", "run.steps=1")
    assert result.exit_code == 0, result.stderr
    assert "images skipped because they are smaller than a patch: 1" in message(result)


def test_results_of_savl_are_skipped_and_counted_unless_they_are_included(folder: Path) -> None:
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (32, 32), np.uint8)
    Image.fromarray(pixels).save(folder / "hr" / "a_severity.webp", xmp=add_mark(None, SEVERITY_MAP))
    command = ("train", folder / "config.toml", "--hr", folder / "hr", "--steps", 1, "-o")
    without = run(*command, folder / "without")
    assert without.exit_code == 0, without.stderr
    assert "images skipped because savl made them: 1; use --include-results to include them" in message(without)
    included = run(*command, folder / "included", "--include-results")
    assert included.exit_code == 0, included.stderr
    assert "skipped" not in message(included)


def test_the_progress_bar_shows_the_expected_length_of_a_run_with_a_time_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, shown = count(0, 10), []
    monkeypatch.setattr("savl.training.schedule.monotonic", lambda: float(next(clock)))

    def update(_: Progress, task: TaskID, **fields: Any) -> None:
        if "note" in fields:
            shown.append((fields["completed"], fields["total"]))

    monkeypatch.setattr(Progress, "update", update)
    settings = ("--steps", 1000, "--set", "run.minutes=1")
    result = run("train", folder / "config.toml", "--hr", folder / "hr", "-o", folder / "run", *settings)
    assert result.exit_code == 0, result.stderr
    assert shown == [(1, 1000), *((step, 7) for step in range(2, 8))]


def test_a_run_in_pieces_gives_the_weights_of_an_uninterrupted_one(folder: Path) -> None:
    command = ("train", folder / "config.toml", "--hr", folder / "hr", "--steps", 3, "--threads", 1, "-o")
    whole = run(*command, folder / "whole")
    assert whole.exit_code == 0, whole.stderr
    piece = (*command, folder / "pieces", "--stop-after", 0)
    for step, percent in ((1, 33), (2, 67)):
        result = run(*piece)
        assert result.exit_code == 0, result.stderr
        assert result.stdout == "", "the path of the weights shows that the run has ended"
        expected = f"stopped after 0 minutes, at step {step} of 3 ({percent}%); the same command continues the run"
        assert expected in message(result)
        assert not (folder / "pieces" / "model.safetensors").exists()
        assert savl.load(folder / "pieces" / "checkpoint.pt").config.channels == 6, "the weights so far"
    last = run(*piece)
    assert last.exit_code == 0, last.stderr
    assert "resuming" in message(last)
    assert "stopped" not in message(last)
    before, after = (savl.load(each.stdout.strip()).state_dict() for each in (whole, last))
    assert all(before[name].equal(after[name]) for name in before)


def test_a_piece_ends_after_its_minutes_and_not_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count(0, 30)  # half a minute per look at the clock: once at the start, then after each step
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    command = ("train", folder / "config.toml", "--hr", folder / "hr", "--steps", 9, "-o", folder / "run")
    result = run(*command, "--stop-after", 1.5)
    assert result.exit_code == 0, result.stderr
    assert "stopped after 1.5 minutes, at step 3 of 9" in message(result)


def test_negative_minutes_are_refused(folder: Path) -> None:
    result = run("train", folder / "config.toml", "--hr", folder / "hr", "--stop-after", -1)
    assert result.exit_code == 2
    assert "--stop-after" in message(result)


def test_sigterm_while_images_are_decoded_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    files: list[str] = []

    def end(path: Path) -> None:
        files.extend(file.suffix for file in (folder / "decoded").iterdir())
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr("savl.training.patches.decode_rgb", end)
    settings = ("--set", f'data.cache="{folder / "decoded"}"')
    result = run("train", folder / "config.toml", "--hr", folder / "hr", "-o", folder / "run", *settings)
    assert result.exit_code == 130
    assert files == [".part"], "it was being written"
    assert not list((folder / "decoded").iterdir())
    assert not (folder / "run").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_missing_configuration_is_reported(folder: Path) -> None:
    result = run("train", folder / "none.toml")
    assert result.exit_code == 2
    assert "none.toml" in message(result)
