"""The roofline of the ops: how fast this device could be, and how fast the ops are on it.

An op that does F floating-point operations on Q bytes takes at least F / (operations a second) and at least Q / (bytes
a second). Over its intensity F / Q that makes a roof: a slope where memory is the limit, flat where arithmetic is.

Both ceilings are measured: a large matrix product and a large copy, of which the bytes read and the bytes written both
count. F and Q follow from the shapes, not from what a kernel does: F is what the definition needs, Q reads each input
once and writes each output once. What a kernel does beyond lowers its point. Eager is drawn at the same intensity, so
that above and below is faster and slower. Tensors that fit into a cache can lie above the slope.

Source: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (CACM 2009).
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from savl import ops
from savl.network import SAVLConfig
from savl.ops import KernelSettings
from savl.ops.library import EAGER
from savl.ops.op import OPS
from savl.profile.ranges import serving
from savl.profile.workload import synchronise

_ROUND_SECONDS = 2e-3
"""A round of calls takes at least that long, so that the clock and the wait for the device do not count."""


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best."""

    gflops: float
    """10⁹ floating-point operations a second."""
    gigabytes: float
    """10⁹ bytes a second, read and written."""

    @property
    def ridge(self) -> float:
        """Intensity in FLOP/byte from which on arithmetic is the limit."""
        return self.gflops / self.gigabytes

    def roof(self, intensity: float) -> float:
        """Most GFLOP/s at an intensity in FLOP/byte."""
        return min(self.gflops, self.gigabytes * intensity)


@dataclass(frozen=True)
class Point:
    """One op by one backend."""

    op: str
    backend: str
    """``"eager"`` or the name of a fused backend."""
    flops: float
    """Floating-point operations of a call."""
    bytes: float
    """Compulsory bytes of a call."""
    seconds: float
    """Median time of a call."""

    @property
    def intensity(self) -> float:
        """FLOP/byte."""
        return self.flops / self.bytes

    @property
    def gflops(self) -> float:
        """GFLOP/s."""
        return self.flops / self.seconds / 1e9


@dataclass(frozen=True)
class Roofline:
    """What `measure_roofline` finds."""

    device: str
    dtype: str
    ceilings: Ceilings
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Call:
    """A call of an op as the network makes it.

    Attributes:
        op: Its name.
        run: Computes it with given kernels.
        tensors: Its tensors, and None for those left out.
        flops: Floating-point operations.
        bytes: Compulsory bytes.
    """

    op: str
    run: Callable[[KernelSettings], object]
    tensors: tuple[Tensor | None, ...]
    flops: float
    bytes: float


# Work by formula. N: pixels of all images, C: channels, R: channels of the field, e: bytes of a number.


def window_attention_work(
    pixels: int, channels: int, heads: int, window: int, key_window: int, width: int, severity: bool
) -> tuple[float, float]:
    """FLOPs and bytes of either attention; ``key_window`` is ``window`` where they do not overlap.

    F = 4·N·o²·C: every pixel multiplies with o² keys and adds up as many values, C products and C sums each. Softmax,
    bias and severity are left out: they are not matrix products, and few beside them.
    Q = e·(4·N·C + (w + o − 1)²·heads), q, k, v and out and the bias table, and 4·N for severity, which is float32.

    Args:
        pixels: N, padded to windows.
        channels: C.
        heads: Attention heads.
        window: Side w of the windows.
        key_window: Side o of the key windows.
        width: e.
        severity: Whether there is a severity map.
    """
    flops = 4.0 * pixels * key_window**2 * channels
    table = (window + key_window - 1) ** 2 * heads
    return flops, width * (4.0 * pixels * channels + table) + (4.0 * pixels if severity else 0.0)


def gaussian_posterior_work(pixels: int, latent: int, batch: int, width: int) -> tuple[float, float]:
    """FLOPs and bytes of the posterior without a sample, as in inference.

    F = N·(7·R + 10): of each number an exponential, a square, expm1, two sums inside the divergence and one into each
    of the two maps; of each pixel half the divergence and the mean, four for the statistics, four for severity. An
    exponential counts as one.
    Q = 2·e·N·R + 12·N + 8·B: mean and log-variance read; divergence, variance, severity and two statistics of an
    image written, in float32.

    Args:
        pixels: N.
        latent: R.
        batch: Images B.
        width: e.
    """
    return pixels * (7.0 * latent + 10.0), 2.0 * width * pixels * latent + 12.0 * pixels + 8.0 * batch


def channel_modulation_work(pixels: int, channels: int, width: int, shift: bool) -> tuple[float, float]:
    """FLOPs and bytes of the modulation.

    F = 3·N·C, Q = 4·e·N·C: 1 + gamma, times attended, plus residual. With beta 4·N·C and 5·e·N·C.

    Args:
        pixels: N, padded to windows.
        channels: C.
        width: e.
        shift: Whether there is a beta.
    """
    numbers = float(pixels * channels)
    return (4.0 if shift else 3.0) * numbers, (5.0 if shift else 4.0) * width * numbers


def layer_norm_work(pixels: int, channels: int, width: int) -> tuple[float, float]:
    """FLOPs and bytes of layer normalisation.

    F = N·(7·C + 4): each number into the mean, less the mean, its square into the variance, times the inverse
    deviation, times weight, plus bias; of each pixel the divisions by C, a sum, a root.
    Q = e·(2·N·C + 2·C): x and the parameters read, the result written.

    Args:
        pixels: N, padded to windows.
        channels: C.
        width: e.
    """
    return pixels * (7.0 * channels + 4.0), width * (2.0 * pixels * channels + 2.0 * channels)


def network_calls(
    config: SAVLConfig, *, height: int, width: int, batch: int, dtype: torch.dtype, device: torch.device
) -> list[Call]:
    """One call of each op that a network makes, on random numbers; windows are not shifted.

    Args:
        config: The network.
        height: Of the images, in pixels.
        width: Likewise.
        batch: Images.
        dtype: Of the network.
        device: Where.
    """
    generator = torch.Generator().manual_seed(0)
    window, keys, channels, latent = config.window, config.key_window, config.channels, config.latent
    rows, columns = (-(-side // window) * window for side in (height, width))
    size = dtype.itemsize

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def table(side: int) -> Tensor:
        return normal((window + side - 1) ** 2, config.heads)

    field = config.degradation_code == "variational"
    severity = (
        2 * torch.rand(batch, rows, columns, generator=generator).to(device)
        if field and config.spatial_modulation
        else None
    )
    pixels = batch * rows * columns
    features = (batch, rows, columns)
    qkv, q, kv = (normal(*features, times * channels) for times in (3, 1, 2))
    attend = partial(ops.window_attention, qkv, table(window), severity, window=window)
    overlap = partial(ops.overlapping_window_attention, q, kv, table(keys), None, window=window, key_window=keys)
    works = [
        window_attention_work(pixels, channels, config.heads, window, keys_side, size, with_severity)
        for keys_side, with_severity in ((window, severity is not None), (keys, False))
    ]
    calls = [
        Call("window_attention", lambda kernels: attend(kernels=kernels), attend.args, *works[0]),
        Call("overlapping_window_attention", lambda kernels: overlap(kernels=kernels), overlap.args, *works[1]),
    ]
    if field:
        mu, logvar = (normal(batch, latent, height, width) for _ in range(2))
        measure = partial(ops.gaussian_posterior, mu, logvar)
        work = gaussian_posterior_work(batch * height * width, latent, batch, size)
        calls.append(Call("gaussian_posterior", lambda kernels: measure(kernels=kernels), measure.args, *work))
    if config.degradation_code != "none" and config.channel_modulation:
        attended, gamma, residual, beta = (normal(*features, channels) for _ in range(4))
        shift = config.modulation_shift
        modulate = partial(ops.channel_modulation, attended, gamma, beta if shift else None, residual)
        work = channel_modulation_work(pixels, channels, size, shift)
        calls.append(Call("channel_modulation", lambda kernels: modulate(kernels=kernels), modulate.args, *work))
    x, weight, bias = normal(*features, channels), normal(channels), normal(channels)
    normalise = partial(ops.layer_norm, x, weight, bias, eps=1e-5)
    calls.append(
        Call(
            "layer_norm",
            lambda kernels: normalise(kernels=kernels),
            normalise.args,
            *layer_norm_work(pixels, channels, size),
        )
    )
    return calls


# Measuring


def measure_roofline(
    config: SAVLConfig,
    *,
    height: int,
    width: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int = 15,
    matrix: int | None = None,
    copied: int | None = None,
) -> Roofline:
    """Measure the ceilings and every op of a network, fused (where a kernel serves) and eager.

    Args:
        config: The network.
        height: Of the images, in pixels.
        width: Likewise.
        batch: Images.
        dtype: Of the network.
        device: Where.
        rounds: How often everything is timed; the ways of an op take turns.
        matrix: Side of the matrices of the product; None for 8192 on a GPU, 1536 elsewhere.
        copied: Bytes to copy; None for 1 GiB on a GPU, 256 MiB elsewhere.
    """
    points = []
    fused, eager = KernelSettings.of(True), KernelSettings.of(False)
    for call in network_calls(config, height=height, width=width, batch=batch, dtype=dtype, device=device):
        backend = serving(OPS[call.op], fused, *call.tensors)
        ways: dict[str, Callable[[], object]] = {EAGER: partial(call.run, eager)}
        if backend != EAGER:
            ways[backend] = partial(call.run, fused)
        with torch.inference_mode():
            times = time_in_turn(ways, device, rounds)
        points += [
            Point(call.op, name, call.flops, call.bytes, statistics.median(found)) for name, found in times.items()
        ]
    ceilings = measure_ceilings(dtype, device, matrix=matrix, copied=copied)
    return Roofline(device_name(device), str(dtype).removeprefix("torch."), ceilings, tuple(points))


def measure_ceilings(
    dtype: torch.dtype, device: torch.device, *, rounds: int = 7, matrix: int | None = None, copied: int | None = None
) -> Ceilings:
    """What the device does at best: a ceiling is the fastest of several tries, not the median.

    Where float32 products are faster than those of the dtype, as on processors without units for it, theirs count:
    kernels may widen their numbers.

    Args:
        dtype: Of the product.
        device: Where.
        rounds: Tries.
        matrix: As in `measure_roofline`.
        copied: Likewise.
    """
    large = device.type == "cuda"
    side = matrix or (8192 if large else 1536)
    size = copied or (2**30 if large else 2**28)
    products: dict[str, Callable[[], object]] = {}
    for each in dict.fromkeys((dtype, torch.float32)):
        a, b = (torch.rand(side, side, dtype=torch.float32, device=device).to(each) for _ in range(2))
        products[str(each)] = partial(torch.mm, a, b, out=torch.empty_like(a))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    with torch.inference_mode():
        product = min(min(found) for found in time_in_turn(products, device, rounds).values())
        copy = min(time_in_turn({"copy": lambda: target.copy_(source)}, device, rounds)["copy"])
    return Ceilings(2.0 * side**3 / product / 1e9, 2.0 * size / copy / 1e9)


def time_in_turn(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of a call, once a round for each; the calls take turns, so that what slows the machine slows all.

    Args:
        calls: By name.
        device: What they run on.
        rounds: How many.
    """

    def round_of(call: Callable[[], object], repeats: int) -> float:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronise(device)
        return (time.perf_counter() - start) / repeats

    repeats = {}
    for name, call in calls.items():
        round_of(call, 1)  # compiles, allocates
        repeats[name] = max(1, round(_ROUND_SECONDS / round_of(call, 1)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(round_of(call, repeats[name]))
    return times


def device_name(device: torch.device) -> str:
    """What the device is called, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def cpu_name() -> str:
    """What the operating system calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []  # not Linux
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]
