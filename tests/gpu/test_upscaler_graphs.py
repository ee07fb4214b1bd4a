"""Tests of the upscaler with CUDA graphs on a GPU: results, threads, settings and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import savl
from savl.network import SAVL, DegradationField
from savl.ops.library import TRITON
from savl.ops.op import why_unavailable

WORKSPACES = 160 << 20
"""Maximum number of bytes that cuBLAS keeps for the streams of one upscaler."""


@pytest.fixture
def model(small_config: Callable[..., Any]) -> SAVL:
    model = SAVL(small_config(depths=(1,), upsampler="pixelshuffledirect"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval().cuda()


@pytest.fixture
def image() -> Tensor:
    return torch.rand(1, 3, 45, 71, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    with savl.use_fused_kernels(False):
        yield


def assert_same_bits(model: SAVL, images: list[Tensor], **settings: Any) -> savl.Upscaler:
    plain = savl.Upscaler(model, device="cuda", cuda_graph=False, **settings)
    upscaler = savl.Upscaler(model, device="cuda", cuda_graph=True, **settings)
    for lr in images:
        expected, out = plain(lr), upscaler(lr)
        assert bool(torch.isfinite(out.sr).all())
        assert torch.equal(out.sr, expected.sr)
        assert torch.equal(out.severity, expected.severity)
    assert upscaler.graphs is not None
    assert len(upscaler.graphs) > 0
    return upscaler


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [0, 16])
def test_replayed_tiles_are_bit_identical(
    model: SAVL, image: Tensor, fused: bool, dtype: torch.dtype, tile: int
) -> None:
    with savl.use_fused_kernels(fused):
        assert_same_bits(model, [image, 1 - image, image], tile=tile, tile_pad=8, dtype=dtype)


@pytest.mark.parametrize("fused", [False, True])
def test_tiles_of_one_shape_are_replayed_by_default_and_bit_identical(model: SAVL, fused: bool) -> None:
    images = list(torch.rand(2, 1, 3, 96, 112, generator=torch.Generator().manual_seed(0)))
    plain = savl.Upscaler(model, tile=16, tile_pad=8, device="cuda", cuda_graph=False)
    upscaler = savl.Upscaler(model, tile=16, tile_pad=8, device="cuda")
    with savl.use_fused_kernels(fused):
        for lr in images:
            assert torch.equal(upscaler(lr).sr, plain(lr).sr)
    assert upscaler.graphs is not None
    assert len(upscaler.graphs) == 5, upscaler.graphs_report


def test_a_network_that_cannot_be_captured_is_computed_without_graphs(
    model: SAVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SAVL.reconstruct

    def waits(self: SAVL, lr: Tensor, field: DegradationField | None) -> Tensor:
        sr = original(self, lr, field)
        return sr + 0 * float(sr.sum())  # asks the GPU for a number

    lr = torch.rand(1, 3, 96, 112)
    expected = savl.Upscaler(model, tile=16, tile_pad=8, device="cuda", cuda_graph=False)(lr).sr
    monkeypatch.setattr(SAVL, "reconstruct", waits)
    upscaler = savl.Upscaler(model, tile=16, tile_pad=8, device="cuda")
    assert torch.equal(upscaler(lr).sr, expected)
    assert "cannot be captured" in upscaler.graphs_report


@pytest.mark.parametrize("strength", ["auto", 0.5])
def test_a_strength_is_replayed_bit_by_bit(small_config: Callable[..., Any], image: Tensor, strength: Any) -> None:
    config = small_config(depths=(1,), upsampler="pixelshuffledirect", restoration_strength=True)
    model = SAVL(config).eval().cuda()
    assert_same_bits(model, [image, 1 - image], tile=24, tile_pad=8, strength=strength)


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_images_of_all_kinds_are_bit_identical(model: SAVL, image: Tensor, place: str) -> None:
    image = image.to(place)
    kinds = [image.double(), image.repeat(2, 1, 1, 1), image.to(memory_format=torch.channels_last)]
    assert_same_bits(model, kinds, tile=24, tile_pad=8)


@pytest.mark.parametrize("fused", [False, True])
def test_the_shipped_network_is_bit_identical(fused: bool) -> None:
    images = list(torch.rand(3, 1, 3, 150, 200, generator=torch.Generator().manual_seed(1)))
    with savl.use_fused_kernels(fused):
        assert_same_bits(savl.load("savl-tiny").cuda(), images, tile=64, dtype=torch.bfloat16)


def test_the_network_runs_no_python_once_its_shapes_are_captured(
    model: SAVL, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    upscaler = savl.Upscaler(model, tile=16, tile_pad=8, device="cuda", cuda_graph=True)
    expected = upscaler(image).sr

    def refuse(self: SAVL, lr: Tensor, field: DegradationField | None) -> Tensor:
        raise AssertionError("not replayed")

    monkeypatch.setattr(SAVL, "reconstruct", refuse)
    assert torch.equal(upscaler(image).sr, expected)


@pytest.mark.parametrize("own_streams", [False, True])
def test_threads_may_share_an_upscaler_with_graphs(model: SAVL, image: Tensor, own_streams: bool) -> None:
    images = [image * level for level in torch.linspace(0.3, 1, 24)]
    savl.use_fused_kernels(False, model=model)
    plain = savl.Upscaler(model, tile=24, tile_pad=4, device="cuda", cuda_graph=False)
    expected = [plain(lr).sr for lr in images]
    upscaler = savl.Upscaler(model, tile=24, tile_pad=4, device="cuda", cuda_graph=True)

    def upscale(lr: Tensor) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()) if own_streams else nullcontext():
            return upscaler(lr).sr

    with ThreadPoolExecutor(2) as pool:
        for sr, wanted in zip(pool.map(upscale, images), expected, strict=True):
            assert torch.equal(sr, wanted)


def test_other_work_on_the_gpu_does_not_disturb_a_capture(model: SAVL, image: Tensor) -> None:
    savl.use_fused_kernels(False, model=model)
    plain = savl.Upscaler(model, tile=16, tile_pad=8, device="cuda", cuda_graph=False)
    expected = plain(image).sr
    with ThreadPoolExecutor(1) as pool:
        others = [pool.submit(plain, image) for _ in range(8)]
        captured = savl.Upscaler(model, tile=16, tile_pad=8, device="cuda", cuda_graph=True)(image).sr
        assert torch.equal(captured, expected)
        for other in others:
            assert torch.equal(other.result().sr, expected)


def test_a_change_of_the_kernel_setting_takes_effect(model: SAVL, image: Tensor) -> None:
    plain = savl.Upscaler(model, tile=24, tile_pad=8, device="cuda", cuda_graph=False)
    upscaler = savl.Upscaler(model, tile=24, tile_pad=8, device="cuda", cuda_graph=True)
    results = []
    for fused in (False, True, False):
        with savl.use_fused_kernels(fused):
            results.append(upscaler(image).sr)
            assert torch.equal(results[-1], plain(image).sr)
    assert torch.equal(results[2], results[0])
    if why_unavailable("window_attention", TRITON) is None:
        assert not torch.equal(results[1], results[0]), "all kernels give the same bits, the test proves nothing"


def test_weights_changed_in_place_and_replaced_tensors_take_effect(model: SAVL, image: Tensor) -> None:
    plain = savl.Upscaler(model, tile=0, device="cuda", cuda_graph=False)
    upscaler = savl.Upscaler(model, tile=0, device="cuda", cuda_graph=True)
    assert upscaler.model is model, "a copy would not see the changes"
    before = upscaler(image).sr
    with torch.no_grad():
        model.conv_last.bias.add_(0.5)
    after = upscaler(image).sr
    assert not torch.equal(after, before)
    assert torch.equal(after, plain(image).sr)
    model.load_state_dict({name: 0.9 * tensor for name, tensor in model.state_dict().items()}, assign=True)
    assert torch.equal(upscaler(image).sr, plain(image).sr)


def reserved() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def test_memory_does_not_grow_with_the_number_of_shapes() -> None:
    model = savl.load("savl-tiny").cuda()
    sizes = [*range(128, 256, 8), *range(256, 120, -8)]
    base = reserved()
    torch.cuda.reset_peak_memory_stats()
    savl.Upscaler(model, tile=0, device="cuda", cuda_graph=False)(torch.rand(1, 3, 256, 256))
    once = torch.cuda.max_memory_reserved() - base
    upscaler = savl.Upscaler(model, tile=0, device="cuda", cuda_graph=True)
    for side in sizes:
        upscaler(torch.rand(1, 3, side, side))
    assert reserved() - base <= 2 * once + WORKSPACES
    assert upscaler.graphs is not None
    assert len(upscaler.graphs) > 1
    upscaler.graphs.clear()
    assert reserved() - base <= WORKSPACES, "the graphs are gone, their memory is not"


def test_smaller_tiles_are_used_after_running_out_of_memory() -> None:
    model = savl.load("savl-tiny").cuda()
    lr = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(2))
    base = reserved()
    torch.cuda.reset_peak_memory_stats()
    expected = savl.Upscaler(model, tile=0, device="cuda", cuda_graph=False)(lr).sr
    needed = torch.cuda.max_memory_reserved() - base
    upscaler = savl.Upscaler(model, tile=256, device="cuda", cuda_graph=True)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((reserved() + WORKSPACES + 0.6 * needed) / total)
    try:
        out = upscaler(lr).sr
        again = upscaler(lr).sr
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert upscaler._largest_cores, "memory never ran out, the test proves nothing"
    assert (out - expected).square().mean() < 1e-5  # 50 dB
    assert (again - expected).square().mean() < 1e-5


def test_a_failed_capture_raises_and_leaves_the_gpu_usable(
    model: SAVL, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SAVL.reconstruct
    upscaler = savl.Upscaler(model, tile=0, device="cuda", cuda_graph=True)

    def waits(self: SAVL, lr: Tensor, field: DegradationField | None) -> Tensor:
        sr = original(self, lr, field)
        return sr + 0 * float(sr.sum())  # asks the GPU for a number

    with monkeypatch.context() as patch:
        patch.setattr(SAVL, "reconstruct", waits)
        with pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph; use cuda_graph=False"):
            upscaler(image)
    assert torch.equal(upscaler(image).sr, savl.Upscaler(model, tile=0, device="cuda", cuda_graph=False)(image).sr)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds fewer than two CUDA devices")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_only_the_device_of_the_upscaler_is_used(model: SAVL, image: Tensor, cuda_graph: bool) -> None:
    expected = savl.Upscaler(model, tile=24, tile_pad=8, device="cuda:0", cuda_graph=False)(image).sr
    second = savl.Upscaler(model, tile=24, tile_pad=8, device="cuda:1", cuda_graph=cuda_graph)
    with torch.cuda.device(0), savl.use_fused_kernels(True):
        before = torch.cuda.memory_stats(0)["allocation.all.allocated"]
        sr = second(image).sr
        assert torch.cuda.memory_stats(0)["allocation.all.allocated"] == before
        assert torch.cuda.current_device() == 0
    assert torch.cuda.memory_stats(1)["allocation.all.allocated"] > 0
    assert (sr - expected).abs().max() < 1e-3
