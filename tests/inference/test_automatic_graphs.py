"""CUDA graphs that an upscaler uses by itself: for which tiles, and what happens where they cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import savl
from savl.inference.automatic_graphs import AutomaticGraphs
from savl.inference.graphs import WARM_UPS, GraphCache
from savl.network import SAVL, DegradationField
from savl.network.upscaling import UpscalingNetwork

OUT_OF_MEMORY = "CUDA out of memory"


class Recorder:
    """Substitute for CUDA graphs that replays by computing again, and may fail to record."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.device = torch.device("cpu")
        self.failure = failure
        self.attempts = self.released = 0
        self.recorded: list[int] = []
        """Numbers in each result, in the order of recording."""
        self.replayed: Counter[int] = Counter()
        """How often a result of so many numbers was replayed."""

    def record(self, function: Callable[[], Tensor], warm_ups: int = WARM_UPS) -> tuple[Callable[[], object], Tensor]:
        assert warm_ups == 0, "a pass that nobody needs"
        self.attempts += 1
        if self.failure is not None:
            raise self.failure
        output = function().clone()
        size, pool = output.numel(), self.released
        self.recorded.append(size)

        def replay() -> None:
            assert pool == self.released, "its memory was released"
            output.copy_(function())
            self.replayed[size] += 1

        output.fill_(float("nan"))  # a capture computes nothing
        return replay, output

    def release(self) -> None:
        self.released += 1


class Zoom(UpscalingNetwork):
    """A network that a user wrote: it repeats pixels, and calls a function at each pass."""

    def __init__(self, at_each_pass: Callable[[Tensor], float] = lambda lr: 0.0) -> None:
        super().__init__()
        self.at_each_pass = at_each_pass

    @property
    def scale(self) -> int:
        return 2

    def reconstruct(self, lr: Tensor, field: object, strength: float | Tensor | None = None) -> Tensor:
        return (lr.repeat_interleave(2, -1).repeat_interleave(2, -2) - self.at_each_pass(lr)).clamp(0, 1)


def automatic(model: nn.Module, failure: Exception | None = None, **settings: Any) -> tuple[savl.Upscaler, Recorder]:
    """Return an upscaler on the CPU that records by itself, as one on CUDA does."""
    upscaler = savl.Upscaler(model, device="cpu", **settings)
    recorder = Recorder(failure)
    upscaler.graphs = GraphCache(recorder)
    upscaler.automatic_graphs = AutomaticGraphs(trusted=isinstance(upscaler.model, SAVL))
    return upscaler, recorder


@pytest.fixture
def model(small_config: Callable[..., Any]) -> SAVL:
    torch.manual_seed(3)
    model = SAVL(small_config(depths=(1,), upsampler="pixelshuffledirect"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def image() -> Tensor:
    """An image of 4×5 tiles of 16 pixels."""
    return torch.rand(1, 3, 64, 80, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    with savl.use_fused_kernels(False):
        yield


def test_shapes_that_occur_several_times_are_recorded_at_their_second_tile(model: SAVL, image: Tensor) -> None:
    plain = savl.Upscaler(model, tile=16, tile_pad=8, device="cpu")(image)
    upscaler, recorder = automatic(model, tile=16, tile_pad=8)
    out = upscaler(image)
    assert torch.equal(out.sr, plain.sr)
    assert torch.equal(out.severity, plain.severity)
    # The edges and the interior; the four corners occur once.
    assert len(recorder.recorded) == 5
    assert sum(recorder.replayed.values()) == 2 * (2 - 1) + 2 * (3 - 1) + (2 * 3 - 1)
    assert recorder.recorded[0] == max(recorder.recorded), "the largest is recorded first"
    assert recorder.released == 0, "the others fit into its memory"
    assert upscaler.graphs_report.endswith("several times in an image; 5 shapes recorded")


def test_further_images_replay_what_is_recorded(model: SAVL, image: Tensor) -> None:
    upscaler, recorder = automatic(model, tile=16, tile_pad=8)
    upscaler(image)
    recorder.replayed.clear()
    other = 1 - image
    assert torch.equal(upscaler(other).sr, savl.Upscaler(model, tile=16, tile_pad=8, device="cpu")(other).sr)
    assert len(recorder.recorded) == 5
    assert sum(recorder.replayed.values()) == 4 * 5 - 4


@pytest.mark.parametrize("tile", [0, 32])
def test_shapes_that_occur_once_are_not_recorded(model: SAVL, tile: int) -> None:
    upscaler, recorder = automatic(model, tile=tile, tile_pad=8)
    for _ in range(2):
        upscaler(torch.rand(1, 3, 56, 64))
    assert recorder.attempts == 0


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (RuntimeError("the network cannot be captured as a CUDA graph"), "cannot be captured"),
        (torch.OutOfMemoryError(OUT_OF_MEMORY), "memory ran out"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_what_cannot_be_recorded_is_computed_without_graphs_and_with_the_same_tiles(
    model: SAVL, image: Tensor, failure: Exception, reason: str, own: bool
) -> None:
    network = model if own else Zoom()
    expected = savl.Upscaler(network, tile=16, tile_pad=8, device="cpu")(image).sr
    upscaler, recorder = automatic(network, failure, tile=16, tile_pad=8)
    for _ in range(2):
        assert torch.equal(upscaler(image).sr, expected)
    assert recorder.attempts <= 2, "tried again after it has failed"
    assert recorder.released > 0
    assert "CUDA graphs: not used" in upscaler.graphs_report
    assert reason in upscaler.graphs_report


def test_memory_that_runs_out_beside_graphs_is_theirs_to_give(image: Tensor) -> None:
    seen: list[tuple[int, ...]] = []

    def small_machine(lr: Tensor) -> float:
        seen.append(tuple(lr.shape[-2:]))
        if len(upscaler.graphs or ()) > 0:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return 0.0

    upscaler, recorder = automatic(Zoom(small_machine), tile=16, tile_pad=8)
    first = upscaler(image).sr
    assert torch.equal(first, savl.Upscaler(Zoom(), tile=16, tile_pad=8, device="cpu")(image).sr)
    assert recorder.attempts == 1
    assert min(min(size) for size in seen) >= 16 + 8, "a smaller tile was used"
    assert "memory ran out" in upscaler.graphs_report


def test_the_field_is_computed_in_the_same_tiles_once_graphs_have_given_their_memory(
    model: SAVL, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    upscaler, recorder = automatic(model, tile=16, tile_pad=8)
    expected = upscaler(image)
    original = SAVL.estimate
    sizes: list[int] = []

    def small_machine(self: SAVL, lr: Tensor, seed: int | None = None) -> DegradationField | None:
        sizes.append(lr[0, 0].numel())
        if len(upscaler.graphs or ()) > 0 and len(sizes) == 1:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return original(self, lr, seed)

    monkeypatch.setattr(SAVL, "estimate", small_machine)
    out = upscaler(image)
    assert sizes[0] == sizes[1]
    assert recorder.released > 0
    assert torch.equal(out.severity, expected.severity)
    assert torch.equal(out.sr, expected.sr)


def test_a_network_that_changes_with_each_pass_is_not_replayed(image: Tensor) -> None:
    passes: list[int] = []

    def drifting(lr: Tensor) -> float:
        passes.append(1)
        return 1e-3 * len(passes)

    upscaler, recorder = automatic(Zoom(drifting), tile=16, tile_pad=8)
    upscaler(image)
    assert recorder.attempts == 1
    assert "another result" in upscaler.graphs_report


def test_an_error_of_the_network_is_raised(image: Tensor) -> None:
    def broken(lr: Tensor) -> float:
        if len(passes) == 3:
            raise ValueError("a bug")
        passes.append(1)
        return 0.0

    passes: list[int] = []
    upscaler, _ = automatic(Zoom(broken), tile=16, tile_pad=8)
    with pytest.raises(ValueError, match="a bug"):
        upscaler(image)


def test_hooks_are_called_for_every_tile(model: SAVL, image: Tensor) -> None:
    upscaler, recorder = automatic(model, tile=16, tile_pad=8)
    upscaler(image)
    recorded = recorder.attempts
    recorder.replayed.clear()
    calls: list[int] = []
    handle = model.conv_first.register_forward_hook(lambda *_: calls.append(1))
    upscaler(image)
    assert len(calls) == 4 * 5
    assert not recorder.replayed
    assert "have hooks" in upscaler.graphs_report
    handle.remove()
    upscaler(image)
    assert recorder.attempts == recorded
    assert sum(recorder.replayed.values()) == 4 * 5 - 4


def test_the_default_tile_is_chosen_anew_until_there_are_graphs(
    model: SAVL, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = iter([128, 96, 24, 48])
    monkeypatch.setattr("savl.inference.upscaler.default_tile", lambda *_, **__: next(sides))
    upscaler, recorder = automatic(model, tile_pad=4)
    for _ in range(3):
        upscaler(image)
    assert recorder.attempts > 0
    upscaler(image)
    assert next(sides) == 48


def test_threads_share_graphs(model: SAVL, image: Tensor) -> None:
    images = [image * level for level in torch.linspace(0.3, 1, 4)]
    plain = savl.Upscaler(model, tile=16, tile_pad=8, device="cpu")
    expected = [plain(lr).sr for lr in images]
    upscaler, recorder = automatic(model, tile=16, tile_pad=8)
    savl.use_fused_kernels(False, model=model)  # worker threads do not have the setting of the fixture
    with ThreadPoolExecutor(3) as pool:
        for out, sr in zip(pool.map(upscaler, images), expected, strict=True):
            assert torch.equal(out.sr, sr)
    assert recorder.replayed


@pytest.mark.parametrize(
    ("given", "graphs", "decides"), [(None, True, True), (True, True, False), (False, False, False)]
)
def test_on_cuda_the_upscaler_decides_unless_it_is_told(
    model: SAVL, monkeypatch: pytest.MonkeyPatch, given: bool | None, graphs: bool, decides: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("savl.inference.upscaler.needs_copy", lambda *_: False)
    upscaler = savl.Upscaler(model, device="cuda:0", cuda_graph=given)
    assert (upscaler.graphs is not None, upscaler.automatic_graphs is not None) == (graphs, decides)
    compiled = savl.Upscaler(torch.compile(model), device="cuda:0", cuda_graph=given)  # type: ignore[arg-type]
    assert (compiled.graphs is not None) == (given is True)
