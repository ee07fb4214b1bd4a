"""The upscaler with CUDA graphs, tested on the CPU with a substitute that computes again and fails if it is stale."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import savl
from savl.inference.device import with_device_index
from savl.inference.graphs import WARM_UPS, GraphCache
from savl.network import SAVL, DegradationField
from savl.ops.scopes import current_settings


class Recorder:
    """Substitute for CUDA graphs: settings must be the same at recording and replay, and one replay runs at a time."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.recorded: list[int] = []
        """Pixels of each output, in the order of recording."""
        self.replayed = self.released = 0
        self._busy = threading.Lock()

    def record(self, function: Callable[[], Tensor], warm_ups: int = WARM_UPS) -> tuple[Callable[[], object], Tensor]:
        output = function().clone()
        settings, pool = current_settings(), self.released
        self.recorded.append(output[0, 0].numel())

        def replay() -> None:
            assert self._busy.acquire(blocking=False), "two replays at a time"
            assert current_settings() == settings, "stale: other kernels are in force"
            assert pool == self.released, "its memory was released"
            output.copy_(function())
            self.replayed += 1
            self._busy.release()

        output.fill_(float("nan"))  # a capture computes nothing
        return replay, output

    def release(self) -> None:
        self.released += 1


def recording(model: SAVL, limit: int = 16, **settings: Any) -> tuple[savl.Upscaler, Recorder]:
    upscaler = savl.Upscaler(model, device="cpu", **settings)
    recorder = Recorder()
    upscaler.graphs = GraphCache(recorder, limit)
    return upscaler, recorder


@pytest.fixture
def make_model(small_config: Callable[..., Any]) -> Callable[..., SAVL]:
    def make(**changes: Any) -> SAVL:
        torch.manual_seed(3)
        model = SAVL(small_config(depths=(1,), upsampler="pixelshuffledirect", **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture
def image() -> Tensor:
    return torch.rand(1, 3, 37, 53, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    with savl.use_fused_kernels(False):
        yield


@pytest.mark.parametrize("code", ["variational", "deterministic", "none"])
@pytest.mark.parametrize("tile", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_tiles_give_the_same_bits(
    make_model: Callable[..., SAVL], image: Tensor, code: str, tile: int, dtype: torch.dtype
) -> None:
    model = make_model(degradation_code=code)
    plain = savl.Upscaler(model, tile=tile, tile_pad=8, device="cpu", dtype=dtype)
    upscaler, recorder = recording(model, tile=tile, tile_pad=8, dtype=dtype)
    for lr in (image, 1 - image):
        expected, out = plain(lr), upscaler(lr)
        assert torch.equal(out.sr, expected.sr)
        assert torch.equal(out.severity, expected.severity)
    assert recorder.replayed == 2 * (12 if tile else 1)


@pytest.mark.parametrize("code", ["variational", "deterministic"])
def test_every_strength_gives_the_same_bits_and_all_of_them_share_graphs(
    make_model: Callable[..., SAVL], image: Tensor, code: str
) -> None:
    model = make_model(degradation_code=code, restoration_strength=True)
    plain = savl.Upscaler(model, tile=24, tile_pad=8, device="cpu")
    upscaler, recorder = recording(model, limit=64, tile=24, tile_pad=8)
    recorded = []
    for strength in ("auto", 0.3, 0.7, "auto", 1.0, 0.0, 0.3):
        expected, out = plain(image, strength=strength), upscaler(image, strength=strength)
        assert torch.equal(out.sr, expected.sr), strength
        assert torch.equal(out.strength, expected.strength), strength
        recorded.append(len(recorder.recorded))
    # Tiles are recorded for "auto", which may read a wider border, for numbers, and for 1, which blends nothing.
    assert recorded[2] == recorded[1], "a second number needs no new graphs"
    assert recorded[4] > recorded[3]
    assert recorded[5:] == [recorded[4]] * 2, "0 needs no graph"


@pytest.mark.parametrize(
    "change",
    [lambda lr: lr.double(), lambda lr: lr.repeat(2, 1, 1, 1), lambda lr: lr.to(memory_format=torch.channels_last)],
    ids=["float64", "batch", "channels last"],
)
def test_images_of_all_kinds_are_bit_identical(
    make_model: Callable[..., SAVL], image: Tensor, change: Callable[[Tensor], Tensor]
) -> None:
    model, lr = make_model(), change(image)
    upscaler, _ = recording(model, tile=24, tile_pad=8)
    assert torch.equal(upscaler(lr).sr, savl.Upscaler(model, tile=24, tile_pad=8, device="cpu")(lr).sr)


def test_a_shape_is_recorded_once_for_all_tiles_and_images(make_model: Callable[..., SAVL]) -> None:
    upscaler, recorder = recording(make_model(), tile=16, tile_pad=8)
    upscaler(torch.rand(1, 3, 48, 64))
    assert 1 < len(recorder.recorded) <= 9
    assert recorder.replayed == 3 * 4
    recorded = list(recorder.recorded)
    upscaler(torch.rand(1, 3, 48, 64))
    assert recorder.recorded == recorded


def test_the_largest_tile_is_recorded_first_so_that_the_others_fit_into_its_memory(
    make_model: Callable[..., SAVL],
) -> None:
    upscaler, recorder = recording(make_model(), tile=16, tile_pad=8)
    upscaler(torch.rand(1, 3, 48, 64))
    assert recorder.recorded[0] == max(recorder.recorded)
    assert min(recorder.recorded) < max(recorder.recorded), "all tiles were of one size, the test proves nothing"
    assert recorder.released == 0


def test_no_more_shapes_are_kept_than_the_limit(make_model: Callable[..., SAVL], image: Tensor) -> None:
    model = make_model()
    upscaler, recorder = recording(model, limit=2, tile=16, tile_pad=8)
    out = upscaler(image)
    assert upscaler.graphs is not None
    assert len(upscaler.graphs) == 2
    assert len(recorder.recorded) > 2
    assert torch.equal(out.sr, savl.Upscaler(model, tile=16, tile_pad=8, device="cpu")(image).sr)


def test_other_kernels_are_recorded_anew_and_the_first_ones_still_serve(
    make_model: Callable[..., SAVL], image: Tensor
) -> None:
    upscaler, recorder = recording(make_model(), tile=0)
    first = upscaler(image).sr
    with savl.use_fused_kernels(True):
        upscaler(image)
    assert len(recorder.recorded) == 2
    assert torch.equal(upscaler(image).sr, first)
    assert len(recorder.recorded) == 2


def test_kernels_of_one_model_are_recorded_anew(make_model: Callable[..., SAVL], image: Tensor) -> None:
    upscaler, recorder = recording(make_model(), tile=0)
    upscaler(image)
    savl.use_fused_kernels(True, model=upscaler.model)
    upscaler(image)
    assert len(recorder.recorded) == 2


def test_weights_changed_in_place_need_no_new_recording_and_other_tensors_do(
    make_model: Callable[..., SAVL], image: Tensor
) -> None:
    model = make_model()
    upscaler, recorder = recording(model, tile=0)
    before = upscaler(image).sr
    with torch.no_grad():
        model.conv_last.bias.add_(0.5)
    after = upscaler(image).sr
    assert len(recorder.recorded) == 1
    assert not torch.equal(after, before)
    model.load_state_dict({name: 0.9 * tensor for name, tensor in model.state_dict().items()}, assign=True)
    assert torch.equal(upscaler(image).sr, savl.Upscaler(model, tile=0, device="cpu")(image).sr)
    assert len(recorder.recorded) == 2


def test_out_of_memory_in_a_recording_takes_smaller_tiles_now_and_in_later_images(
    make_model: Callable[..., SAVL], image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    upscaler, recorder = recording(model, tile=40, tile_pad=8)
    refused: list[int] = []
    original = SAVL.reconstruct

    def small_machine(self: SAVL, lr: Tensor, field: DegradationField | None) -> Tensor:
        if lr.shape[-1] * lr.shape[-2] > 40 * 40:
            refused.append(lr.shape[-1] * lr.shape[-2])
            raise MemoryError
        return original(self, lr, field)

    monkeypatch.setattr(SAVL, "reconstruct", small_machine)
    first = upscaler(image).sr
    assert refused, "the tile was never too large, the test proves nothing"
    assert recorder.released > 0
    monkeypatch.setattr(SAVL, "reconstruct", original)
    whole = savl.Upscaler(model, tile=0, device="cpu")(image).sr
    assert (first - whole).abs().max() < 2 / 255
    monkeypatch.setattr(SAVL, "reconstruct", small_machine)
    refused.clear()
    second = upscaler(image).sr
    assert refused == [], "a size known to fail was tried again"
    assert (second - whole).abs().max() < 2 / 255


def test_out_of_memory_outside_of_recordings_frees_their_memory(
    make_model: Callable[..., SAVL], image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    upscaler, recorder = recording(make_model(), tile=24, tile_pad=8)
    expected = upscaler(image)
    assert recorder.released == 0
    original = SAVL.estimate
    failures = [MemoryError()]

    def fail_once(self: SAVL, lr: Tensor, seed: int | None = None) -> DegradationField | None:
        if failures:
            raise failures.pop()
        return original(self, lr, seed)

    monkeypatch.setattr(SAVL, "estimate", fail_once)
    out = upscaler(image)
    assert recorder.released > 0
    torch.testing.assert_close(out.severity, expected.severity, atol=1e-4, rtol=0)


def test_with_graphs_the_first_default_tile_is_kept(
    make_model: Callable[..., SAVL], image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = iter([32, 48, 64])
    monkeypatch.setattr("savl.inference.upscaler.default_tile", lambda *_, **__: next(sides))
    upscaler, recorder = recording(make_model(), tile_pad=4)
    upscaler(image)
    recorded = len(recorder.recorded)
    assert recorded > 1
    upscaler(image)
    assert len(recorder.recorded) == recorded
    upscaler(image.repeat(2, 1, 1, 1))
    assert next(sides) == 64, "another batch has a tile of its own"


def test_threads_may_share_recordings(make_model: Callable[..., SAVL], image: Tensor) -> None:
    model = make_model()
    images = [image * level for level in torch.linspace(0.3, 1, 6)]
    plain = savl.Upscaler(model, tile=24, tile_pad=4, device="cpu")
    expected = [plain(lr).sr for lr in images]
    upscaler, _ = recording(model, tile=24, tile_pad=4)
    # A `with` block applies to its own thread only; worker threads would use the kernels of the process.
    savl.use_fused_kernels(False, model=model)
    with ThreadPoolExecutor(3) as pool:
        for out, sr in zip(pool.map(upscaler, images), expected, strict=True):
            assert torch.equal(out.sr, sr)


def test_progress_counts_recorded_tiles_in_order(make_model: Callable[..., SAVL], image: Tensor) -> None:
    calls: list[tuple[int, int]] = []
    upscaler, _ = recording(make_model(), tile=16)
    upscaler(image, on_tile=lambda done, total: calls.append((done, total)))
    assert calls == [(n, 12) for n in range(1, 13)]


def test_one_recording_serves_inside_and_outside_of_inference_mode(
    make_model: Callable[..., SAVL], image: Tensor
) -> None:
    upscaler, recorder = recording(make_model(), tile=0)
    with torch.inference_mode():
        first = upscaler(image).sr.clone()
    assert torch.equal(upscaler(image).sr, first)
    assert len(recorder.recorded) == 1


def test_autocast_around_the_call_changes_nothing(make_model: Callable[..., SAVL], image: Tensor) -> None:
    model = make_model()
    upscaler, recorder = recording(model, tile=0, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        model(image)  # cast weights are cached while this block lasts
        upscaler(image)
        with torch.no_grad():
            model.conv_last.bias.add_(0.5)
            model.conv_last.weight.mul_(2)
        changed = upscaler(image).sr
    assert len(recorder.recorded) == 1
    assert torch.equal(changed, savl.Upscaler(model, tile=0, device="cpu", dtype=torch.bfloat16)(image).sr)


@pytest.mark.parametrize(
    ("device", "kind"), [("cpu", "device 'cpu'"), ("mps", "device 'mps'"), (torch.device("meta"), "device 'meta'")]
)
def test_a_device_that_is_not_cuda_is_refused_by_name(
    make_model: Callable[..., SAVL], device: str | torch.device, kind: str
) -> None:
    with pytest.raises(ValueError, match=rf"cuda_graph=True needs a CUDA device \('cuda', .* got {kind}"):
        savl.Upscaler(make_model(), device=device, cuda_graph=True)


def test_a_torch_that_finds_no_cuda_is_refused(
    make_model: Callable[..., SAVL], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"cuda_graph=True needs a CUDA device, torch .* finds none"):
        savl.Upscaler(make_model(), device="cuda", cuda_graph=True)


@pytest.mark.parametrize("value", [1, 0.0, "yes"])
def test_cuda_graph_must_be_a_bool_or_none(make_model: Callable[..., SAVL], value: object) -> None:
    with pytest.raises(TypeError, match="cuda_graph must be a bool or None, got"):
        savl.Upscaler(make_model(), cuda_graph=value)  # type: ignore[arg-type]


def test_without_the_argument_nothing_is_recorded_on_a_cpu(make_model: Callable[..., SAVL]) -> None:
    assert savl.Upscaler(make_model(), device="cpu").graphs is None


def test_cuda_is_the_device_that_is_current_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert with_device_index(torch.device("cuda")) == torch.device("cuda", 1)
    assert with_device_index(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert with_device_index(torch.device("cpu")) == torch.device("cpu")


def test_calls_make_the_device_of_the_upscaler_current(
    make_model: Callable[..., SAVL], image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Current:
        now: torch.device | None = None

        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            Current.now = self.device

        def __exit__(self, *error: object) -> None:
            Current.now = None

    monkeypatch.setattr(torch.cuda, "device", Current)
    upscaler = savl.Upscaler(make_model(), tile=24, device="cpu")
    upscaler.device = torch.device("cuda", 1)
    seen: list[torch.device | None] = []

    def stop(self: object) -> None:
        seen.append(Current.now)
        raise KeyboardInterrupt  # beyond this a GPU is needed

    monkeypatch.setattr("savl.inference.run.Run.measure_maps", stop)
    with pytest.raises(KeyboardInterrupt):
        upscaler(image)
    assert seen == [torch.device("cuda", 1)]
    assert Current.now is None
