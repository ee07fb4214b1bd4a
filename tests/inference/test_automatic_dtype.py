"""The choice between float32 and bfloat16 where the user names no dtype."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import savl
from savl.build_info import build_info
from savl.images.folder import read_rgb
from savl.inference import upscale_image
from savl.inference.device import MEASURED_IN_BFLOAT16, is_faster_in_bfloat16
from savl.inference.enlarge import ByBitDepth
from savl.inference.upscale_image import as_upscaler
from savl.network import SAVL
from savl.ops import report, scopes
from savl.ops.library import CPP
from savl.ops.op import OPS, UNAVAILABLE
from savl.weights import shipped

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scopes, "process", scopes.ProcessSettings(None))


@pytest.fixture
def use_instruction_set(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that gives the C++ kernels an instruction set, or a reason why they cannot be used."""

    def use(name: str, reason: str | None = None) -> None:
        monkeypatch.setattr(report, "build_info", lambda: {**build_info(), "kernel_instruction_set": name})
        for op in OPS:
            monkeypatch.setitem(UNAVAILABLE, (op, CPP), reason)

    return use


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is faster in bfloat16, whatever it is."""
    monkeypatch.setattr(upscale_image, "is_faster_in_bfloat16", lambda device: True)


@pytest.fixture(scope="module")
def lr() -> Tensor:
    """Detail of a photograph, ``(1, 3, 40, 44)``."""
    return read_rgb(EXAMPLES / "chairs.webp")[None, :, 100:140, 60:104]


# Machines


@pytest.mark.parametrize(
    ("name", "is_faster"),
    [("amx", True), ("avx512_bf16", True), ("avx512", False), ("avx2", False), ("portable", False)],
)
def test_a_cpu_is_faster_if_the_extension_multiplies_bfloat16(
    use_instruction_set: Callable[..., None], name: str, is_faster: bool
) -> None:
    use_instruction_set(name)
    assert is_faster_in_bfloat16(CPU) == is_faster


def test_neither_other_devices_nor_a_missing_extension_count(use_instruction_set: Callable[..., None]) -> None:
    use_instruction_set("amx")
    assert not is_faster_in_bfloat16(torch.device("cuda"))
    use_instruction_set("amx", "the C++ extension could not be loaded")
    assert not is_faster_in_bfloat16(CPU)


@pytest.mark.parametrize("settings", [{"enabled": False}, {"layer_norm": False}, {"window_attention": "eager"}])
def test_only_fused_kernels_count(use_instruction_set: Callable[..., None], settings: dict[str, Any]) -> None:
    use_instruction_set("amx")
    with savl.use_fused_kernels(**settings):
        assert not is_faster_in_bfloat16(CPU)
    with savl.use_fused_kernels():
        assert is_faster_in_bfloat16(CPU)


# Networks


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("name", MEASURED_IN_BFLOAT16)
@pytest.mark.parametrize("as_model", [str, lambda name: shipped()[name]], ids=["name", "path"])
def test_measured_weights_have_an_upscaler_in_bfloat16(name: str, as_model: Callable[[str], Any]) -> None:
    found = as_upscaler(as_model(name), device="cpu", tile=64)
    assert isinstance(found, ByBitDepth)
    assert isinstance(found.eight_bit, savl.Upscaler)
    assert isinstance(found.other, savl.Upscaler)
    assert (found.eight_bit.dtype, found.other.dtype) == (torch.bfloat16, torch.float32)
    assert found.eight_bit.model is found.other.model, "the weights are in memory twice"
    assert found.eight_bit.tile == found.other.tile == 64


def dtype_of(upscaler: object) -> torch.dtype:
    assert isinstance(upscaler, savl.Upscaler)
    return upscaler.dtype


@pytest.mark.usefixtures("faster")
def test_other_networks_are_computed_in_float32(tmp_path: Path) -> None:
    own = shutil.copy(shipped()["savl-tiny"], tmp_path / "savl-tiny.safetensors")
    loaded = savl.load("savl-tiny")
    assert dtype_of(as_upscaler(own, device="cpu")) == torch.float32
    assert dtype_of(as_upscaler(loaded, device="cpu")) == torch.float32
    assert dtype_of(savl.Upscaler(loaded, device="cpu")) == torch.float32


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_requested_dtype_is_used(dtype: torch.dtype) -> None:
    assert dtype_of(as_upscaler("savl-tiny", device="cpu", dtype=dtype)) == dtype


def test_other_machines_compute_in_float32(use_instruction_set: Callable[..., None]) -> None:
    use_instruction_set("avx2")
    assert dtype_of(as_upscaler("savl-tiny", device="cpu")) == torch.float32


# Images


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize(
    ("image", "settings", "expected"),
    [
        (np.zeros((6, 8, 3), np.uint8), {}, torch.bfloat16),
        (torch.zeros(4, 6, 8, dtype=torch.uint8), {}, torch.bfloat16),
        (np.zeros((6, 8), np.uint8), {"dtype": "float32"}, torch.float32),
        (np.zeros((6, 8, 3), np.uint16), {}, torch.float32),
        (np.zeros((6, 8, 3), np.float32), {}, torch.float32),
        (torch.zeros(3, 6, 8, dtype=torch.bfloat16), {}, torch.float32),
    ],
)
def test_only_images_of_eight_bits_are_computed_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, image: Any, settings: dict[str, Any], expected: torch.dtype
) -> None:
    seen: list[torch.dtype] = []
    call = savl.Upscaler.__call__

    def spy(upscaler: savl.Upscaler, *arguments: Any, **named: Any) -> Any:
        seen.append(upscaler.dtype)
        return call(upscaler, *arguments, **named)

    monkeypatch.setattr(savl.Upscaler, "__call__", spy)
    savl.upscale(image, device="cpu", **settings)
    assert seen == [expected]


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize(
    ("dtype", "ending", "said"),
    [(np.uint8, "png", True), (np.uint16, "png", False), (np.uint16, "jpg", True), (np.uint16, "tiff", False)],
)
def test_the_samples_of_the_written_file_count(dtype: Any, ending: str, said: bool, tmp_path: Path) -> None:
    from savl.images.format import PNG
    from savl.images.write import write_image

    source = tmp_path / "in.png"
    write_image(source, np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8).astype(dtype), image_format=PNG)
    done = savl.upscale_file(source, tmp_path / f"out.{ending}", device="cpu")
    assert [("--dtype float32" in note) for note in done.run_notes] == [True] * said
    asked = savl.upscale_file(source, tmp_path / f"out.{ending}", device="cpu", dtype="bfloat16", overwrite=True)
    assert asked.run_notes == ()


# Accuracy


def test_field_severity_and_strength_are_computed_in_float32(lr: Tensor) -> None:
    model = savl.load("savl-tiny")
    seen: list[Tensor] = []
    model.estimator.register_forward_hook(lambda module, arguments, output: seen.append(output[0]))
    exact, narrow = (savl.Upscaler(model, device="cpu", dtype=each)(lr) for each in (torch.float32, torch.bfloat16))
    assert torch.equal(exact.severity, narrow.severity)
    assert torch.equal(exact.strength, narrow.strength)
    assert {mu.dtype for mu in seen} == {torch.float32}
    assert all(torch.equal(mu, seen[0]) for mu in seen)


@pytest.mark.parametrize("name", MEASURED_IN_BFLOAT16)
def test_measured_weights_stay_within_one_level_of_float32(name: str, lr: Tensor) -> None:
    model: SAVL = savl.load(name)
    images = [
        (255 * savl.Upscaler(model, device="cpu", dtype=each, strength=1)(lr).sr).round()
        for each in (torch.float32, torch.bfloat16)
    ]
    assert 0 < (images[0] - images[1]).abs().max() <= 1
