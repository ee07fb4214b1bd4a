"""Building, saving and loading networks; damaged and unsuitable files are refused by name."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import savl
from savl.weights import files

SMALL = savl.SAVLConfig(
    scale=2,
    channels=8,
    depths=(1, 2),
    heads=2,
    window=4,
    cab_compress=2,
    cab_squeeze=2,
    upsample_features=4,
    latent=4,
    estimator_width=4,
    estimator_dilations=(1, 2),
)

PIXEL = np.zeros((1, 1), np.uint8)

VARIANTS = {
    "variational": SMALL,
    "deterministic": replace(SMALL, degradation_code="deterministic"),
    "hat": replace(SMALL, degradation_code="none"),
    "ablated": replace(SMALL, spatial_modulation=False, channel_modulation=False, rgb_mean=(0.5, 0.25, 0.0)),
    "direct": replace(SMALL, scale=3, upsampler="pixelshuffledirect", image_residual=True),
    "shifting": replace(SMALL, scale=4, modulation_shift=True),
}


@pytest.fixture
def model() -> savl.SAVL:
    torch.manual_seed(0)
    return savl.build(SMALL)


@pytest.fixture
def saved(model: savl.SAVL, tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    savl.weights.save(model, path)
    return path


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    """Change the tensors or the configuration in a savl file."""
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()[files.METADATA_KEY])
    tensors = load_file(path)
    change(tensors, config)
    save_file(tensors, path, metadata={files.METADATA_KEY: json.dumps(config)})


def refusal(path: Path) -> str:
    """Return the message with which a file is refused; check that it is one short line with the name of the file."""
    with pytest.raises(ValueError, match=path.name) as caught:
        savl.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 600, message
    return message.removeprefix(f"{path}: ")


# Building


def test_build_takes_a_name_or_a_configuration() -> None:
    assert savl.build("savl-tiny").config is savl.CONFIGS["savl-tiny"]
    model = savl.build(SMALL)
    assert model.config is SMALL
    assert model.training


def test_build_names_the_configurations_when_asked_for_another() -> None:
    with pytest.raises(ValueError, match=r"one of savl-base, savl-tiny, .* got 'savl-huge'"):
        savl.build("savl-huge")
    with pytest.raises(TypeError, match="must be a name or a SAVLConfig, got int"):
        savl.build(4)  # type: ignore[arg-type]


# Saving and loading


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_network_comes_back_with_its_settings_and_outputs(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = savl.build(VARIANTS[variant]).eval()
    savl.weights.save(model, tmp_path / "network.safetensors")
    loaded = savl.load(tmp_path / "network.safetensors")
    assert loaded.config == model.config
    assert not loaded.training
    lr = torch.rand(2, 3, 5, 9)
    with torch.no_grad():
        assert torch.equal(loaded(lr), model(lr))


def test_every_setting_survives_the_metadata() -> None:
    unusual = savl.SAVLConfig(
        scale=3,
        channels=24,
        depths=(1, 2, 3),
        heads=3,
        window=8,
        overlap=0.25,
        mlp_ratio=1.5,
        cab_compress=3,
        cab_squeeze=4,
        cab_scale=0.3,
        cab_neighbourhood=3,
        drop_path=0.2,
        upsampler="pixelshuffledirect",
        upsample_features=32,
        image_residual=True,
        rgb_mean=(0.1, 0.2, 0.3),
        degradation_code="deterministic",
        spatial_modulation=False,
        channel_modulation=False,
        modulation_shift=True,
        latent=16,
        estimator_width=8,
        estimator_dilations=(1, 2, 3),
        decoder_width=16,
        decoder_depth=3,
        estimator_high_pass=False,
        restoration_strength=True,
    )
    same = [field.name for field in fields(unusual) if getattr(unusual, field.name) == field.default]
    assert not same, "give these settings another value than their default"
    assert savl.SAVLConfig.from_dict(json.loads(json.dumps(unusual.to_dict()))) == unusual


def test_a_path_may_be_a_string(saved: Path) -> None:
    assert savl.load(str(saved)).config == SMALL


def test_a_bfloat16_network_keeps_its_dtype_and_loads_as_float32(model: savl.SAVL, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    savl.weights.save(model.bfloat16(), path)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    loaded = savl.load(path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.conv_first.weight, model.conv_first.weight.float())


def test_saving_requires_the_suffix_safetensors(model: savl.SAVL, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.safetensors, got .*network\.pth"):
        savl.weights.save(model, tmp_path / "network.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX's")
def test_the_umask_decides_who_may_read_a_saved_network(model: savl.SAVL, tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        savl.weights.save(model, tmp_path / "network.safetensors")
    finally:
        os.umask(previous)
    assert (tmp_path / "network.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file(
    step: str, failure: BaseException, model: savl.SAVL, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = saved.read_bytes()

    def fail(*arguments: object) -> None:
        (partial,) = saved.parent.glob(".small.safetensors.*.part")
        assert partial.stat().st_size > 0, "the failure should come when something is written"
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(failure)):
        savl.weights.save(model, saved)
    assert saved.read_bytes() == old
    assert list(saved.parent.iterdir()) == [saved], "a partial file was left behind"


def test_saving_into_a_missing_folder_is_an_error(model: savl.SAVL, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        savl.weights.save(model, tmp_path / "nowhere" / "network.safetensors")


# Shipped weights


def test_shipped_weights_load_by_name_and_have_a_model_card() -> None:
    for name, path in savl.weights.shipped().items():
        assert savl.load(name).config == savl.CONFIGS[name], f"{name} was trained with other settings"
        assert path.with_suffix(".md").is_file(), f"{name} ships without a model card"


def test_weights_ship_beside_the_package(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "files", lambda package: saved.parent)
    (saved.parent / "small.md").write_text("A model card.")
    assert savl.weights.shipped() == {"small": saved}
    assert savl.load("small").config == SMALL
    with pytest.raises(FileNotFoundError, match=r"shipped weights \(small\) or an existing file, got 'smal'"):
        savl.load("smal")


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must be shipped weights \(.+\) or .* got 'photo-magic'$"):
        savl.load("photo-magic")
    with pytest.raises(FileNotFoundError):
        savl.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("savl-base", "`savl train configs/base_stage1.toml` makes some, and the paths of published HAT checkpoints"),
        ("hat-l", "give the path of a published HAT checkpoint (https"),
    ],
)
def test_a_configuration_without_weights_says_so_and_how_to_get_some(name: str, way: str) -> None:
    assert name not in savl.weights.shipped()
    for call, argument in ((savl.load, "source"), (lambda name: savl.upscale(PIXEL, model=name), "model")):
        with pytest.raises(FileNotFoundError) as caught:
            call(name)
        message = str(caught.value)
        assert message.startswith(f"{argument} must be shipped weights (")
        assert f"got {name!r}, a configuration without weights: {way}" in message
        assert f"savl.build({name!r}) makes that network with random weights" in message


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("savl-tny", "savl-tiny"),
        ("SAVL-Tiny", "savl-tiny"),
        ("savl_base", "savl-base"),
        ("hat_l", "hat-l"),
        ("runs/smal.safetensors", None),
    ],
)
def test_a_misspelt_name_is_answered_with_the_one_that_was_meant(
    name: str, meant: str | None, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (saved.parent / "runs").mkdir()
    saved.rename(saved.parent / "runs" / "small.safetensors")
    monkeypatch.chdir(saved.parent)
    with pytest.raises(FileNotFoundError, match=f"did you mean '{meant or 'runs/small.safetensors'}'\\?$"):
        savl.load(name)


def test_an_address_is_not_fetched() -> None:
    with pytest.raises(FileNotFoundError, match=r"savl downloads nothing: fetch the file, give its path$"):
        savl.load("https://example.org/hat.pth")


def test_a_folder_is_refused_as_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"got the folder .*; name a file in it"):
        savl.load(tmp_path)


# Savl files that do not fit


def test_tensors_that_do_not_fit_the_configuration_are_reported(saved: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        del tensors["norm_last.bias"]
        tensors["norm_last.scale"] = torch.zeros(8)
        tensors["conv_first.weight"] = torch.zeros(8, 3, 5, 5)

    rewrite(saved, spoil)
    assert refusal(saved) == (
        "its tensors do not fit the network: 1 missing: norm_last.bias; 1 unknown: norm_last.scale; "
        "1 misshapen: conv_first.weight (8, 3, 5, 5) instead of (8, 3, 3, 3)"
    )


def test_another_configuration_than_that_of_the_tensors_is_refused(saved: Path) -> None:
    rewrite(saved, lambda tensors, config: config.update(channels=16))
    assert "misshapen: estimator" not in refusal(saved)
    assert "(8, 3, 3, 3) instead of (16, 3, 3, 3)" in refusal(saved)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("colour", "blue", "unknown settings ['colour']"),
        ("scale", 5, "scale must be 2, 3, 4 or 8, got 5"),
        ("channels", "eight", "channels"),
        ("depths", 3, "depths"),
        ("heads", 2.0, "heads"),
    ],
)
def test_an_impossible_configuration_is_refused(name: str, value: object, reason: str, saved: Path) -> None:
    rewrite(saved, lambda tensors, config: config.update({name: value}))
    message = refusal(saved)
    assert message.startswith("its savl_config metadata cannot be used: ")
    assert reason in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"savl-base"'])
def test_metadata_that_is_no_configuration_is_refused(text: str, saved: Path) -> None:
    save_file(load_file(saved), saved, metadata={files.METADATA_KEY: text})
    assert "its savl_config metadata cannot be used" in refusal(saved)


# Files of other kinds, and damaged files


def test_weights_of_another_network_are_refused_with_a_few_of_their_names(tmp_path: Path) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).state_dict()
    save_file(state, tmp_path / "other.safetensors")
    torch.save(state, tmp_path / "other.pth")
    torch.save({}, tmp_path / "empty.pth")
    expected = "is neither a savl file nor a HAT checkpoint (its tensors: 0.bias, 0.weight, 1.bias, ...)"
    assert refusal(tmp_path / "other.safetensors").startswith(expected)
    assert refusal(tmp_path / "other.pth").startswith(expected)
    assert "(its tensors: none)" in refusal(tmp_path / "empty.pth")


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {"epoch": 3}, {1: torch.zeros(3)}, 7])
def test_a_checkpoint_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    assert refusal(tmp_path / "other.pth").startswith("must hold a state dict")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [10, 200, 20_000, -1])
def test_a_truncated_safetensors_file_is_refused_with_how_much_is_there(keep: int, suffix: str, saved: Path) -> None:
    whole = saved.read_bytes()
    path = saved.with_suffix(suffix)
    path.write_bytes(whole[:keep])
    header, there = 8 + int.from_bytes(whole[:8], "little"), path.stat().st_size
    expected = header if there < header else len(whole)
    assert refusal(path) == (
        f"is not a readable safetensors file: it is cut off, {there} of {expected} bytes are there"
    )


def test_a_safetensors_file_of_a_few_bytes_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:4])
    assert refusal(saved).startswith("is not a readable safetensors file: ")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt", ""])
def test_an_empty_file_is_refused(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"network{suffix}").touch()
    assert refusal(tmp_path / f"network{suffix}") == "is empty, a file of 0 bytes"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".ckpt"])
@pytest.mark.parametrize("content", [b"\0" * 99, b"some text", b"\x80\x02", b"PK\x03\x04" + b"\0" * 9])
def test_a_file_of_another_kind_is_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"photo{suffix}"
    path.write_bytes(content)
    assert refusal(path).startswith(("is not a readable safetensors file", "is damaged or no checkpoint"))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_pth_file_is_refused(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "hat.pth"
    torch.save({"conv_first.weight": torch.zeros(100)}, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:-150])
    assert refusal(path).startswith("is damaged or no checkpoint")


class Payload:
    """An object whose unpickling would create a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle"])
def test_pickled_code_is_refused_and_never_run(how: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "hat.pth"
    content = {"params": {"conv_first.weight": torch.zeros(3)}, "extra": Payload(mark)}
    if how == "bare pickle":
        path.write_bytes(pickle.dumps(Payload(mark), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    message = refusal(path)
    assert not mark.exists(), "the code in the file was run"
    assert message.startswith("holds pickled code (")
    assert "mkdir" in message


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_in_a_newer_protocol_is_refused_and_never_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "hat.pth"
    path.write_bytes(pickle.dumps(Payload(mark), protocol=4))
    assert refusal(path).startswith("is damaged or no checkpoint of weights alone (UnpicklingError")
    assert not mark.exists(), "the code in the file was run"


def test_a_whole_pickled_network_is_refused(model: savl.SAVL, tmp_path: Path) -> None:
    torch.save(model, tmp_path / "network.pth")
    assert "holds pickled code (savl.network.savl.SAVL)" in refusal(tmp_path / "network.pth")


def test_a_pickled_network_under_the_name_of_safetensors_is_refused_for_what_it_is(
    model: savl.SAVL, tmp_path: Path
) -> None:
    torch.save(model, tmp_path / "network.safetensors")
    assert "holds pickled code (savl.network.savl.SAVL)" in refusal(tmp_path / "network.safetensors")
