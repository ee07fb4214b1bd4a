"""`savl.save(..., layout="hat")`: what HAT's own tools open, and what cannot be stored in this layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import savl
from savl.network import SAVL, SAVLConfig

CONFIG = SAVLConfig(
    channels=12,
    depths=(2, 1),
    heads=2,
    window=8,
    cab_compress=3,
    cab_squeeze=4,
    upsample_features=16,
    degradation_code="none",
)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"scale": 2, "mlp_ratio": 4.0, "overlap": 0.25},
    {"scale": 3, "window": 4, "cab_compress": 5},
    {"scale": 8, "depths": (1,)},
]


def random_network(**changes: Any) -> SAVL:
    torch.manual_seed(3)
    network = SAVL(replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_spandrel_opens_the_file_and_computes_the_same(
    changes: dict[str, Any], suffix: str, spandrel: ModuleType, tmp_path: Path
) -> None:
    network = random_network(**changes)
    path = tmp_path / f"hat{suffix}"
    savl.save(network, path, layout="hat")
    descriptor = spandrel.ModelLoader().load_from_file(path).eval()
    assert descriptor.architecture.id == "HAT"
    assert descriptor.scale == network.scale
    lr = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        expected = network.double()(lr.double())
        actual = descriptor.model.double()(lr.double())
    assert expected.std() > 0.01
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("changes", VARIANTS)
def test_loading_and_saving_again_gives_equal_tensors(changes: dict[str, Any], tmp_path: Path) -> None:
    network = random_network(**changes)
    savl.save(network, tmp_path / "first.safetensors", layout="hat")
    loaded = savl.load(tmp_path / "first.safetensors")
    assert isinstance(loaded, SAVL)
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    savl.save(loaded, tmp_path / "second.safetensors", layout="hat")
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_pth_file_has_the_tensors_under_the_key_of_the_published_ones(tmp_path: Path) -> None:
    savl.save(random_network().bfloat16(), tmp_path / "hat.pth", layout="hat")
    content = torch.load(tmp_path / "hat.pth", weights_only=True)
    assert list(content) == ["params_ema"]
    assert content["params_ema"]["relative_position_index_SA"].dtype == torch.int64
    assert content["params_ema"]["conv_first.weight"].dtype == torch.bfloat16


def test_compiled_and_parallel_networks_are_saved(tmp_path: Path) -> None:
    network = random_network()
    savl.save(network, tmp_path / "plain.pth", layout="hat")
    savl.save(torch.nn.DataParallel(torch.compile(network)), tmp_path / "wrapped.pth", layout="hat")
    plain, wrapped = (torch.load(tmp_path / f"{name}.pth")["params_ema"] for name in ("plain", "wrapped"))
    assert all(torch.equal(tensor, wrapped[name]) for name, tensor in plain.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"degradation_code": "variational"}, "degradation_code must be 'none', got 'variational'"),
        ({"degradation_code": "deterministic"}, "degradation_code must be 'none', got 'deterministic'"),
        ({"cab_scale": 0.1}, "cab_scale must be 0.01, got 0.1"),
        ({"cab_neighbourhood": 5}, "cab_neighbourhood must be 0, got 5"),
        ({"upsampler": "pixelshuffledirect"}, "upsampler must be 'pixelshuffle', got 'pixelshuffledirect'"),
        ({"image_residual": True}, "image_residual must be False, got True"),
        ({"rgb_mean": (0.5, 0.5, 0.5)}, "rgb_mean must be (0.4488, 0.4371, 0.404), got (0.5, 0.5, 0.5)"),
    ],
)
def test_networks_that_hat_cannot_express_are_refused_by_the_setting(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="^model cannot be stored with layout='hat'") as caught:
        savl.save(random_network(**changes), tmp_path / "hat.safetensors", layout="hat")
    assert words in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_bad_arguments_are_refused(small_config: Callable[..., SAVLConfig], tmp_path: Path) -> None:
    network = SAVL(small_config())
    with pytest.raises(ValueError, match="layout must be 'savl' or 'hat', got 'swinir'"):
        savl.save(network, tmp_path / "x.safetensors", layout="swinir")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"path must end in .safetensors, got "):
        savl.save(network, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"path must end in .safetensors or .pth, got "):
        savl.save(network, tmp_path / "x.bin", layout="hat")
    with pytest.raises(TypeError, match="model must be a savl.SAVL, got Linear"):
        savl.save(torch.nn.Linear(1, 1), tmp_path / "x.pth", layout="hat")
