"""Tiles of several threads are computed together, and every thread gets its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from savl import Upscaler
from savl.network import SAVL, DegradationField, SAVLConfig
from savl.service.batching import BatchingUpscaler, TileBatcher


def in_threads(functions: list[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_images_of_several_threads_share_passes_and_get_their_own_pixels(
    small_config: Callable[..., SAVLConfig], perturb_parameters: Callable[[SAVL], SAVL]
) -> None:
    model = perturb_parameters(SAVL(small_config(restoration_strength=True)).eval())
    images = [torch.rand(1, 3, 24, 20) for _ in range(4)]
    images += [torch.rand(1, 3, 9, 13) for _ in range(2)]
    plain = Upscaler(model, device="cpu")
    expected = [plain(image).sr for image in images]
    batches: list[int] = []
    upscaler = BatchingUpscaler(model, device="cpu", most=4, computed=batches.append)
    results: dict[int, Tensor] = {}
    begin = threading.Barrier(len(images))

    def work(index: int) -> None:
        begin.wait()
        results[index] = upscaler(images[index]).sr

    in_threads([lambda index=index: work(index) for index in range(len(images))])  # type: ignore[misc]
    assert sum(batches) == len(images)
    assert max(batches) > 1, "no pass was shared"
    for index, wanted in enumerate(expected):
        torch.testing.assert_close(results[index], wanted, rtol=0, atol=1e-5)


def batcher(most: int, pixels: int, images: int, computed: list[int]) -> TileBatcher:
    made = TileBatcher(most, lambda: pixels, computed.append)
    made._images = images
    return made


def test_batch_is_limited_in_pixels() -> None:
    computed: list[int] = []
    double = batcher(8, 2 * 16, 5, computed).reconstruct(lambda lr, field: 2 * lr)
    results: dict[int, Tensor] = {}

    def work(index: int) -> None:
        results[index] = double(torch.full((1, 3, 4, 4), float(index)), None)

    in_threads([lambda index=index: work(index) for index in range(5)])  # type: ignore[misc]
    assert max(computed) <= 2
    assert sum(computed) == 5
    assert all(bool((results[index] == 2 * index).all()) for index in range(5))


def test_tile_that_cannot_be_computed_fails_alone() -> None:
    computed: list[int] = []

    def network(lr: Tensor, field: DegradationField | None) -> Tensor:
        if bool((lr < 0).any()):
            raise RuntimeError("negative")
        return lr + 1

    batched = batcher(3, 10**6, 3, computed).reconstruct(network)
    results: dict[int, object] = {}

    def work(index: int) -> None:
        try:
            results[index] = batched(torch.full((1, 3, 4, 4), float(index - 1)), None)
        except RuntimeError as error:
            results[index] = str(error)

    in_threads([lambda index=index: work(index) for index in range(3)])  # type: ignore[misc]
    assert results[0] == "negative"
    for index in (1, 2):
        assert torch.equal(results[index], torch.full((1, 3, 4, 4), float(index)))  # type: ignore[arg-type]


def test_tiles_that_do_not_fit_into_memory_together_are_computed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def cat(tensors: list[Tensor]) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "cat", cat)
    batched = batcher(2, 10**6, 2, []).reconstruct(lambda lr, field: lr + 1)
    results: dict[int, Tensor] = {}

    def work(index: int) -> None:
        results[index] = batched(torch.full((1, 3, 4, 4), float(index)), None)

    in_threads([lambda index=index: work(index) for index in range(2)])  # type: ignore[misc]
    assert [float(results[index][0, 0, 0, 0]) for index in range(2)] == [1.0, 2.0]


def test_single_image_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("savl.service.batching.LONGEST_WAIT", 1000.0)
    computed: list[int] = []
    alone = batcher(8, 10**6, 1, computed).reconstruct(lambda lr, field: lr)
    in_threads([lambda: alone(torch.zeros(1, 3, 4, 4), None)])
    assert computed == [1]
