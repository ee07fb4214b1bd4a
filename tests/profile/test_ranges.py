"""Tests of `savl.profile.annotate`: the named ranges, and that nothing remains after the block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import savl
from savl import ops
from savl.network import HAB, SAVL
from savl.ops import KernelSettings, KernelUnavailable, scopes
from savl.ops import op as op_registry
from savl.ops.library import EXTENSION_UNAVAILABLE
from savl.ops.op import OPS
from savl.profile import annotate, named_range, ranges
from savl.profile.ranges import range_names

Ranges = list[tuple[str, float, float]]

needs_extension = pytest.mark.skipif(EXTENSION_UNAVAILABLE is not None, reason=str(EXTENSION_UNAVAILABLE))

FUNCTIONS = {op: getattr(ops, op) for op in OPS}


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check after each test that no range is open, no hook is registered, and the ops are the original functions."""
    monkeypatch.delenv("SAVL_KERNELS", raising=False)
    monkeypatch.setattr(scopes, "process", scopes.ProcessSettings(KernelSettings.of(False)))
    yield
    assert ranges._stack() == []
    assert ranges._hooked == {}
    assert {op: getattr(ops, op) for op in OPS} == FUNCTIONS


@pytest.fixture
def model(small_config: Callable[..., Any]) -> SAVL:
    return savl.build(small_config()).eval()


LR = torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(3))


def seen(run: Callable[[], object]) -> Ranges:
    """Return the ranges that torch.profiler records, in the order of their start: name, start and end in µs."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    found = [
        (each.name, each.time_range.start, each.time_range.end) for each in profiler.events() if each.is_user_annotation
    ]
    return sorted(found, key=lambda each: (each[1], -each[2]))


def names(found: Ranges) -> list[str]:
    return [name for name, _, _ in found]


def around(found: Ranges, name: str) -> list[list[str]]:
    """Return, for each range of that name, the ranges that contain it, outermost first."""
    return [
        [other for other, start, end in found if start <= begin and finish <= end and other != name]
        for each, begin, finish in found
        if each == name
    ]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
def infer(model: SAVL) -> torch.Tensor:
    return model(LR)


def test_ranges_are_nested_like_the_modules(model: SAVL) -> None:
    with annotate(model):
        found = seen(lambda: infer(model))
    assert around(found, "network") == [[]]
    for stage in ("estimator", "shallow features", "group 0", "group 1", "deep features", "upsampler"):
        assert around(found, stage) == [["network"]], stage
    assert around(found, "group 0 HAB 1 CAB") == [["network", "group 0", "group 0 HAB 1"]]
    ends = around(found, "projection_mlp [eager]")
    assert ["network", "group 0", "group 0 HAB 1"] in ends
    assert ["network", "group 1", "group 1 OCAB"] in ends
    assert around(found, "group 1 convolution") == [["network", "group 1"]]
    assert around(found, "gaussian_posterior [eager]") == [["network"]]
    assert around(found, "overlapping_window_attention [eager]") == [
        ["network", f"group {index}", f"group {index} OCAB"] for index in range(2)
    ]
    assert around(found, "channel_modulation [eager]")[:2] == [
        ["network", "group 0", f"group 0 DSCA {index}", "guided_projection [eager]", "convolution [eager]"]
        for index in range(2)
    ]
    assert len(around(found, "window_attention [eager]")) == 3 + 5, "one for each HAB and each DSCA"


def test_names_are_unique_and_every_block_has_one(model: SAVL) -> None:
    found = range_names(model)
    assert len(set(found.values())) == len(found)
    for kind in (savl.network.HAB, savl.network.OCAB, savl.network.DSCA, savl.network.CAB):
        assert all(module in found for module in model.modules() if isinstance(module, kind)), kind


def test_outside_of_annotate_there_are_neither_ranges_nor_hooks(model: SAVL) -> None:
    assert hooks(model) == 0
    assert seen(lambda: infer(model)) == []
    with annotate(model):
        assert hooks(model) > 0
        assert seen(lambda: infer(model))
    assert hooks(model) == 0
    assert seen(lambda: infer(model)) == []


def test_annotation_does_not_change_the_output(model: SAVL) -> None:
    before = infer(model)
    with annotate(model):
        assert torch.equal(infer(model), before)


@needs_extension
@pytest.mark.parametrize("scope", ["thread", "model"])
def test_the_range_of_an_op_names_the_backend(model: SAVL, scope: str) -> None:
    def backends() -> dict[str, set[str]]:
        with annotate(model):
            pairs = [name.split(" [") for name in names(seen(lambda: infer(model))) if "[" in name]
        return {op: {backend.rstrip("]") for name, backend in pairs if name == op} for op in OPS}

    where = {"model": model} if scope == "model" else {}
    assert backends() == {op: {"eager"} for op in OPS}
    around = dict.fromkeys(("convolution", "guided_projection"), False)
    with savl.use_fused_kernels(True, **around, **where):
        assert backends() == {op: {"eager" if op in around else "cpp"} for op in OPS}
    with savl.use_fused_kernels(**where):
        assert backends() == {op: set() if op == "channel_modulation" else {"cpp"} for op in OPS}, (
            "a fused convolution modulates its result itself"
        )


@needs_extension
def test_mixed_float64_and_float32_tensors_are_named_eager() -> None:
    wide, narrow = torch.rand(1, 2, 2, 4, dtype=torch.float64), torch.rand(1, 2, 2, 4)
    ranged = ranges._in_range(OPS["channel_modulation"])
    with savl.use_fused_kernels():
        assert names(seen(lambda: ranged(wide, wide, None, wide))) == ["channel_modulation [cpp]"]
        assert names(seen(lambda: ranged(wide, wide, None, residual=narrow))) == ["channel_modulation [eager]"]
        assert names(seen(lambda: ranged(narrow, narrow, None, narrow))) == ["channel_modulation [cpp]"]


def test_an_op_raises_the_same_error_inside_annotate(model: SAVL, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = op_registry.UNAVAILABLE | {("window_attention", "cpp"): "nobody compiled it"}
    monkeypatch.setattr(op_registry, "UNAVAILABLE", missing)
    qkv, table = torch.rand(1, 2, 2, 6), torch.rand(9, 1)
    with annotate(model):
        with pytest.raises(TypeError, match="qkv must be"):
            ops.window_attention(None, table, window=2)  # type: ignore[arg-type]
        with pytest.raises(KernelUnavailable, match="nobody compiled it"):
            ops.window_attention(qkv, table, window=2, kernels=KernelSettings(window_attention="cpp"))
        assert ops.window_attention.__doc__ == FUNCTIONS["window_attention"].__doc__
        assert ops.window_attention(qkv=qkv, bias_table=table, window=2).shape == (1, 2, 2, 2)


def test_nested_annotations_open_each_range_once(model: SAVL) -> None:
    with annotate(model):
        once = names(seen(lambda: infer(model)))
        with annotate(model), annotate(model.groups[0]):
            assert names(seen(lambda: infer(model))) == once
        assert names(seen(lambda: infer(model))) == once
    assert hooks(model) == 0


def test_annotations_may_end_in_any_order(model: SAVL) -> None:
    first, second = annotate(model), annotate(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert "group 0" in names(seen(lambda: infer(model)))
    second.__exit__(None, None, None)
    assert hooks(model) == 0


def test_an_error_in_the_network_leaves_nothing_behind(model: SAVL, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise ArithmeticError("it had to be")

    monkeypatch.setattr(model.groups[1].habs[0].cab, "forward", fail)
    with pytest.raises(ArithmeticError, match="it had to be"), annotate(model):
        infer(model)
    assert hooks(model) == 0


def test_an_error_caught_inside_annotate_closes_its_ranges(model: SAVL, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise ArithmeticError("it had to be")

    def run() -> None:
        for _ in range(2):
            with pytest.raises(ArithmeticError):
                infer(model)
        with named_range("afterwards"):
            torch.ones(1)

    monkeypatch.setattr(model.groups[1].habs[0].cab, "forward", fail)
    with annotate(model):
        found = seen(run)
    assert around(found, "network") == [[], []]
    assert around(found, "group 1 HAB 0 CAB") == [["network", "group 1", "group 1 HAB 0"]] * 2
    assert around(found, "afterwards") == [[]]


def test_an_error_before_a_range_is_opened_closes_no_other_range(model: SAVL) -> None:
    def refuse(module: nn.Module, arguments: Any) -> None:
        raise ArithmeticError("not today")

    handle = model.estimator.register_forward_pre_hook(refuse)  # runs before those of the block
    with annotate(model), named_range("outer"):
        with pytest.raises(ArithmeticError):
            model.estimator(LR)
        assert [each.owner for each in ranges._stack()] == [None]
    handle.remove()


def test_a_training_step_has_ranges_and_the_same_gradients(small_config: Callable[..., Any]) -> None:
    model = savl.build(small_config()).train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(LR).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    before = gradients()
    with annotate(model):
        found = seen(lambda: before.extend(gradients()))
    count = len(before) // 2
    assert all(torch.equal(*pair) for pair in zip(before[:count], before[count:], strict=True))
    assert names(found).count("group 0 HAB 0") == 1
    assert names(found).count("window_attention [eager]") == 8


def test_each_thread_has_its_own_ranges(model: SAVL) -> None:
    depths = []

    def run() -> None:
        handle = model.upsampler.register_forward_hook(lambda *_: depths.append(len(ranges._stack())))
        infer(model)
        handle.remove()

    with annotate(model), named_range("outer"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert depths == [1], "the range of the network, not that of the main thread; the upsampler's own has ended"


def test_nvtx_receives_the_same_ranges(model: SAVL, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    open_ranges: list[str] = []

    def push(name: str) -> None:
        open_ranges.append(name)
        log.append(name)

    monkeypatch.setattr(ranges, "_has_nvtx", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: open_ranges.pop())
    with annotate(model):
        found = seen(lambda: infer(model))
    assert log == names(found)
    assert open_ranges == []


def test_a_compiled_block_is_one_graph_with_and_without_annotation(small_config: Callable[..., Any]) -> None:
    block = HAB(small_config(), 2, 0.0).eval()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    features = torch.rand(1, 8, 8, 12)
    with torch.no_grad():
        expected = block(features)
        for inside in (False, True, False):
            if inside:
                with annotate(block):
                    result = compiled(features)
            else:
                result = compiled(features)
            torch.testing.assert_close(result, expected)


def test_a_module_without_savl_blocks_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="model must have savl blocks in it, Linear has none"),
        annotate(nn.Linear(1, 1)),
    ):
        pass
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"), annotate("savl-tiny"):  # type: ignore[arg-type]
        pass
