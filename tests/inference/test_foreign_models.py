"""Models of other architectures in `savl.Upscaler` and `savl.upscale`: tiles, memory, gray, alpha, 16 bits, dtypes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import savl
from savl.bicubic import bicubic_upscale
from savl.inference import network as networks
from savl.inference import upscaler as upscalers
from savl.inference.measured_memory import SIDE, measured_bytes_per_pixel
from savl.inference.upscaler import LEAST_MEASURED_TILE
from savl.network.upscaling import UpscalingNetwork
from savl.weights import SpandrelModel

Load = Callable[[str], SpandrelModel]

NAMES = ("ESRGAN", "Compact x3", "SwinIR", "SwinIR gray", "DAT", "NAFNet")


@pytest.fixture(scope="module")
def load(spandrel: ModuleType, foreign_model: Callable[[str], nn.Module]) -> Load:
    def load(name: str) -> SpandrelModel:
        return SpandrelModel(spandrel.ModelLoader().load_from_state_dict(foreign_model(name).state_dict()))

    return load


@pytest.fixture
def image() -> Tensor:
    return torch.rand(1, 3, 45, 71, generator=torch.Generator().manual_seed(0))


class Sizes(list[tuple[int, ...]]):
    """A list that copies of a network share."""

    def __deepcopy__(self, memo: object) -> Sizes:
        return self


class Zoom(UpscalingNetwork):
    """A network that a user wrote: it repeats pixels, and records the sizes that it has seen."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self._scale = scale
        self.seen = Sizes()

    @property
    def scale(self) -> int:
        return self._scale

    def reconstruct(self, lr: Tensor, field: object, strength: float | Tensor | None = None) -> Tensor:
        assert field is None
        self.seen.append(tuple(lr.shape))
        return lr.repeat_interleave(self._scale, -1).repeat_interleave(self._scale, -2)


@pytest.mark.parametrize("name", NAMES)
def test_untiled_is_the_model_itself(name: str, load: Load, image: Tensor) -> None:
    model = load(name)
    with savl.use_fused_kernels(False), torch.no_grad():
        expected = model(image)
        out = savl.Upscaler(model, tile=0, device="cpu")(image)
    assert torch.equal(out.sr, expected)
    assert torch.equal(out.severity, torch.ones(1, 45, 71))


# NAFNet, DAT: channel attention averages over the whole tile, so that no context makes tiles exact.
@pytest.mark.parametrize("name", ["ESRGAN", "Compact x3", "SwinIR", "SwinIR gray"])
@pytest.mark.parametrize("tile", [16, 24])
def test_tiles_with_enough_context_equal_the_whole_image(name: str, tile: int, load: Load, image: Tensor) -> None:
    model = load(name)
    untiled = savl.Upscaler(model, tile=0, device="cpu")(image).sr
    tiled = savl.Upscaler(model, tile=tile, tile_pad=32, device="cpu")(image).sr
    torch.testing.assert_close(tiled, untiled, atol=2e-5, rtol=0)


def test_tiles_begin_at_the_windows_of_the_whole_image(load: Load, image: Tensor) -> None:
    model = load("SwinIR")
    upscaler = savl.Upscaler(model, tile=13, tile_pad=9, device="cpu")
    assert (upscaler.tile, upscaler.tile_pad) == (16, 16)


def test_a_network_of_a_user_needs_only_scale_and_reconstruct(image: Tensor) -> None:
    network = Zoom()
    out = savl.Upscaler(network, tile=16, tile_pad=8, device="cpu")(image, strength=None)
    assert len(network.seen) == 3 * 5
    torch.testing.assert_close(out.sr, image.repeat_interleave(2, -1).repeat_interleave(2, -2))
    assert np.array_equal(savl.upscale(np.full((3, 2), 7, np.uint8), model=Zoom(3)), np.full((9, 6), 7, np.uint8))


def test_a_gray_picture_takes_one_pass_of_a_gray_model_and_stays_gray(load: Load) -> None:
    model = load("SwinIR gray")
    picture = np.random.default_rng(0).integers(0, 256, (20, 16), dtype=np.uint8)
    calls: list[tuple[int, ...]] = []
    call = model._call

    def spy(network: nn.Module, lr: Tensor) -> Tensor:
        calls.append(tuple(lr.shape))
        return call(network, lr)

    model._call = spy
    out = savl.upscale(picture, model=model, device="cpu")
    assert calls == [(1, 1, 20, 16)]
    assert out.shape == (40, 32)
    with torch.no_grad():
        expected = model(torch.from_numpy(picture / 255.0).float()[None, None])[0, 0]
    assert np.abs(out - (255 * expected).round().numpy()).max() <= 1


@pytest.mark.parametrize("name", ["Compact x3", "SwinIR gray", "NAFNet"])
@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_bands_and_sample_types_are_kept(name: str, bands: int, dtype: Any, load: Load) -> None:
    model = load(name)
    peak = 1.0 if dtype is np.float32 else np.iinfo(dtype).max
    picture = (np.random.default_rng(0).random((9, 7, bands)) * peak).astype(dtype)
    out = savl.upscale(picture, model=model, device="cpu")
    assert out.shape == (9 * model.scale, 7 * model.scale, bands)
    assert out.dtype == dtype
    if bands in (2, 4) and model.scale == 1:
        assert np.array_equal(out[..., -1], picture[..., -1]), "alpha is resized bicubically, here to its own size"


def test_areas_of_one_colour_keep_it_in_super_resolution_but_not_in_restoration(load: Load) -> None:
    white = np.full((12, 12, 3), 255, np.uint8)
    assert bool((savl.upscale(white, model=load("ESRGAN"), device="cpu") == 255).all())
    assert not bool((savl.upscale(white, model=load("NAFNet"), device="cpu") == 255).all())


def test_strength_blends_with_bicubic_interpolation(load: Load, image: Tensor) -> None:
    upscaler = savl.Upscaler(load("Compact x3"), tile=24, device="cpu")
    full, half, none = (upscaler(image, strength=strength).sr for strength in ("auto", 0.5, 0.0))
    bicubic = bicubic_upscale(image, 3)
    torch.testing.assert_close(half, (bicubic + 0.5 * (full - bicubic)).clamp(0, 1), atol=1e-4, rtol=0)
    torch.testing.assert_close(none, bicubic.clamp(0, 1))


@pytest.mark.parametrize("name", ["ESRGAN", "SwinIR", "DAT"])
def test_bfloat16_stays_close_to_float32(name: str, load: Load, image: Tensor) -> None:
    wide = savl.Upscaler(load(name), device="cpu")(image).sr
    narrow = savl.Upscaler(load(name), device="cpu", dtype=torch.bfloat16)(image).sr
    assert narrow.dtype == torch.float32
    assert (narrow - wide).square().mean().sqrt() < 0.02
    assert not torch.equal(narrow, wide)


def test_bfloat16_is_refused_for_architectures_that_do_not_support_it(spandrel: ModuleType, load: Load) -> None:
    model = load("Compact")
    descriptor = spandrel.ImageModelDescriptor(
        model.model, model.model.state_dict(), spandrel.MAIN_REGISTRY["Compact"].architecture, "SR", [], False, False,
        4, 3, 3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="dtype must be float32 for this model, got bfloat16"):
        savl.Upscaler(descriptor, dtype=torch.bfloat16)
    savl.Upscaler(descriptor, dtype=torch.float32)


def test_a_descriptor_of_spandrel_is_a_model(
    spandrel: ModuleType, foreign_model: Callable[[str], nn.Module], image: Tensor
) -> None:
    descriptor = spandrel.ModelLoader().load_from_state_dict(foreign_model("Compact x3").state_dict())
    expected = descriptor(image)
    out = savl.Upscaler(descriptor, tile=0, device="cpu")(image)
    torch.testing.assert_close(out.sr, expected)
    array = savl.upscale(image[0], model=descriptor, tile=0, device="cpu")
    torch.testing.assert_close(torch.from_numpy(array).permute(2, 0, 1)[None], expected)


def test_the_given_model_is_not_modified(load: Load, image: Tensor) -> None:
    model = load("SwinIR").double().train()
    before = [type(module) for module in model.modules()]
    savl.Upscaler(model, device="cpu")(image)
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert [type(module) for module in model.modules()] == before


# Memory


@pytest.mark.parametrize("name", ["ESRGAN", "SwinIR gray"])
def test_the_measured_memory_is_at_least_that_of_the_largest_features(name: str, load: Load) -> None:
    model = load(name)
    largest = 0

    def hook(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, 4 * output.numel())

    hooks = [module.register_forward_hook(hook) for module in model.model.modules()]
    with torch.no_grad():
        model(torch.rand(1, model.image_channels, SIDE, SIDE))
    for handle in hooks:
        handle.remove()
    measured = measured_bytes_per_pixel(model) * SIDE**2
    assert 2 * largest <= measured <= 100 * largest


def test_tensors_that_were_freed_do_not_count() -> None:
    class Chain(Zoom):
        def reconstruct(self, lr: Tensor, field: object, strength: float | Tensor | None = None) -> Tensor:
            for _ in range(20):
                lr = lr + 1.0
            return super().reconstruct(lr, field)

    # At most three images exist at the same time: one of LR size, one of 2 times and one of 4 times its pixels.
    assert measured_bytes_per_pixel(Chain()) == pytest.approx(1.5 * 4 * 3 * (2 + 4), rel=0.2)


def test_small_images_are_upscaled_without_measuring_memory(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upscalers, "measured_bytes_per_pixel", lambda network: pytest.fail("measured"))
    savl.Upscaler(load("Compact x3"), device="cpu")(torch.rand(1, 3, LEAST_MEASURED_TILE, 20))


@pytest.mark.parametrize("whole", [False, True])
def test_the_default_tile_follows_the_measured_memory(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Network(Zoom):
        @property
        def prefers_whole_images(self) -> bool:
            return whole

    available = 2**30
    monkeypatch.setattr("savl.inference.tiling.available_bytes", lambda: available)
    monkeypatch.setattr("savl.inference.tiling.CPU_BUDGET", 2**26)
    monkeypatch.setattr("savl.inference.tiling.PAGED_CPU_BUDGET", 2**26)
    monkeypatch.setattr(upscalers, "measured_bytes_per_pixel", lambda network: 4096)
    network = Network()
    savl.Upscaler(network, device="cpu")(torch.rand(1, 3, 200, 210))
    # 64 MiB hold 128 × 128 pixels; a network that prefers whole images may take half of the free memory.
    assert network.seen == [(1, 3, 200, 210)] if whole else max(shape[-1] for shape in network.seen) <= 128
    available = 2**28
    network.seen.clear()
    savl.Upscaler(network, device="cpu")(torch.rand(1, 3, 200, 210))
    assert max(shape[-1] for shape in network.seen) <= 128


def test_out_of_memory_halves_the_tile(load: Load, image: Tensor) -> None:
    model = load("Compact x3")
    untiled = savl.Upscaler(model, tile=0, device="cpu")(image).sr
    call, refused = model._call, []

    def small_machine(network: nn.Module, lr: Tensor) -> Tensor:
        if lr.shape[-1] * lr.shape[-2] > 1600:
            refused.append(lr.shape)
            raise MemoryError
        return call(network, lr)

    model._call = small_machine
    out = savl.Upscaler(model, tile=40, tile_pad=8, device="cpu")(image)
    assert len(refused) in (1, 2)
    torch.testing.assert_close(out.sr, untiled, atol=1e-5, rtol=0)


# Acceleration


@pytest.fixture
def accelerations(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Replace `savl.accelerate.accelerate` by a function that makes the output gray; return its calls."""
    calls: list[nn.Module] = []

    def accelerate(model: Any) -> str:
        calls.append(model)
        call = model._call
        model._call = lambda network, lr: 0 * call(network, lr) + 0.25
        return "report"

    monkeypatch.setattr(networks, "accelerate", accelerate)
    monkeypatch.setattr(upscalers, "uses_fused_attention", lambda device: fused)
    fused = True
    return calls


def test_models_are_accelerated_once_and_in_a_copy_that_shares_their_weights(
    load: Load, image: Tensor, accelerations: list[nn.Module]
) -> None:
    model = load("Compact x3")
    upscaler = savl.Upscaler(model, tile=0, device="cpu")
    assert upscaler.acceleration is None
    with torch.no_grad():
        expected = model(image)
    torch.testing.assert_close(upscaler(image).sr, torch.full_like(expected, 0.25))
    upscaler(image)
    assert upscaler.acceleration == "report"
    assert len(accelerations) == 1
    assert accelerations[0] is not model
    theirs = [parameter.data_ptr() for parameter in accelerations[0].parameters()]
    assert theirs == [parameter.data_ptr() for parameter in model.parameters()]
    with torch.no_grad():
        assert torch.equal(model(image), expected)


def test_with_eager_kernels_models_are_used_as_they_are(
    load: Load, image: Tensor, accelerations: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upscalers, "uses_fused_attention", networks.uses_fused_attention)
    model = load("Compact x3")
    upscaler = savl.Upscaler(model, tile=0, device="cpu")
    with savl.use_fused_kernels(False), torch.no_grad():
        assert torch.equal(upscaler(image).sr, model(image))
    assert not accelerations
    assert upscaler.acceleration is None


def test_networks_of_savl_are_not_accelerated(
    small_config: Callable[..., savl.SAVLConfig], accelerations: list[nn.Module]
) -> None:
    savl.Upscaler(savl.build(small_config()).eval(), device="cpu")(torch.rand(1, 3, 8, 8))
    assert not accelerations


def test_a_compiled_model_runs_its_compiled_code(load: Load, image: Tensor) -> None:
    ran: list[int] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            ran.append(1)
            return graph.forward(*arguments)

        return run

    torch._dynamo.reset()
    model = load("Compact x3")
    with torch.no_grad():
        expected = model(image)
    for compiled in (torch.compile(model, backend=backend), model):
        if compiled is model:
            model.compile(backend=backend)
        ran.clear()
        out = savl.Upscaler(compiled, tile=0, device="cpu")(image)
        assert ran
        torch.testing.assert_close(out.sr, expected)
    torch._dynamo.reset()


def test_a_path_is_a_model(foreign_model: Callable[[str], nn.Module], load: Load, tmp_path: Path) -> None:
    save_file(foreign_model("Compact x8").state_dict(), tmp_path / "model.safetensors")
    out = savl.upscale(np.zeros((3, 4, 3), np.uint8), model=tmp_path / "model.safetensors", device="cpu")
    assert out.shape == (24, 32, 3)
