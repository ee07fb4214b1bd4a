"""Layouts of weights by training programs: nested, prefixed, beside other entries, with any suffix, or not weights."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import savl
from savl.weights import hat

SAVL_CONFIG = savl.SAVLConfig(
    scale=2,
    channels=8,
    depths=(1, 1),
    heads=2,
    window=4,
    cab_compress=2,
    cab_squeeze=2,
    cab_scale=0.3,
    upsample_features=4,
    latent=4,
    estimator_width=4,
    estimator_dilations=(1, 2),
)
HAT_CONFIG = savl.SAVLConfig(
    scale=2,
    channels=8,
    depths=(1, 1),
    heads=2,
    window=4,
    cab_compress=2,
    cab_squeeze=2,
    upsample_features=4,
    degradation_code="none",
)

State = dict[str, Tensor]


def published(model: savl.SAVL) -> State:
    """Return the state dict of a network without degradation code, with the names of the HAT release."""
    state: State = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("ocab.bias_table"):
            window, key_window = model.config.window, model.config.key_window
            order = hat.reorder_overlap_table(torch.arange(tensor.shape[0]), window, key_window)
            tensor = torch.empty_like(tensor).index_copy_(0, order, tensor)
        gate = ".cab.squeeze." in name or ".cab.excite." in name
        tensor = tensor[:, :, None, None] if gate and name.endswith("weight") else tensor
        state[hat.published_name(name)] = tensor.clone()
    return state


@pytest.fixture
def network() -> savl.SAVL:
    torch.manual_seed(0)
    return savl.build(HAT_CONFIG).eval()


@pytest.fixture
def weights(network: savl.SAVL) -> State:
    return published(network)


@pytest.fixture
def own() -> savl.SAVL:
    torch.manual_seed(0)
    return savl.build(SAVL_CONFIG).eval()


def check_same(loaded: savl.SAVL, expected: savl.SAVL) -> None:
    assert loaded.config == expected.config
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        savl.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


# Nesting and prefixes

KEYS = [
    "params_ema",
    "params-ema",
    "params",
    "state_dict",
    "model_state_dict",
    "model",
    "net_g",
    "generator",
    "ema",
    "whatever",
]
PREFIXES = [
    "module.",
    "_orig_mod.",
    "net_g.",
    "model.",
    "generator.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.net_g._orig_mod.",
    "_orig_mod._fsdp_wrapped_module.",
]


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("key", KEYS)
def test_weights_load_from_any_key_also_nested(key: str, network: savl.SAVL, weights: State, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    for content in ({key: weights}, {key: {"params": weights}}, {"state_dict": {key: weights}}):
        torch.save({"epoch": 3, "iter": 10_000, "name": "hat", "best": None, "betas": (0.9, 0.99), **content}, path)
        check_same(savl.load(path), network)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixes_of_names_are_removed(
    prefix: str, suffix: str, network: savl.SAVL, weights: State, tmp_path: Path
) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": prefixed(weights, prefix)}, path)
    else:
        save_file(prefixed(weights, prefix), path)
    check_same(savl.load(path), network)


def test_names_inserted_by_compiled_modules_are_removed(network: savl.SAVL, weights: State, tmp_path: Path) -> None:
    inside = {name.replace("residual_group.", "_orig_mod.residual_group."): value for name, value in weights.items()}
    assert inside.keys() != weights.keys()
    torch.save(inside, tmp_path / "x.pth")
    check_same(savl.load(tmp_path / "x.pth"), network)


def test_numbers_beside_the_tensors_are_left_out(network: savl.SAVL, weights: State, tmp_path: Path) -> None:
    torch.save({**weights, "epoch": 3, "loss": 0.5, "name": "x", "best": None}, tmp_path / "x.pth")
    check_same(savl.load(tmp_path / "x.pth"), network)


def test_numbers_of_numpy_beside_the_tensors_are_left_out(network: savl.SAVL, weights: State, tmp_path: Path) -> None:
    allowed_before = set(torch.serialization.get_safe_globals())
    numbers = {"best": np.float64(31.5), "loss": np.float32(0.1), "iter": np.int64(10_000), "done": np.bool_(True)}
    for content in ({"state_dict": weights, **numbers}, {**weights, **numbers}):
        for zipped in (True, False):
            torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
            check_same(savl.load(tmp_path / "x.pth"), network)
    assert set(torch.serialization.get_safe_globals()) == allowed_before, (
        "what was allowed for this file stayed allowed"
    )


def test_numbers_of_numpy_load_in_many_threads(network: savl.SAVL, weights: State, tmp_path: Path) -> None:
    torch.save({"state_dict": weights, "best": np.float64(31.5)}, tmp_path / "x.pth")
    with ThreadPoolExecutor(8) as threads:
        for loaded in threads.map(savl.load, [tmp_path / "x.pth"] * 24):
            check_same(loaded, network)


def test_code_beside_numbers_of_numpy_is_never_run(weights: State, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"best": np.float64(1), "params": weights, "extra": Payload(mark)}, tmp_path / "x.pth")
    assert refusal(tmp_path / "x.pth").startswith("holds pickled code (")
    assert not mark.exists()


def test_other_networks_and_optimizers_beside_it_are_left_out(
    network: savl.SAVL, weights: State, tmp_path: Path
) -> None:
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    discriminator = {f"net_d.conv.{index}.weight": torch.zeros(2) for index in range(400)}
    for content in (
        {"optimizer": optimizer.state_dict(), "net_d": discriminator, "net_g": weights},
        {"state_dict": {**discriminator, **prefixed(weights, "net_g.")}, "optimizer_states": [optimizer.state_dict()]},
    ):
        torch.save(content, tmp_path / "x.pth")
        check_same(savl.load(tmp_path / "x.pth"), network)


@pytest.mark.parametrize("average", ["params_ema", "params-ema", "ema", "net_g_ema", "model_ema", "ema_state_dict"])
def test_a_moving_average_comes_before_the_weights_it_averages(
    average: str, network: savl.SAVL, weights: State, tmp_path: Path
) -> None:
    path, zeros = tmp_path / "x.pth", {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    for content in (
        {"params": zeros, "net_g": zeros, "state_dict": zeros, average: weights},
        {"state_dict": {**prefixed(zeros, "net_g."), **prefixed(weights, "net_g_ema.")}},
    ):
        torch.save(content, path)
        check_same(savl.load(path), network)


# The content, not the suffix, determines the kind of a file


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".pkl", ""])
@pytest.mark.parametrize("how", ["safetensors", "zip", "legacy"])
def test_the_content_of_a_file_determines_how_it_is_read(
    how: str, suffix: str, network: savl.SAVL, weights: State, tmp_path: Path
) -> None:
    path = tmp_path / f"x{suffix}"
    if how == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=how == "zip")
    check_same(savl.load(path), network)


def test_a_savl_file_under_another_name_keeps_its_settings(own: savl.SAVL, tmp_path: Path) -> None:
    savl.save(own, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").rename(tmp_path / "x.pth")
    check_same(savl.load(tmp_path / "x.pth"), own)


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


OTHERS: dict[str, tuple[bytes, str]] = {
    "git lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 83712450\n",
        "is a Git LFS pointer, a text that stands for 83712450 bytes",
    ),
    "git annex": (b"/annex/objects/MD5E-s5--1c.pth\n", "is a git-annex pointer"),
    "page": (b"<!DOCTYPE html>\n<html><head><title>Google Drive</title>", "is a web page"),
    "page after spaces": (b"\xef\xbb\xbf\r\n <HTML>", "is a web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
    "json": (b'{"error": "Repository not found"}', "is a JSON text"),
    "zip": (zipped(HAT__readme=b"x", HAT__weights=b"y"), "is a zip file, but no torch checkpoint (it holds HAT/readme"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "is a gzip archive; unpack it first"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(20), "is a PNG image"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ""])
@pytest.mark.parametrize("other", OTHERS)
def test_a_file_without_weights_is_refused_in_one_line(other: str, suffix: str, tmp_path: Path) -> None:
    content, words = OTHERS[other]
    (tmp_path / f"x{suffix}").write_bytes(content)
    assert refusal(tmp_path / f"x{suffix}").startswith(words)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_torchscript_program_is_refused_as_code(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))
    assert refusal(tmp_path / "x.pt").startswith("is a TorchScript program, which is code")


def test_an_exported_program_is_refused_as_code(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "x.pt2")
    assert refusal(tmp_path / "x.pt2").startswith("is a program of torch.export, which is code")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_that_is_cut_off_is_refused(
    legacy: bool, share: float, suffix: str, weights: State, tmp_path: Path
) -> None:
    path = tmp_path / f"x{suffix}"
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    message = refusal(path)
    assert message.startswith("is damaged or no checkpoint of weights alone")
    assert legacy or "cut off" in message


class Payload:
    """An object whose unpickling would create a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Path.mkdir, (self.mark,)  # type: ignore[return-value]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".json"])
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_code_is_never_run_whatever_the_file_is_called(how: str, suffix: str, weights: State, tmp_path: Path) -> None:
    path, mark = tmp_path / f"x{suffix}", tmp_path / "mark"
    content: Any = {"params": weights, "extra": Payload(mark)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(Payload(mark), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    assert refusal(path).startswith("holds pickled code (")
    assert not mark.exists()


def test_a_tar_archive_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    assert refusal(tmp_path / "x.pth").startswith("is damaged or no checkpoint of weights alone")


# savl's own state dict, without the file that savl.save writes


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_plain_state_dict_of_savl_is_refused_with_the_missing_data_and_a_solution(
    nested: bool, suffix: str, own: savl.SAVL, tmp_path: Path
) -> None:
    path = tmp_path / f"mine{suffix}"
    if suffix == ".pth":
        torch.save({"model": own.state_dict()} if nested else own.state_dict(), path)
    else:
        save_file({("module." if nested else "") + name: value for name, value in own.state_dict().items()}, path)
    assert refusal(path) == (
        "holds the weights of a savl network without its settings: write them with "
        "savl.save(model, 'x.safetensors'), or put json.dumps(model.config.to_dict()) beside it as mine.json"
    )


def as_toml(values: dict[str, Any]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


SETTINGS = {
    ".json": json.dumps(SAVL_CONFIG.to_dict()),
    ".toml": as_toml(SAVL_CONFIG.to_dict()),
    "training .toml": "[run]\nsteps = 3\n[model]\n" + as_toml(SAVL_CONFIG.to_dict()),
}


@pytest.mark.parametrize("beside", SETTINGS)
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, torch.compile])
def test_a_state_dict_of_savl_loads_with_its_settings_beside_it(
    wrap: Callable[[nn.Module], nn.Module], beside: str, own: savl.SAVL, tmp_path: Path
) -> None:
    torch.save(wrap(own).state_dict(), tmp_path / "mine.pth")
    (tmp_path / f"mine{beside.split()[-1]}").write_text(SETTINGS[beside])
    check_same(savl.load(tmp_path / "mine.pth"), own)


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".json", '{"name": "savl-tiny", "depths": [1]}'),
        (".toml", 'base = "other.toml"\n[model]\nname = "savl-tiny"\ndepths = [1]\n[data]\nhr = ["x"]\n'),
    ],
)
def test_settings_beside_it_may_name_a_configuration(suffix: str, text: str, tmp_path: Path) -> None:
    model = savl.build(replace(savl.CONFIGS["savl-tiny"], depths=(1,)))
    torch.save({"net_g": model.state_dict()}, tmp_path / "mine.pth")
    (tmp_path / f"mine{suffix}").write_text(text)
    check_same(savl.load(tmp_path / "mine.pth"), model)


@pytest.mark.parametrize("key", ["config", "savl_config"])
def test_settings_in_the_checkpoint_itself_are_used(key: str, own: savl.SAVL, tmp_path: Path) -> None:
    torch.save({"state_dict": own.state_dict(), key: own.config.to_dict(), "epoch": 2}, tmp_path / "mine.pth")
    check_same(savl.load(tmp_path / "mine.pth"), own)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"name": "savl-huge"}', "name must be one of savl-base, savl-tiny"),
        ("[]", "expected a table"),
        ("{", "Expecting"),
        ('{"colour": 1}', "unknown settings"),
        ('{"scale": 7}', "scale"),
    ],
)
def test_settings_beside_it_that_cannot_be_used_are_refused_by_their_name(
    text: str, words: str, own: savl.SAVL, tmp_path: Path
) -> None:
    torch.save(own.state_dict(), tmp_path / "mine.pth")
    (tmp_path / "mine.json").write_text(text)
    message = refusal(tmp_path / "mine.pth")
    assert message.startswith("mine.json, the settings beside it, cannot be used: ")
    assert words in message


def test_settings_of_another_network_beside_it_are_refused(own: savl.SAVL, tmp_path: Path) -> None:
    torch.save(own.state_dict(), tmp_path / "mine.pth")
    (tmp_path / "mine.json").write_text(json.dumps(asdict(replace(SAVL_CONFIG, channels=16))))
    assert refusal(tmp_path / "mine.pth").startswith("its tensors do not fit the network")


def test_a_checkpoint_of_training_loads_as_its_averaged_network(own: savl.SAVL, tmp_path: Path) -> None:
    from savl.training.checkpoint import identity_settings, save_checkpoint
    from savl.training.config import TrainingConfig

    average = AveragedModel(own)
    with torch.no_grad():
        other = savl.build(SAVL_CONFIG).state_dict()
    save_checkpoint(
        tmp_path / "checkpoint.pt",
        {
            "step": 3,
            "settings": identity_settings(replace(TrainingConfig(), model=SAVL_CONFIG), 1),
            "average": average.state_dict(),
            "objective": {f"model.{name}": tensor for name, tensor in other.items()},
        },
    )
    check_same(savl.load(tmp_path / "checkpoint.pt"), own)
