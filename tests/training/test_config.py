"""Training configurations as TOML files."""

from __future__ import annotations

from pathlib import Path

import pytest

from savl.network import CONFIGS
from savl.training import load_config
from savl.training.config import parse_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_committed_configurations_load(path: Path) -> None:
    assert load_config(path).run.steps > 0


def test_model_settings_override_the_named_configuration() -> None:
    config = parse_config({"model": {"name": "savl-tiny", "depths": [1], "spatial_modulation": False}})
    assert config.model.depths == (1,)
    assert not config.model.spatial_modulation
    assert config.model.channels == CONFIGS["savl-tiny"].channels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data]\nbach = 3", r"\[data\] has unknown settings \['bach'\]"),
        ("[dat]\nbatch = 3", r"unknown table \[dat\]"),
        ("[model]\nname = 'savl-huge'", "model.name must be one of"),
        ("[model]\nchanels = 3", r"unknown settings \['chanels'\]"),
        ("[data]\nbatch = 0", "data.batch must be at least 1"),
        ("[optimizer]\nema = 1.0", "optimizer.ema"),
        ("[objective]\nbeta = -1.0", "objective.beta must be at least 0"),
        ("[objective]\nlikelihood = 'cauchy'", "objective.likelihood"),
        ("[objective]\nclub = 1.0", "objective.club regularises a deterministic code"),
        ("[run\n", "Expected"),
        ("data = 3", r"\[data\] must be a table"),
        ("model = 'savl-tiny'", r"\[model\] must be a table"),
        ("[data]\nhr = 'photos'", "data.hr must be a tuple of str, got str"),
        ("[run]\nsteps = '5'", "run.steps must be int, got str"),
        ("[run]\nsteps = 5.5", "run.steps must be int, got float"),
        ("[run]\nseed = -1", "run.seed must satisfy"),
        ("[run]\nbfloat16 = 'no'", "run.bfloat16 must be bool"),
        ("[run]\noutput = 3", "run.output must be str"),
        ("[optimizer]\nbetas = [0.9]", "optimizer.betas must be two numbers"),
        ("[optimizer]\nclip = 0", "optimizer.clip must be above 0"),
        ("[optimizer]\nwarmup = -5", "optimizer.warmup must be at least 0"),
        ("[degradation]\nnoise_sigma = [1]", r"degradation.noise_sigma must be \(low, high\)"),
        ("[degradation]\nnoise_sigma = 3", "degradation.noise_sigma must be a tuple of float, got int"),
        ("[degradation]\njpeg_quality = [70.5, 80.5]", "degradation.jpeg_quality must be a tuple of int"),
    ],
)
def test_mistakes_are_named_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_config(path)
    assert str(error.value).startswith(str(path))


def test_the_club_ablation_is_a_setting() -> None:
    tables = {"model": {"degradation_code": "deterministic"}, "objective": {"club": 0.1}}
    assert parse_config(tables).objective.club == 0.1
