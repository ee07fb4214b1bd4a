"""Settings of the degradation: what is refused, and tables within tables."""

from __future__ import annotations

import math
import tomllib
from dataclasses import fields
from typing import Any

import pytest

from savl.degradation import DegradationConfig
from savl.degradation.config import (
    CONFIGURATION_TABLES,
    SECOND_STAGE,
    BlurConfig,
    FinalConfig,
    JpegConfig,
    NoiseConfig,
    ResizeConfig,
    SpatialConfig,
    StageConfig,
)
from savl.settings import from_table
from savl.training.config import TABLES

CHANCES = [
    (BlurConfig, "blur", ("probability", "sinc_probability")),
    (NoiseConfig, "noise", ("probability", "gaussian_probability", "gray_probability")),
    (JpegConfig, "jpeg", ("probability",)),
    (StageConfig, "stage", ("probability",)),
    (FinalConfig, "final", ("sinc_probability", "jpeg_last")),
    (SpatialConfig, "spatial", ("probability", "ramp_probability")),
    (DegradationConfig, "degradation", ("full_strength", "single_operation")),
]
RANGES = [
    (BlurConfig, "blur", ("sigma", "rotation", "beta_generalized", "beta_plateau")),
    (ResizeConfig, "resize", ("factor",)),
    (NoiseConfig, "noise", ("sigma", "poisson_scale")),
    (JpegConfig, "jpeg", ("quality",)),
    (SpatialConfig, "spatial", ("cells",)),
    (DegradationConfig, "degradation", ("strength",)),
]


def parse(text: str) -> DegradationConfig:
    return from_table(DegradationConfig, "degradation", tomllib.loads(text)["degradation"])


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize(("cls", "table", "name"), [(cls, table, name) for cls, table, n in CHANCES for name in n])
def test_probabilities_outside_0_to_1_are_refused(cls: Any, table: str, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{table}\.{name} must lie in \[0, 1\], got {value!r}$"):
        cls(**{name: value})


@pytest.mark.parametrize(("cls", "table", "name"), [(cls, table, name) for cls, table, n in RANGES for name in n])
def test_ranges_in_descending_order_or_of_another_length_are_refused(cls: Any, table: str, name: str) -> None:
    kind = type(getattr(cls(), name)[0])
    for value in ((kind(3), kind(1)), (kind(1),), (kind(1), kind(1), kind(1)), ()):
        with pytest.raises(ValueError, match=rf"^{table}\.{name} must be \(low, high\) with low <= high, got \("):
            cls(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["sigma", "poisson_scale"])
def test_ranges_have_finite_ends(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"noise.{name} must be"):
        NoiseConfig(**{name: (1.0, value)})


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (BlurConfig, {"sigma": (0.0, 1.0)}, r"blur\.sigma must lie above 0, got \(0\.0, 1\.0\)"),
        (BlurConfig, {"beta_generalized": (-1.0, 1.0)}, r"blur\.beta_generalized must lie above 0"),
        (BlurConfig, {"beta_plateau": (0.0, 1.0)}, r"blur\.beta_plateau must lie above 0"),
        (BlurConfig, {"sizes": (7, 8)}, r"blur\.sizes must be odd numbers from 1 to 21, got \(7, 8\)"),
        (BlurConfig, {"sizes": (23,)}, r"blur\.sizes must be odd numbers from 1 to 21, got \(23,\)"),
        (BlurConfig, {"sizes": (-7,)}, r"blur\.sizes must be odd numbers from 1 to 21"),
        (BlurConfig, {"sizes": ()}, r"blur\.sizes must be odd numbers from 1 to 21, got \(\)"),
        (
            BlurConfig,
            {"shapes": (0.5, 0.5)},
            r"blur\.shapes must be 6 probabilities that add up to 1, got \(0",
        ),
        (BlurConfig, {"shapes": (0.2,) * 6}, r"blur\.shapes must be 6 probabilities that add up to 1"),
        (BlurConfig, {"shapes": (1.5, -0.5, 0, 0, 0, 0)}, r"blur\.shapes must be 6 probabilities that add up to 1"),
        (BlurConfig, {"shapes": ()}, r"blur\.shapes must be 6 probabilities"),
        (
            ResizeConfig,
            {"up": 0.5},
            r"resize\.up, resize\.down and resize\.keep must be 3 probabilities",
        ),
        (ResizeConfig, {"up": -0.1, "keep": 0.4}, r"resize\.up, resize\.down and resize\.keep must be 3 probabilities"),
        (ResizeConfig, {"factor": (0.0, 1.5)}, r"resize\.factor must be \(low, high\) with 0 < low <= 1 <= high"),
        (ResizeConfig, {"factor": (1.1, 1.5)}, r"0 < low <= 1 <= high, got \(1\.1, 1\.5\)"),
        (ResizeConfig, {"factor": (0.5, 0.9)}, r"0 < low <= 1 <= high, got \(0\.5, 0\.9\)"),
        (NoiseConfig, {"sigma": (-1.0, 3.0)}, r"noise\.sigma must not be negative, got \(-1\.0, 3\.0\)"),
        (NoiseConfig, {"poisson_scale": (-1.0, 3.0)}, r"noise\.poisson_scale must not be negative"),
        (JpegConfig, {"quality": (0.0, 50.0)}, r"jpeg\.quality must lie in \[1, 100\], got \(0\.0, 50\.0\)"),
        (JpegConfig, {"quality": (50.0, 101.0)}, r"jpeg\.quality must lie in \[1, 100\]"),
        (SpatialConfig, {"cells": (0, 3)}, r"spatial\.cells must be at least 1, got \(0, 3\)"),
        (DegradationConfig, {"strength": (-0.1, 1.0)}, r"degradation\.strength must lie in \[0, 1\], got \(-0\.1, 1"),
        (DegradationConfig, {"strength": (0.5, 1.1)}, r"degradation\.strength must lie in \[0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused_with_table_and_range(
    cls: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**settings)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (BlurConfig, {"sigma": 2.0}, r"blur\.sigma must be a tuple of float, got float: 2\.0"),
        (BlurConfig, {"sizes": (7.0,)}, r"blur\.sizes must be a tuple of int, got a tuple of float"),
        (ResizeConfig, {"up": "often"}, r"resize\.up must be float, got str: 'often'"),
        (NoiseConfig, {"probability": True}, r"noise\.probability must be float, got bool"),
        (JpegConfig, {"quality": ("30", "95")}, r"jpeg\.quality must be a tuple of float"),
        (StageConfig, {"blur": {"probability": 1.0}}, r"stage\.blur must be BlurConfig, got dict"),
        (FinalConfig, {"jpeg": 0.5}, r"final\.jpeg must be JpegConfig, got float"),
        (SpatialConfig, {"cells": (2.0, 6.0)}, r"spatial\.cells must be a tuple of int"),
        (DegradationConfig, {"first": SECOND_STAGE.blur}, r"degradation\.first must be StageConfig, got BlurConfig"),
    ],
)
def test_settings_of_another_type_are_refused_with_table_and_type(
    cls: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        cls(**settings)


@pytest.mark.parametrize("cls", [cls for cls, _, _ in RANGES] + [StageConfig, FinalConfig])
def test_every_default_is_accepted_and_ends_of_ranges_may_meet(cls: Any) -> None:
    cls()
    for field in fields(cls):
        value = getattr(cls(), field.name)
        if isinstance(value, tuple) and len(value) == 2 and field.name != "factor":
            cls(**{field.name: (value[1], value[1])})


def test_settings_missing_from_nested_tables_keep_their_defaults() -> None:
    config = parse("[degradation]\nstrength = [0, 1]\n[degradation.first.blur]\nsigma = [0.5, 1]\nsizes = [7]")
    assert config.strength == (0, 1)
    assert config.first.blur == BlurConfig(sigma=(0.5, 1), sizes=(7,))
    assert config.first == StageConfig(blur=config.first.blur)
    assert config.second == SECOND_STAGE
    assert parse("[degradation]") == DegradationConfig()


def test_settings_missing_from_a_table_of_the_second_stage_keep_the_defaults_of_that_stage() -> None:
    config = parse("[degradation.second.noise]\ngray_probability = 0.0\n[degradation.second.blur]\nsizes = [9, 11]")
    assert config.second.noise == NoiseConfig(gray_probability=0.0, sigma=(1.0, 25.0), poisson_scale=(0.05, 2.5))
    assert config.second.blur == BlurConfig(sizes=(9, 11), probability=0.8, sigma=(0.2, 1.5))
    assert config.second.resize == SECOND_STAGE.resize != ResizeConfig()
    assert config.second.jpeg == JpegConfig(probability=0.0)
    assert config.first == StageConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[degradation]\nnoise = 3",
            r"\[degradation\] has unknown settings \['noise'\]; it accepts \['camera', 'final'",
        ),
        ("[degradation.third]", r"\[degradation\] has unknown settings \['third'\]"),
        ("[degradation.first]\nblurr = 1", r"\[degradation\.first\] has unknown settings \['blurr'\]"),
        (
            "[degradation.second.blur]\nsigmas = [1, 2]",
            r"\[degradation\.second\.blur\] has unknown settings \['sigmas'\]; it accepts \['beta_generalized'",
        ),
        ("[degradation.first]\nblur = 2", r"\[degradation\.first\.blur\] must be a table of settings, got 2"),
        ("[degradation.first.blur]\nsigma = [2, 1]", r"^\[degradation\.first\.blur\]: blur\.sigma must be \(low, high"),
        ("[degradation.second]\nprobability = 2", r"^\[degradation\.second\]: stage\.probability must lie in \[0, 1\]"),
        ("[degradation.final.jpeg]\nquality = [0, 5]", r"^\[degradation\.final\.jpeg\]: jpeg\.quality must lie in"),
        ("[degradation]\nstrength = [0, 2]", r"^degradation\.strength must lie in \[0, 1\]"),
    ],
)
def test_mistakes_in_nested_tables_are_reported_with_the_table(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_wrong_type_in_a_nested_table_is_reported_with_the_table() -> None:
    with pytest.raises(TypeError, match=r"^\[degradation\.first\.jpeg\]: jpeg\.quality must be a tuple of float"):
        parse("[degradation.first.jpeg]\nquality = 50")


def test_the_tables_that_are_ignored_are_those_of_a_training_configuration() -> None:
    assert set(CONFIGURATION_TABLES) == {"model", *TABLES}
