"""Training configurations as TOML files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from savl.network import CONFIGS
from savl.training import load_config
from savl.training.config import TABLES, parse_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda path: path.name)
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
        ("[run]\nminutes = -1", "run.minutes must be at least 0 and finite, got -1"),
        ("[run]\nminutes = inf", "run.minutes must be at least 0 and finite, got inf"),
        ("[run]\nminutes = nan", "run.minutes must be at least 0 and finite, got nan"),
        ("[run]\nminutes = '60'", "run.minutes must be float, got str"),
        (
            "[run]\nminutes = 60\n[optimizer]\nschedule = 'multistep'",
            "run.minutes requires optimizer.schedule = 'cosine'",
        ),
        ("[run]\nbfloat16 = 'no'", "run.bfloat16 must be bool"),
        ("[run]\noutput = 3", "run.output must be str"),
        ("[optimizer]\nbetas = [0.9]", "optimizer.betas must be two numbers"),
        ("[optimizer]\nclip = 0", "optimizer.clip must be above 0"),
        ("[optimizer]\nwarmup = -5", "optimizer.warmup must be at least 0"),
        ("[degradation]\nstrength = [1]", r"degradation.strength must be \(low, high\)"),
        ("[degradation]\nblur = 3", r"\[degradation\] has unknown settings \['blur'\]"),
        ("[degradation.first.blur]\nsigma = 3", r"\[degradation.first.blur\]: blur.sigma must be a tuple of float"),
        ("[degradation.second.jpeg]\nquality = [0.0, 5.0]", r"\[degradation.second.jpeg\]: jpeg.quality must lie in"),
        ("[degradation.first]\nnoise = 2", r"\[degradation.first.noise\] must be a table"),
        ("[data]\npool = 3", "data.pool must hold at least a batch of 16"),
        ("[validation]\nlr = 'x'", "validation.lr requires validation.hr"),
        ("[validation]\nside = 16", "validation.side must be at least 32"),
        ("[optimizer]\nclip = nan", "optimizer.clip must be above 0 and finite"),
        ("[gan]\nperceptual = 1.0\n[data]\npatch = 3", "gan.perceptual needs HR patches of at least 16 pixels, got 12"),
        ("[run]\nreinitialize = ['estimator.']", "run.reinitialize requires run.initial_weights"),
        (
            "[objective]\nfreeze_estimator = true\nalpha = 0.0\n"
            "[run]\ninitial_weights = 'savl-tiny'\nreinitialize = ['estimator.']",
            "an estimator that is not in run.reinitialize",
        ),
        (
            "[objective]\nfreeze_estimator = true",
            "objective.freeze_estimator and train_only forbid .*: set them to 0, got objective.alpha = 1.0$",
        ),
        (
            "[objective]\nfreeze_estimator = true\nalpha = 0.0\ncalibration = 0.1\ncontrast = 0.2",
            r"got objective.calibration = 0.1, objective.contrast = 0.2$",
        ),
        (
            "[objective]\nfreeze_estimator = true\nalpha = 0.0",
            "objective.freeze_estimator requires run.initial_weights",
        ),
        ("[objective]\nalpha = 0.0\ntrain_only = ['strength.']", "train_only requires run.initial_weights"),
        (
            "[objective]\ntrain_only = ['strength.']\n[run]\ninitial_weights = 'x'",
            r"freeze_estimator and train_only forbid losses that train the estimator: .* got objective.alpha = 1.0",
        ),
        (
            "[objective]\ntrain_only = ['strength.']\nfreeze_network = true\n[run]\ninitial_weights = 'x'",
            "objective.train_only cannot be used with freeze_estimator or freeze_network",
        ),
        ("[objective]\nfidelity = 'l3'", "objective.fidelity must be one of"),
        ("[objective]\ncontent = -0.1", "objective.content must be at least 0"),
        ("[objective]\ncontent = 0.1", "data.images_per_recipe must be at least 2 and below data.batch=16, got 1"),
        ("[objective]\ncontent = 0.1\n[data]\nimages_per_recipe = 16\nfresh = 16", "below data.batch=16, got 16"),
        ("[objective]\ndimensions = 0.1", "objective.dimensions compares images of different recipes"),
        (
            "[objective]\ndimensions = 0.1\n[data]\nimages_per_recipe = 3\nbatch = 6\nfresh = 3",
            "objective.dimensions compares two halves .* must be even, got 3",
        ),
        ("[objective]\naxes = 0.1", "objective.axes needs images with one operation"),
        ("[data]\nimages_per_recipe = 3", "data.images_per_recipe must divide batch=16 and fresh=4, got 3"),
        ("[data]\nimages_per_recipe = 0", "data.images_per_recipe must be at least 1"),
        (
            "[objective]\ncontent = 0.1\n[data]\nimages_per_recipe = 2\n"
            "[model]\ndegradation_code = 'none'\nrestoration_strength = false",
            "objective.content: the model has no estimator",
        ),
        (
            "[objective]\nfreeze_network = true\n[model]\ndegradation_code = 'none'\nrestoration_strength = false",
            "objective.freeze_network: the model has no estimator",
        ),
        ("[objective]\nfreeze_network = true", "objective.freeze_network requires run.initial_weights"),
        (
            "[objective]\nfreeze_network = true\n[run]\ninitial_weights = 'x'\n[optimizer]\nmethod = 'muon'",
            "objective.freeze_network freezes the matrices that optimizer.method = 'muon' is for",
        ),
        ("[objective]\nfreeze_network = true\nalpha = 0.0", "freeze_network needs a loss that trains the estimator"),
        (
            "[objective]\nfreeze_network = true\nalpha = 0.0\ncalibration = 0.3\n"
            "[model]\ndegradation_code = 'deterministic'",
            "a deterministic code has no variance that calibration or contrast could train",
        ),
        (
            "[objective]\nfreeze_network = true\nalpha = 0.0\ncalibration = 0.3\n[run]\ninitial_weights = 'savl-tiny'\n"
            "[pairs]\nlr = ['a']\nhr = ['b']",
            "objective.freeze_network with real pairs alone needs objective.alpha or club",
        ),
        (
            "[objective]\nfreeze_network = true\nfreeze_estimator = true\nalpha = 0.0",
            "freeze_estimator and freeze_network together leave nothing to train",
        ),
        (
            "[objective]\nfreeze_network = true\n[run]\ninitial_weights = 'savl-tiny'\n[gan]\nweight = 0.1",
            "objective.freeze_network computes no SR image",
        ),
        ("[gan]\nloss = 'hinge'", "gan.loss must be one of"),
        ("[gan]\nlearning_rate = 0.0", "gan.learning_rate must be above 0"),
        ("[gan]\nweight = 0.1\n[data]\npatch = 3", "multiples of 8 pixels, got data.patch=3 at scale 4"),
        ("[gan]\nweight = 0.1\ndiscriminator = 'patch'\n[data]\npatch = 1", "HR patches of at least 8 pixels, got 4"),
        ("[gan]\ndiscriminator = 'resnet'", "gan.discriminator must be one of"),
        ("[gan]\nstart = -1", "gan.start must be at least 0"),
        ("[gan]\ngrid = -0.1", "gan.grid must be at least 0"),
        ("[gan]\nperceptual_features = 'alexnet'", "gan.perceptual_features must be one of"),
        (
            "[gan]\nperceptual = 1.0\nperceptual_features = 'efficientnet-lite0'\n[data]\npatch = 5",
            "gan.perceptual needs HR patches of at least 23 pixels, got 20",
        ),
        ("[optimizer]\nschedule = 'step'", "optimizer.schedule must be one of"),
        ("[optimizer]\nmethod = 'sgd'", "optimizer.method must be one of"),
        ("[optimizer]\nmomentum = 1.0", "optimizer.momentum must satisfy 0 <= momentum < 1"),
        ("[optimizer]\nmilestones = [0]", "optimizer.milestones must be steps of at least 1"),
        ("[data]\nworkers = 2", "data.workers requires data.cache"),
        ("[data]\nworkers = -1", "data.workers must be at least 0"),
        ("[data]\ndegrade_on = 'gpu'", r"data.degrade_on must be one of \('auto', 'cpu'\)"),
        ("[run]\ndevice = 'tpu'", r"run.device must be one of \('auto', 'cpu'\)"),
    ],
)
def test_mistakes_are_reported_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_config(path)
    assert str(error.value).startswith(str(path))


FORMER = {
    "data.alike": ("data.images_per_recipe", 4),
    "objective.scale": ("objective.likelihood_scale", "learned"),
    "run.start": ("run.initial_weights", "savl-tiny"),
    "run.fresh": ("run.reinitialize", ("estimator.",)),
}
"""Current names of renamed settings by their former names, and a value of each."""


def toml(name: str, value: object) -> str:
    table, _, setting = name.partition(".")
    other = "\ninitial_weights = 'savl-tiny'" if setting == "fresh" else ""
    return f"[{table}]\n{setting} = {json.dumps(value)}{other}\n"


@pytest.mark.parametrize(("old", "new", "value"), [(old, *given) for old, given in FORMER.items()])
def test_former_names_of_settings_work_with_a_warning(tmp_path: Path, old: str, new: str, value: object) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(toml(old, value))
    with pytest.warns(FutureWarning, match=f"^{old} is now called {new}$") as caught:
        config = load_config(path)
    assert len(caught) == 1
    table, _, setting = new.partition(".")
    assert getattr(getattr(config, table), setting) == value
    with pytest.warns(FutureWarning, match=f"^{old} is now called {new}$"):
        built = TABLES[table](**{old.partition(".")[2]: value})
    assert getattr(built, setting) == value
    with pytest.warns(FutureWarning, match=f"^{old} is now called {new}$"):
        assert getattr(built, old.partition(".")[2]) == value


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("old", "new", "value"), [(old, *given) for old, given in FORMER.items()])
def test_a_setting_under_both_names_is_refused(tmp_path: Path, old: str, new: str, value: object) -> None:
    table, _, setting = new.partition(".")
    (tmp_path / "mine.toml").write_text(
        f"{toml(old, value)}{setting} = {json.dumps(value)}\n".replace("\ninitial_weights = 'savl-tiny'", "")
    )
    message = f"{old} is now called {new}: both were given, keep {setting} alone"
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "mine.toml")
    with pytest.raises(ValueError, match=message):
        TABLES[table](**{old.partition(".")[2]: value, setting: value})


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_former_and_current_names_override_each_other_across_files(tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text("[data]\nalike = 4\n")
    (tmp_path / "new.toml").write_text('base = "old.toml"\n[data]\nimages_per_recipe = 2\n')
    assert load_config(tmp_path / "new.toml").data.images_per_recipe == 2
    assert load_config(tmp_path / "old.toml", ["data.images_per_recipe=2"]).data.images_per_recipe == 2
    assert load_config(tmp_path / "new.toml", ["data.alike=1"]).data.images_per_recipe == 1


def test_the_club_ablation_is_a_setting() -> None:
    tables = {"model": {"degradation_code": "deterministic"}, "objective": {"club": 0.1}}
    assert parse_config(tables).objective.club == 0.1


def test_nested_tables_keep_the_defaults_of_settings_they_do_not_name() -> None:
    config = parse_config({"degradation": {"second": {"blur": {"sinc_probability": 0.0}}}})
    assert config.degradation.second.blur.sinc_probability == 0.0
    assert config.degradation.second.blur.sigma == (0.2, 1.5)


def test_changes_replace_settings_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[objective]\nbeta = 0.5\nalpha = 0.25")
    changes = [
        "objective.beta=0.125",
        "run.output=Läufe/😀",
        "degradation.strength=[0.0, 1.0]",
        "model.name='savl-base'",
    ]
    config = load_config(path, changes)
    assert (config.objective.beta, config.objective.alpha) == (0.125, 0.25)
    assert config.run.output == "Läufe/😀"
    assert config.degradation.strength == (0.0, 1.0)
    assert config.model == CONFIGS["savl-base"]


def test_a_file_may_be_based_on_another(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "first.toml").write_text("[data]\nbatch = 3\npatch = 8\n[objective]\nbeta = 0.5")
    (tmp_path / "parts" / "second.toml").write_text('base = "../first.toml"\n[data]\npatch = 12\n[run]\nsteps = 7')
    (tmp_path / "third.toml").write_text('base = "parts/second.toml"\n[data]\npatch = 16')
    config = load_config(tmp_path / "third.toml", ["objective.beta=0.25"])
    assert (config.data.batch, config.data.patch, config.run.steps, config.objective.beta) == (3, 16, 7, 0.25)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('base = "mine.toml"', ValueError, "base: .*mine.toml is based on itself"),
        ('base = "other.toml"', ValueError, "base: .*mine.toml is based on itself"),
        ('base = "missing.toml"', FileNotFoundError, "base: .*missing.toml: no such file"),
        ("base = 3", ValueError, "base must be the name of a file, got 3"),
    ],
)
def test_a_base_that_cannot_be_used_is_reported(
    tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "other.toml").write_text('base = "mine.toml"')
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(error, match=message) as caught:
        load_config(tmp_path / "mine.toml")
    assert str(caught.value).startswith(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize("change", ["beta", "beta=3", "=", "a.b.=3", ""])
def test_a_change_that_names_no_setting_of_a_table_is_refused(tmp_path: Path, change: str) -> None:
    (tmp_path / "mine.toml").write_text("")
    with pytest.raises(ValueError, match="must be TABLE.NAME=VALUE"):
        load_config(tmp_path / "mine.toml", [change])
