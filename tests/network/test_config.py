"""The configuration: accepted values, conversion to JSON, and the networks of the names in CONFIGS."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from savl.network import CONFIGS, DSCA, SAVL, AmortizedEstimator, SAVLConfig

Small = Callable[..., SAVLConfig]


def parameter_count(config: SAVLConfig) -> int:
    """Return the number of parameters of the network, counted on the meta device without allocating memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in SAVL(config).parameters())


# Networks of the names in CONFIGS


def test_savl_base_has_14_million_parameters_with_the_estimator() -> None:
    count = parameter_count(CONFIGS["savl-base"])
    assert abs(count - 14_000_000) <= 100_000, f"savl-base has {count:,} parameters"


def test_savl_tiny_has_at_most_a_million_parameters() -> None:
    count = parameter_count(CONFIGS["savl-tiny"])
    assert count <= 1_000_000, f"savl-tiny has {count:,} parameters"


@pytest.mark.parametrize(("name", "published"), [("hat-s", 9_621_183), ("hat", 20_772_507), ("hat-l", 40_846_575)])
def test_hat_has_as_many_parameters_as_published(name: str, published: int) -> None:
    assert parameter_count(CONFIGS[name]) == published


def test_savl_base_is_hat_s_with_a_dsca_before_every_block_and_an_estimator() -> None:
    config = CONFIGS["savl-base"]
    with torch.device("meta"):
        dsca = sum(parameter.numel() for parameter in DSCA(config, shift=0).parameters())
        estimator = sum(parameter.numel() for parameter in AmortizedEstimator(config).parameters())
    assert dsca == 98_934
    assert parameter_count(config) == 9_621_183 + 42 * dsca + estimator


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_estimator_of_every_configuration_is_local(name: str) -> None:
    assert CONFIGS[name].receptive_field <= 41


# Settings as data


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_configuration_survives_json(name: str) -> None:
    config = CONFIGS[name]
    assert SAVLConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_setting_survives_to_dict_and_from_dict(small_config: Small) -> None:
    changes: dict[str, Any] = {
        "scale": 3,
        "channels": 20,
        "depths": (1, 2, 1),
        "heads": 5,
        "window": 6,
        "overlap": 1 / 3,
        "mlp_ratio": 1.5,
        "cab_compress": 2,
        "cab_squeeze": 5,
        "cab_scale": 0.02,
        "cab_neighbourhood": 3,
        "drop_path": 0.2,
        "upsampler": "pixelshuffledirect",
        "upsample_features": 7,
        "image_residual": True,
        "rgb_mean": (0.1, 0.2, 0.3),
        "degradation_code": "deterministic",
        "spatial_modulation": False,
        "channel_modulation": False,
        "modulation_shift": True,
        "latent": 9,
        "estimator_width": 11,
        "estimator_dilations": (3,),
        "decoder_width": 13,
        "estimator_high_pass": False,
        "decoder_depth": 2,
        "restoration_strength": True,
    }
    untouched = {field.name for field in dataclasses.fields(SAVLConfig)} - set(changes)
    assert not untouched, f"this test should change {sorted(untouched)} too"
    config = small_config(**changes)
    restored = SAVLConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert restored == config
    assert {name: getattr(restored, name) for name in changes} == changes


def test_missing_settings_take_their_defaults() -> None:
    assert SAVLConfig.from_dict({"channels": 180}) == SAVLConfig(channels=180)


def test_unknown_settings_are_reported_beside_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown settings \['chanels', 'headz'\].*'channels'"):
        SAVLConfig.from_dict({"chanels": 180, "headz": 6})


def test_a_configuration_cannot_change_and_can_be_a_key() -> None:
    config = SAVLConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.channels = 180  # type: ignore[misc]
    assert {config: "base"}[SAVLConfig()] == "base"


# Settings that follow from others


@pytest.mark.parametrize(
    ("window", "overlap", "key_window"), [(16, 0.5, 24), (8, 0.5, 12), (8, 0, 8), (4, 2.0, 12), (10, 0.25, 12)]
)
def test_the_key_window_follows_from_window_and_overlap(window: int, overlap: float, key_window: int) -> None:
    assert SAVLConfig(window=window, overlap=overlap).key_window == key_window


def test_an_overlap_computed_from_a_key_window_gives_that_key_window() -> None:
    wrong = [
        (window, key_window)
        for window in range(2, 65, 2)
        for key_window in range(window, 3 * window + 1, 2)
        if SAVLConfig(window=window, overlap=(key_window - window) / window).key_window != key_window
    ]
    assert not wrong, f"rounding loses pixels for (window, key_window) = {wrong[:5]}"


# Errors: each names the setting, its value, and what is accepted


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"scale": 5}, ["scale", "5", "2, 3, 4 or 8"]),
        ({"channels": 0}, ["channels", "0", "positive"]),
        ({"channels": 145}, ["channels", "145", "multiple of heads=6"]),
        ({"heads": 0}, ["heads", "0", "positive"]),
        ({"heads": 7}, ["channels", "144", "heads=7"]),
        ({"depths": ()}, ["depths", "()", "at least one block"]),
        ({"depths": (6, 0)}, ["depths", "(6, 0)", "at least one block"]),
        ({"window": -8}, ["window", "-8", "positive"]),
        ({"window": 7}, ["window", "7", "even"]),
        ({"overlap": -0.5}, ["overlap", "-0.5", "window=16"]),
        ({"window": 8, "overlap": 0.2}, ["overlap", "0.2", "even number"]),
        ({"mlp_ratio": 0.0}, ["mlp_ratio", "0.0", "positive"]),
        ({"cab_compress": 0}, ["cab_compress", "0", "positive"]),
        ({"cab_compress": 145}, ["cab_compress and cab_squeeze", "145", "at most channels=144"]),
        ({"cab_squeeze": 0}, ["cab_squeeze", "0", "positive"]),
        ({"cab_squeeze": 145}, ["cab_compress and cab_squeeze", "145", "at most channels=144"]),
        ({"drop_path": 1.0}, ["drop_path", "1.0", "< 1"]),
        ({"drop_path": -0.1}, ["drop_path", "-0.1", "0 <="]),
        ({"cab_neighbourhood": 4}, ["cab_neighbourhood", "4", "odd"]),
        ({"cab_neighbourhood": -1}, ["cab_neighbourhood", "-1", "odd"]),
        ({"upsampler": "bicubic"}, ["upsampler", "bicubic", "pixelshuffledirect"]),
        ({"upsample_features": 0}, ["upsample_features", "0", "positive"]),
        ({"rgb_mean": (0.5, 0.5)}, ["rgb_mean", "(0.5, 0.5)", "three"]),
        ({"degradation_code": "gaussian"}, ["degradation_code", "gaussian", "deterministic"]),
        ({"latent": 0}, ["latent", "0", "positive"]),
        ({"estimator_width": 0}, ["estimator_width", "0", "positive"]),
        ({"estimator_dilations": (1, 0)}, ["estimator_dilations", "(1, 0)", "at least 1"]),
        ({"estimator_dilations": (10, 10)}, ["estimator_dilations", "(10, 10)", "47", "41 pixels"]),
        ({"decoder_width": 0}, ["decoder_width", "0", "positive"]),
        ({"decoder_depth": 1}, ["decoder_depth", "1", "at least 2"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_setting_out_of_range_is_reported(changes: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ValueError, match=f"^{fragments[0]} must ") as caught:
        SAVLConfig(**changes)
    missing = [fragment for fragment in fragments if fragment not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"channels": 48.0}, ["channels", "float", "48.0", "int"]),
        ({"heads": True}, ["heads", "bool", "True", "int"]),
        ({"scale": "4"}, ["scale", "str", "'4'", "int"]),
        ({"overlap": "half"}, ["overlap", "str", "'half'", "float"]),
        ({"drop_path": None}, ["drop_path", "NoneType", "float"]),
        ({"cab_scale": True}, ["cab_scale", "bool", "float"]),
        ({"spatial_modulation": 1}, ["spatial_modulation", "int", "1", "bool"]),
        ({"upsampler": 2}, ["upsampler", "int", "2", "str"]),
        ({"depths": 6}, ["depths", "int", "6", "a tuple of int"]),
        ({"depths": [6, 6]}, ["depths", "list", "[6, 6]", "a tuple of int"]),
        ({"depths": (6, 6.0)}, ["depths", "float", "(6, 6.0)", "a tuple of int"]),
        ({"rgb_mean": ("r", "g", "b")}, ["rgb_mean", "str", "a tuple of float"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_setting_of_another_type_is_reported(changes: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(TypeError, match=f"^{fragments[0]} must ") as caught:
        SAVLConfig(**changes)
    missing = [fragment for fragment in fragments if fragment not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"


def test_an_int_is_accepted_for_a_float() -> None:
    assert SAVLConfig.from_dict({"mlp_ratio": 2, "drop_path": 0, "rgb_mean": [0, 0, 0]}).mlp_ratio == 2
