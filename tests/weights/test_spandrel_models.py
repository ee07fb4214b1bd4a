"""Models of other architectures: `savl.load` recognises them, and refuses what savl cannot run."""

from __future__ import annotations

import builtins
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import savl
from savl.weights import SpandrelModel, load_savl
from savl.weights.spandrel_model import ModelTraits, _window_multiple, wrap_descriptor

Make = Callable[[str], nn.Module]

MODELS = {  # scale, channels, size multiple
    "ESRGAN": (4, 3, 8),
    "Compact": (4, 3, 8),
    "Compact x3": (3, 3, 8),
    "Compact x8": (8, 3, 8),
    "SwinIR": (4, 3, 8),
    "SwinIR gray": (2, 1, 8),
    "DAT": (2, 3, 8),
    "NAFNet": (1, 3, 8),
}


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        savl.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", MODELS)
def test_models_of_other_architectures_load_with_their_scale_and_channels(
    name: str, foreign_model: Make, tmp_path: Path
) -> None:
    model = foreign_model(name)
    torch.save({"params": model.state_dict()}, tmp_path / "model.pth")
    loaded = savl.load(tmp_path / "model.pth")
    assert isinstance(loaded, SpandrelModel)
    assert (loaded.scale, loaded.image_channels, loaded.size_multiple) == MODELS[name]
    assert not loaded.training
    state = model.state_dict()
    assert all(torch.equal(tensor, state[each]) for each, tensor in loaded.model.state_dict().items())


@pytest.mark.parametrize("name", ["ESRGAN", "SwinIR", "DAT", "NAFNet"])
@pytest.mark.parametrize("size", [(16, 24), (37, 19)])
def test_the_result_is_that_of_spandrel(
    name: str, size: tuple[int, int], spandrel: ModuleType, foreign_model: Make
) -> None:
    descriptor = spandrel.ModelLoader().load_from_state_dict(foreign_model(name).state_dict())
    model = wrap_descriptor(descriptor)
    assert model is not None
    lr = torch.rand(2, 3, *size)
    expected = torch.cat([descriptor(image) for image in lr.split(1)])
    with torch.no_grad():
        assert torch.equal(model(lr), expected)
        sr, field = model(lr, return_field=True)
    assert field is None
    assert torch.equal(sr, expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3)])
def test_images_of_any_size_have_a_result_of_scale_times_that_size(
    name: str, size: tuple[int, int], foreign_model: Make, tmp_path: Path
) -> None:
    save_file(foreign_model(name).state_dict(), tmp_path / "model.safetensors")
    model = savl.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        sr = model(torch.rand(1, 3, *size))
    assert sr.shape == (1, 3, *(MODELS[name][0] * side for side in size))
    assert bool(((sr >= 0) & (sr <= 1)).all())


def test_a_gray_model_processes_each_channel_by_itself(spandrel: ModuleType, foreign_model: Make) -> None:
    descriptor = spandrel.ModelLoader().load_from_state_dict(foreign_model("SwinIR gray").state_dict())
    model = SpandrelModel(descriptor)
    lr = torch.rand(2, 3, 17, 16)
    with torch.no_grad():
        channels = [model(lr[:, index : index + 1]) for index in range(3)]
        assert torch.equal(model(lr), torch.cat(channels, dim=1))
    with pytest.raises(ValueError, match=r"lr must have shape \(B, 1 or 3, h, w\)"):
        model(torch.rand(1, 2, 8, 8))


def test_strength_scales_the_difference_from_bicubic_interpolation(spandrel: ModuleType, foreign_model: Make) -> None:
    model = SpandrelModel(spandrel.ModelLoader().load_from_state_dict(foreign_model("NAFNet").state_dict()))
    lr = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        full = model(lr)
        torch.testing.assert_close(model(lr, strength=0.25), lr + 0.25 * (full - lr))
        torch.testing.assert_close(model(lr, strength=torch.full((1, 16, 16), 0.25)), lr + 0.25 * (full - lr))
        torch.testing.assert_close(model(lr, strength=0.0), lr)
    with pytest.raises(ValueError, match="strength must be a number in"):
        model(lr, strength=2.0)


@pytest.mark.parametrize("layout", ["plain", "params_ema", "module.", "net_g._orig_mod.", "gan"])
def test_weights_load_from_the_layouts_of_training_programs(layout: str, foreign_model: Make, tmp_path: Path) -> None:
    state = foreign_model("Compact").state_dict()
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    critic = {f"critic.{index}.weight": torch.zeros(1) for index in range(40)}
    content: dict[str, Any] = {
        "plain": state,
        "params_ema": {"params": other, "params_ema": state},
        "gan": {"epoch": 3, "net_d": critic, "net_g": state},
    }.get(layout) or {"params": {layout + name: tensor for name, tensor in state.items()}}
    torch.save(content, tmp_path / "model.pth")
    loaded = savl.load(tmp_path / "model.pth")
    assert isinstance(loaded, SpandrelModel)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.model.state_dict().items())


def test_half_precision_weights_load_as_float32(foreign_model: Make, tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in foreign_model("Compact").state_dict().items()}
    torch.save(state, tmp_path / "model.pth")
    loaded = savl.load(tmp_path / "model.pth")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_a_hat_that_savl_cannot_express_loads_with_spandrel(spandrel: ModuleType, tmp_path: Path) -> None:
    from spandrel.architectures.HAT import HAT

    model = HAT(
        in_chans=1, embed_dim=12, depths=(1,), num_heads=(2,), window_size=8, compress_ratio=3, squeeze_factor=4,
        mlp_ratio=2, upscale=2, num_feat=8,
    )  # fmt: skip
    torch.save(model.state_dict(), tmp_path / "gray.pth")
    loaded = savl.load(tmp_path / "gray.pth")
    assert isinstance(loaded, SpandrelModel)
    assert (loaded.traits.architecture, loaded.image_channels) == ("HAT", 1)


# Refusals


def test_damaged_tensors_are_refused_by_the_name_of_the_architecture(foreign_model: Make, tmp_path: Path) -> None:
    state = foreign_model("SwinIR").state_dict()
    name = "layers.0.residual_group.blocks.0.attn.proj.weight"
    torch.save({**state, name: torch.zeros(3, 5)}, tmp_path / "model.pth")
    message = refusal(tmp_path / "model.pth")
    assert message.startswith("has tensors of the architecture SwinIR, but they do not fit it (RuntimeError: ")


def test_a_truncated_file_is_refused(foreign_model: Make, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(foreign_model("Compact").state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    assert "is damaged or no checkpoint of weights alone" in refusal(path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return builtins.exec, ("raise SystemExit('pickled code ran')",)


def test_pickled_code_is_refused_and_not_run(foreign_model: Make, tmp_path: Path) -> None:
    torch.save({"params": foreign_model("Compact").state_dict(), "extra": Evil()}, tmp_path / "model.pth")
    assert "holds pickled code" in refusal(tmp_path / "model.pth")


def descriptor(spandrel: ModuleType, purpose: str = "SR", channels: tuple[int, int] = (3, 3)) -> Any:
    """Return a descriptor of a model for a purpose, with numbers of input and output channels."""
    model = nn.Conv2d(*channels, 1)
    return spandrel.ImageModelDescriptor(
        model, model.state_dict(), spandrel.MAIN_REGISTRY["Compact"].architecture, purpose, [], True, True, 1,
        *channels,
    )  # fmt: skip


def masked(spandrel: ModuleType) -> Any:
    model = nn.Conv2d(4, 3, 1)
    return spandrel.MaskedImageModelDescriptor(
        model, model.state_dict(), spandrel.MAIN_REGISTRY["LaMa"].architecture, "Inpainting", [], True, True, 3, 3
    )


def test_models_for_other_purposes_and_channels_are_refused(spandrel: ModuleType) -> None:
    accepted = r"savl runs models for super-resolution and restoration with 3 \(RGB\) or 1 \(gray\) channels"
    with pytest.raises(ValueError, match=rf"Compact for FaceSR; {accepted}"):
        SpandrelModel(descriptor(spandrel, "FaceSR"))
    with pytest.raises(ValueError, match=rf"LaMa for Inpainting; {accepted}"):
        SpandrelModel(masked(spandrel))
    with pytest.raises(ValueError, match=rf"with 4 input channels and 4 output channels; {accepted}"):
        SpandrelModel(descriptor(spandrel, channels=(4, 4)))
    with pytest.raises(ValueError, match="^model is a model of the architecture LaMa for Inpainting"):
        savl.Upscaler(masked(spandrel))
    with pytest.raises(ValueError, match="^model is a model of the architecture"):
        savl.upscale(torch.rand(3, 4, 4), model=descriptor(spandrel, "FaceSR"))


def test_without_spandrel_the_error_names_the_command_that_installs_it(
    foreign_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(foreign_model("Compact").state_dict(), tmp_path / "model.pth")
    monkeypatch.setitem(sys.modules, "spandrel", None)
    message = refusal(tmp_path / "model.pth")
    assert message.startswith("is neither a savl file nor a HAT checkpoint (its tensors: body.0.bias,")
    assert message.endswith('models of other architectures need spandrel: pip install "savl[models]"')


def test_spandrel_imports_beside_a_torchvision_whose_library_does_not_load() -> None:
    """In a process of its own: in this one, conftest.py has declared the operators."""
    code = "from savl.weights.spandrel_model import import_spandrel; print(import_spandrel().__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "spandrel\n", done.stderr


def test_a_torchvision_of_another_torch_is_named(
    foreign_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(foreign_model("Compact").state_dict(), tmp_path / "model.pth")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "spandrel.py").write_text("raise RuntimeError('torchvision was compiled for another torch')")
    monkeypatch.delitem(sys.modules, "spandrel")
    monkeypatch.syspath_prepend(broken)
    message = refusal(tmp_path / "model.pth")
    assert "torchvision was compiled for another torch" in message
    assert message.endswith(f"install the torchvision that belongs to torch {torch.__version__}")


def test_where_a_degradation_field_is_needed_other_architectures_are_refused(
    foreign_model: Make, tmp_path: Path
) -> None:
    torch.save(foreign_model("Compact").state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="model of the architecture RealESRGAN Compact; a savl or HAT network is"):
        load_savl(tmp_path / "model.pth")


# Size multiples


def traits(architecture: str, multiple_of: int = 1) -> ModelTraits:
    return ModelTraits(architecture, "SR", (), 4, 3, 1, multiple_of, False, "supported", True)


@pytest.mark.parametrize(
    ("architecture", "multiple_of", "attributes", "expected"),
    [
        ("ESRGAN", 1, {}, 8),
        ("ESRGAN", 4, {}, 8),
        ("SwinIR", 1, {"window_size": 7}, 56),
        ("SwinIR", 4, {"window_size": 8, "start_unshuffle": 2}, 16),
        ("DAT", 1, {"split_size": [8, 32]}, 32),
        ("SCUNet", 1, {"window_size": 8}, 64),
        ("GRL", 1, {"window_size": (32, 32), "stripe_size": [64, None]}, 64),
        ("GRL", 1, {"window_size": 40, "stripe_size": [64, 128]}, 128),
        ("HAT", 1, {"window_size": True}, 8),
    ],
)
def test_tiles_begin_at_multiples_of_the_windows(
    architecture: str, multiple_of: int, attributes: dict[str, Any], expected: int
) -> None:
    model = nn.Identity()
    vars(model).update(attributes)
    assert _window_multiple(model, traits(architecture, multiple_of)) == expected


def test_required_sizes_are_the_smallest_that_fit() -> None:
    free = traits("A")
    assert free.padded_size(5, 7) == (5, 7)
    bound = ModelTraits("A", "SR", (), 4, 3, 16, 8, False, "supported", True)
    assert bound.padded_size(5, 33) == (16, 40)
    square = ModelTraits("A", "SR", (), 4, 3, 1, 16, True, "supported", True)
    assert square.padded_size(5, 33) == (48, 48)


def test_a_result_of_a_wrong_size_is_an_error(spandrel: ModuleType) -> None:
    model = SpandrelModel(descriptor(spandrel))
    model._call = lambda model, image: image[..., :-1]
    with pytest.raises(RuntimeError, match=r"must return an image of at least 4x4 pixels for 4x4, got \(1, 3, 4, 3\)"):
        model(torch.rand(1, 3, 4, 4))


def test_an_object_that_is_no_descriptor_is_left_alone(spandrel: ModuleType) -> None:
    assert wrap_descriptor(SimpleNamespace(model=nn.Identity())) is None
    assert wrap_descriptor(Tensor()) is None
