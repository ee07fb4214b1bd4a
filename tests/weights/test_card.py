"""The documents state the same numbers about the shipped weights as the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import savl
from benchmarks.reporting import report
from savl.weights import shipped

ROOT = Path(__file__).resolve().parents[2]


def test_tables_of_readme_and_cards_are_those_of_the_committed_results() -> None:
    documents = {path: text for path, text in report.documents().items() if path != report.PAGE}
    assert len(documents) >= 3
    for path, expected in documents.items():
        if path.name == "README.md":
            assert "speedup over the baseline" in expected, "README has no table of speed"
        elif path.name == "comparison.md":
            assert "| SAVL, as published | 14.0 | 25.80 | 28.27 / 0.8139 | 25.13 |" in expected
            assert "| savl-tiny, measured, Y | " in expected
        elif path.name == "accelerating.md":
            assert "| HAT-S | " in expected, "docs/accelerating.md has no table of architectures"
        else:
            assert "dB Y" in expected, f"{path} has no score table"
        assert path.name != "models.md" or "GiB" in expected, "docs/models.md has no table of limits"
        assert path.read_text(encoding="utf-8") == expected, (
            f"{path} is out of date: run python -m benchmarks.reporting.report"
        )


def test_savl_tiny_beats_bicubic_by_six_tenths_of_a_decibel_on_the_classic_sets() -> None:
    for images in ("Set14", "BSD100"):
        report = json.loads((ROOT / "savl" / "weights" / "scores" / "savl-tiny" / f"{images}.json").read_text())
        gain = report["mean"]["savl-tiny"]["psnr_y"] - report["mean"]["bicubic"]["psnr_y"]
        assert gain >= 0.6, f"{images}: {gain:.2f} dB"


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_weights_stay_small(name: str) -> None:
    assert shipped()[name].stat().st_size <= 4_000_000


def test_readme_gives_the_true_parameter_counts() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in savl.CONFIGS:
        count = sum(parameter.numel() for parameter in savl.build(name).parameters())
        assert f"{count:,}" in text, f"{name} has {count:,} parameters"
