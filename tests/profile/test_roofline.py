"""Tests of the roofline: FLOPs and bytes against operations and tensors of real calls, times, and the figure."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import savl
from savl import ops
from savl.network import CONFIGS
from savl.ops import KernelSettings, kernel_report
from savl.ops.op import OPS
from savl.profile import roofline
from savl.profile.figure import draw_roofline, save_roofline
from savl.profile.roofline import (
    Ceilings,
    Point,
    Roofline,
    channel_gate_work,
    channel_modulation_work,
    convolution_work,
    gaussian_posterior_work,
    layer_norm_work,
    measure_ceilings,
    measure_roofline,
    network_calls,
    time_in_turn,
    window_attention_work,
)

CPU, EAGER = torch.device("cpu"), KernelSettings.of(False)
SIZE: dict[str, Any] = {"height": 6, "width": 9, "batch": 2, "device": CPU}
"""Sizes that are not multiples of the window of 4."""

TINY_CEILINGS: dict[str, Any] = {"matrix": 32, "copied": 4096}


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], list[Tensor]]]:
    """Return every call of an op: its name, its arguments by name or position, and the tensors that it returned."""
    calls: list[tuple[str, dict[str, Any], list[Tensor]]] = []

    def spy(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            out = function(*arguments, **options)
            results = [out] if isinstance(out, Tensor) else list(out)
            given = {str(index): value for index, value in enumerate(arguments)} | options
            calls.append((op, given, [each for each in results if all(each is not one for one in arguments)]))
            return out

        return call

    for op in OPS:
        monkeypatch.setattr(ops, op, spy(op, getattr(ops, op)))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flops_of_attention_and_convolution_equal_those_of_their_products(
    small_config: Callable[..., Any], dtype: torch.dtype
) -> None:
    calls = network_calls(small_config(), dtype=dtype, **SIZE)
    products = [call for call in calls if call.op.endswith("attention") or call.op == "convolution"]
    assert len(products) == 3
    for call in products:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            call.run(EAGER)
        assert call.flops == counter.get_total_flops(), call.op


def test_flops_equal_values_computed_by_hand() -> None:
    # One window of 2×2 pixels, two channels: 16 pairs, each with 2 products and 2 sums in q·k, as many for the values.
    assert window_attention_work(4, 2, 1, 2, 2, 4, severity=False) == (128.0, 4 * (4 * 8 + 9))
    # Severity is one float32 a pixel, whatever the dtype.
    assert window_attention_work(4, 2, 1, 2, 2, 2, severity=True)[1] == 2 * (4 * 8 + 9) + 16
    assert channel_modulation_work(10, 3, 4, shift=False) == (90.0, 480.0)
    assert channel_modulation_work(10, 3, 4, shift=True) == (120.0, 600.0)
    assert gaussian_posterior_work(10, 3, 2, 4) == (310.0, 2 * 4 * 30 + 120 + 16)
    assert layer_norm_work(10, 3, 4) == (250.0, 264.0)
    assert convolution_work(10, 3, 5, 4) == (300.0, 4 * (30 + 50 + 15 + 5 + 6))
    # 9 sums of 10 pixels of 3 channels; for 2 windows, products with 5·27, 4·5 and 5·4 weights.
    assert channel_gate_work(10, 2, 3, 5, 4, 4) == (270.0 + 4.0 * 175, 4 * (30 + 135 + 5 + 20 + 4 + 20 + 5 + 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_bytes_equal_those_of_arguments_and_results(
    small_config: Callable[..., Any], spied: list[Any], dtype: torch.dtype, shift: bool
) -> None:
    calls = network_calls(small_config(modulation_shift=shift), dtype=dtype, **SIZE)
    assert [call.op for call in calls] == list(OPS)
    for call in calls:
        call.run(EAGER)
        op, given, results = spied.pop()
        tensors = [*(each for each in given.values() if isinstance(each, Tensor)), *results]
        assert (op, sum(each.nbytes for each in tensors)) == (call.op, call.bytes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"spatial_modulation": False},
        {"channel_modulation": False},
        {"modulation_shift": True},
        {"degradation_code": "deterministic"},
        {"degradation_code": "none"},
    ],
    ids=str,
)
def test_measured_calls_occur_in_the_network(
    small_config: Callable[..., Any], spied: list[Any], changes: dict[str, Any]
) -> None:
    config = small_config(**changes)
    model = savl.build(config).eval().to(torch.bfloat16)
    with torch.no_grad():
        model(torch.rand(2, 3, 6, 9).bfloat16())

    def facts(op: str, given: dict[str, Any]) -> tuple[Any, ...]:
        described = {
            name: (value.shape, value.dtype) if isinstance(value, Tensor) else value
            for name, value in given.items()
            if name not in ("kernels", "seed") and not (name == "shift" and value == 0)
        }
        return op, described

    real = [facts(op, given) for op, given, _ in spied]
    spied.clear()
    calls = network_calls(config, dtype=torch.bfloat16, **SIZE)
    assert {call.op for call in calls} == {op for op, _ in real}
    for call in calls:
        call.run(EAGER)
        assert facts(*spied.pop()[:2]) in real, call.op


def test_every_op_is_measured_eager_and_fused(small_config: Callable[..., Any]) -> None:
    found = measure_roofline(small_config(), dtype=torch.float32, rounds=2, **SIZE, **TINY_CEILINGS)
    with savl.use_fused_kernels():
        report = kernel_report()
    for op in OPS:
        backends = [point.backend for point in found.points if point.op == op]
        assert backends == list(dict.fromkeys(["eager", report.serving(op)])), op
    assert all(point.seconds > 0 and point.intensity > 0 and point.gflops > 0 for point in found.points)
    assert found.ceilings.gflops > 0
    assert found.ceilings.gigabytes > 0
    assert found.dtype == "float32"
    assert "thread" in found.device


def test_only_eager_is_measured_if_no_kernel_supports_the_dtype(small_config: Callable[..., Any]) -> None:
    found = measure_roofline(small_config(), dtype=torch.float16, rounds=1, **SIZE, **TINY_CEILINGS)
    assert [point.backend for point in found.points] == ["eager"] * len(OPS)


def test_ceilings_count_bytes_read_and_written_and_use_the_fastest_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(calls: dict[str, Any], device: torch.device, rounds: int) -> dict[str, list[float]]:
        known = {"torch.bfloat16": [9e-3, 4e-3], "torch.float32": [5e-3, 2e-3], "copy": [3e-6, 1e-6]}
        return {name: known[name] for name in calls}

    monkeypatch.setattr(roofline, "time_in_turn", times)
    found = measure_ceilings(torch.bfloat16, CPU, matrix=100, copied=1000)
    assert found.gflops == pytest.approx(2 * 100**3 / 2e-3 / 1e9), "float32 is faster here, kernels may widen"
    assert found.gigabytes == pytest.approx(2 * 1000 / 1e-6 / 1e9)


def test_the_roof_is_the_lower_ceiling_and_both_meet_at_the_ridge() -> None:
    ceilings = Ceilings(gflops=100.0, gigabytes=20.0)
    assert ceilings.ridge == 5.0
    assert [ceilings.roof(each) for each in (0.5, 5.0, 50.0)] == [10.0, 100.0, 100.0]
    point = Point("window_attention", "eager", flops=3e9, bytes=1.5e9, seconds=0.5)
    assert (point.intensity, point.gflops) == (2.0, 6.0)


def test_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = itertools.count()
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: float(next(clock)))  # a call takes a second
    found = time_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, 3)
    assert "".join(order) == "aabb" + "ab" * 3
    assert found == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_short_calls_are_repeated_until_the_clock_can_measure_them(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    now = 0.0

    def call() -> None:
        nonlocal count, now
        count, now = count + 1, now + 1e-5

    monkeypatch.setattr(roofline.time, "perf_counter", lambda: now)
    found = time_in_turn({"short": call}, CPU, 1)
    assert count == 2 + 200
    assert found["short"] == [pytest.approx(1e-5)]


# The picture


def made_up(name: str, gflops: float, gigabytes: float, shares: tuple[float, ...], dtype: torch.dtype) -> Roofline:
    """A roofline of a network on a device that does so much; shares: of the roof, eager and fused in turn."""
    ceilings = Ceilings(gflops, gigabytes)
    points = []
    share = itertools.cycle(shares)
    for call in network_calls(CONFIGS[name], height=16, width=16, batch=1, dtype=dtype, device=CPU):
        for backend in ("eager", "cpp"):
            # A cache lifts points above the slope, nothing lifts them above the peak.
            speed = min(next(share) * ceilings.roof(call.flops / call.bytes), 0.97 * gflops)
            points.append(Point(call.op, backend, call.flops, call.bytes, call.flops / speed / 1e9))
    return Roofline("Some Device With A Long Name 80GB", str(dtype).removeprefix("torch."), ceilings, tuple(points))


@pytest.mark.parametrize("name", ["savl-tiny", "savl-base"])
@pytest.mark.parametrize("shares", [(0.05, 0.4), (0.3, 0.9), (0.9, 1.6), (0.4, 0.4)], ids=str)
@pytest.mark.parametrize(
    ("gflops", "gigabytes", "dtype"), [(80.0, 17.0, torch.float32), (7e5, 2900.0, torch.bfloat16)], ids=["cpu", "gpu"]
)
def test_labels_overlap_neither_each_other_nor_points_nor_the_border(
    name: str, shares: tuple[float, ...], gflops: float, gigabytes: float, dtype: torch.dtype
) -> None:
    found = made_up(name, gflops, gigabytes, shares, dtype)
    (axes,) = (figure := draw_roofline(found)).axes
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert len(boxes) == 2 + len({point.op for point in found.points})
    for (one, box), (other, place) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(place), f"{one!r} covers {other!r}"
    border = axes.get_window_extent()
    for label, box in boxes.items():
        assert border.x0 <= box.x0, label
        assert box.x1 <= border.x1, label
        assert border.y0 <= box.y0, label
        assert box.y1 <= border.y1, label
        for point in found.points:
            x, y = axes.transData.transform((point.intensity, point.gflops))
            assert not box.contains(x, y), f"{label!r} covers a point"
        for line in axes.lines if "copy" not in label else ():  # that one is written along the roof
            path = line.get_path().transformed(axes.transData).interpolated(100)
            assert not any(box.contains(x, y) for x, y in path.vertices), f"{label!r} covers a line"


def test_the_figure_has_titles_axes_and_labels(tmp_path: Path) -> None:
    found = made_up("savl-tiny", 80.0, 17.0, (0.05, 0.4), torch.float32)
    figure = draw_roofline(found, "a subtitle")
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "Roofline of Some Device With A Long Name 80GB, float32\na subtitle"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "FLOP/byte" in axes.get_xlabel()
    assert "GFLOP/s" in axes.get_ylabel()
    assert [each.get_text() for each in figure.legends[0].get_texts()] == ["roof, measured", "fused (cpp)", "eager"]
    labels = [text.get_text() for text in axes.texts]
    assert {"80 GFLOP/s, matrix product", "17 GB/s, copy", "window attention\n8× eager"} <= set(labels)
    path = tmp_path / "roofline.svg"
    save_roofline(figure, path, overwrite=False)
    written = path.read_bytes()
    assert written.startswith(b"<?xml")
    assert b"gaussian posterior" in written
    with pytest.raises(FileExistsError):
        save_roofline(figure, path, overwrite=False)
    save_roofline(figure, path, overwrite=True)
    assert path.read_bytes() == written, "the same figure is the same file"
    assert list(tmp_path.iterdir()) == [path]
