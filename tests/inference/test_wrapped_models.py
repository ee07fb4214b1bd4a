"""Compiled, parallel and averaged networks in `savl.upscale`, `savl.Upscaler` and `savl.save`."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import savl
from savl.network import SAVL, SAVLConfig


@pytest.fixture
def model(small_config: Callable[..., SAVLConfig]) -> SAVL:
    torch.manual_seed(1)
    model = SAVL(small_config(depths=(1,)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yield a list that gets one item for each run of compiled code."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def counting(ran: list[int]) -> Callable[..., Any]:
    """Return a compiler backend that changes nothing and counts the runs of its code."""

    def compile_graph(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            ran.append(1)
            return graph.forward(*arguments)

        return run

    return compile_graph


def in_place(model: SAVL, **options: Any) -> SAVL:
    model.compile(**options)
    return model


WRAPPED = {
    "torch.compile": lambda model, backend: torch.compile(model, backend=backend, fullgraph=True),
    "in place": lambda model, backend: in_place(model, backend=backend, fullgraph=True),
    "parallel of compiled": lambda model, backend: nn.DataParallel(torch.compile(model, backend=backend)),
    "compiled parallel": lambda model, backend: torch.compile(nn.DataParallel(model), backend=backend),
}


@pytest.mark.parametrize(
    ("wrap", "copied"),
    [(wrap, False) for wrap in WRAPPED.values()] + [(WRAPPED["torch.compile"], True), (WRAPPED["in place"], True)],
    ids=[*WRAPPED, "torch.compile, copied", "in place, copied"],
)
def test_a_compiled_network_upscales_with_its_compiled_code(
    wrap: Callable[..., nn.Module], copied: bool, model: SAVL, ran: list[int]
) -> None:
    lr = torch.rand(1, 3, 13, 18)
    expected = savl.Upscaler(model, tile=0, device="cpu")(lr)
    wrapped = wrap(model, counting(ran))
    if copied:
        model.train()
    upscaler = savl.Upscaler(wrapped, tile=0, device="cpu")
    out = upscaler(lr)
    assert len(ran) >= 2, "the estimator or the network ran as it was before it was compiled"
    torch.testing.assert_close(out.sr, expected.sr, atol=1e-6, rtol=0)
    torch.testing.assert_close(out.severity, expected.severity, atol=1e-5, rtol=0)
    assert model.training is copied, "the caller's network was changed"


def test_upscale_takes_a_compiled_network_and_its_other_settings(model: SAVL, ran: list[int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    out = savl.upscale(image, model=torch.compile(model, backend=counting(ran)), tile=0, device="cpu", dtype="float32")
    expected = savl.upscale(image, model=model, tile=0, device="cpu")
    assert ran
    assert np.abs(out.astype(int) - expected).max() <= 1


def test_a_half_precision_compiled_network_is_brought_to_float32(model: SAVL, ran: list[int]) -> None:
    compiled = torch.compile(model, backend=counting(ran)).bfloat16()
    upscaler = savl.Upscaler(compiled, device="cpu")
    assert upscaler.model.rgb_mean.dtype == torch.float32
    assert model.conv_first.weight.dtype == torch.bfloat16
    upscaler(torch.rand(1, 3, 5, 6))
    assert ran


def test_a_network_compiled_in_place_can_be_copied_and_pickled(model: SAVL) -> None:
    model.compile(backend=lambda graph, inputs: graph.forward)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.compile_options is None
        assert torch.equal(again.conv_first.weight, model.conv_first.weight)


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel])
def test_wrappers_that_do_not_compile_are_removed(wrap: Callable[[nn.Module], nn.Module], model: SAVL) -> None:
    lr = torch.rand(1, 3, 6, 5)
    out = savl.Upscaler(wrap(model), device="cpu")(lr)
    assert torch.equal(out.sr, savl.Upscaler(model, device="cpu")(lr).sr)
    savl.upscale(np.zeros((5, 6), np.uint8), model=wrap(model))


@pytest.mark.parametrize(
    "other", [nn.Linear(2, 2), torch.compile(nn.Linear(2, 2), backend="eager"), nn.DataParallel(nn.Linear(2, 2)), "x"]
)
def test_an_object_without_a_savl_network_is_refused_by_its_type(other: Any) -> None:
    with pytest.raises(TypeError, match=rf"model must be a savl\.SAVL .* got {type(other).__name__}$"):
        savl.Upscaler(other)


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel, AveragedModel])
def test_a_wrapped_network_is_saved_under_its_own_names(
    wrap: Callable[[nn.Module], nn.Module], model: SAVL, tmp_path: Path
) -> None:
    savl.save(wrap(model), tmp_path / "model.safetensors")
    loaded = savl.load(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert torch.equal(loaded.conv_first.weight, model.conv_first.weight)
    with pytest.raises(TypeError, match=r"model must be a savl\.SAVL, got Linear"):
        savl.save(nn.Linear(1, 1), tmp_path / "model.safetensors")


# Values


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 255.0), (-1.0, 1.0), (0.0, 1.01), (float("nan"), 0.5), (0.0, float("inf"))]
)
@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 1), (torch.float64, 3), (torch.bfloat16, 3)])
def test_floats_outside_the_unit_interval_are_refused_with_a_solution(
    low: float, high: float, dtype: torch.dtype, batch: int, model: SAVL
) -> None:
    lr = torch.full((batch, 3, 4, 5), 0.5, dtype=dtype)
    lr[-1, 0, 0, 0], lr[-1, 2, 3, 4] = low, high
    with pytest.raises(ValueError, match=r"^lr: float values from .* \[0, 1\] \(divide 8-bit values by 255"):
        savl.Upscaler(model, device="cpu")(lr)


def test_small_excesses_over_the_unit_interval_are_accepted(model: SAVL) -> None:
    lr = torch.rand(2, 3, 4, 5)
    lr[0, 0, 0, 0], lr[1, 0, 0, 0] = -0.0009, 1.0009
    assert savl.Upscaler(model, device="cpu")(lr).sr.shape == (2, 3, 16, 20)
