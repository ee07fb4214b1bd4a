"""The roofline of the ops: the highest speed that this device allows, and the speed of the ops on it.

An op with F floating-point operations on Q bytes takes at least F / (operations per second) and at least Q / (bytes per
second). Plotted over its intensity F / Q, this bound is a roof: a slope where memory is the limit, and flat where
arithmetic is.

Both ceilings are measured: with a large matrix product, and with a large copy, counting the bytes read and written.
F and Q follow from the shapes: F counts what the definition of the op requires, and Q reads each input and writes each
output once. Additional work of a kernel lowers its point. Eager is plotted at the same intensity, so that a higher
point is a faster one. Tensors that fit into a cache can be above the slope.

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
"""Minimum duration of a round of calls, so that the clock and waiting for the device do not matter."""


@dataclass(frozen=True)
class Ceilings:
    """Highest speeds of the device."""

    gflops: float
    """10⁹ floating-point operations per second."""
    gigabytes: float
    """10⁹ bytes per second, read and written."""

    @property
    def ridge(self) -> float:
        """Intensity in FLOP/byte above which arithmetic is the limit."""
        return self.gflops / self.gigabytes

    def roof(self, intensity: float) -> float:
        """Return the highest speed in GFLOP/s at an intensity in FLOP/byte."""
        return min(self.gflops, self.gigabytes * intensity)


@dataclass(frozen=True)
class Point:
    """One op with one backend."""

    op: str
    backend: str
    """``"eager"`` or the name of a fused backend."""
    flops: float
    """Floating-point operations per call."""
    bytes: float
    """Compulsory bytes per call."""
    seconds: float
    """Median time of a call."""

    @property
    def intensity(self) -> float:
        """Arithmetic intensity in FLOP/byte."""
        return self.flops / self.bytes

    @property
    def gflops(self) -> float:
        """Speed in GFLOP/s."""
        return self.flops / self.seconds / 1e9


@dataclass(frozen=True)
class Roofline:
    """Result of `measure_roofline`."""

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


# FLOPs and bytes by formula. N: pixels of all images, C: channels, R: channels of the field, e: bytes per number.


def window_attention_work(
    pixels: int, channels: int, heads: int, window: int, key_window: int, width: int, severity: bool
) -> tuple[float, float]:
    """Return FLOPs and bytes of either attention; ``key_window`` equals ``window`` without overlap.

    F = 4·N·o²·C: each pixel is multiplied with o² keys and sums as many values, with C products and C sums each.
    Softmax, bias and severity are not counted, because they need few operations in comparison.
    Q = e·(4·N·C + (w + o − 1)²·heads) for q, k, v, out and the bias table, and 4·N for severity, which is float32.

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
    """Return FLOPs and bytes of the posterior without a sample, as in inference.

    F = N·(7·R + 10). Each number needs an exponential (counted as one operation), a square, expm1, two additions for
    the divergence and one for each of the two maps. Each pixel needs one operation for half the divergence, one for the
    mean, four for the statistics and four for severity.
    Q = 2·e·N·R + 12·N + 8·B: mean and log-variance are read; divergence, variance, severity, and two statistics per
    image are written in float32.

    Args:
        pixels: N.
        latent: R.
        batch: Images B.
        width: e.
    """
    return pixels * (7.0 * latent + 10.0), 2.0 * width * pixels * latent + 12.0 * pixels + 8.0 * batch


def channel_modulation_work(pixels: int, channels: int, width: int, shift: bool) -> tuple[float, float]:
    """Return FLOPs and bytes of the modulation.

    F = 3·N·C and Q = 4·e·N·C for (1 + gamma) · attended + residual; with beta 4·N·C and 5·e·N·C.

    Args:
        pixels: N, padded to windows.
        channels: C.
        width: e.
        shift: Whether there is a beta.
    """
    numbers = float(pixels * channels)
    return (4.0 if shift else 3.0) * numbers, (5.0 if shift else 4.0) * width * numbers


def layer_norm_work(pixels: int, channels: int, width: int) -> tuple[float, float]:
    """Return FLOPs and bytes of layer normalisation.

    F = N·(7·C + 4). Each number is added to the mean, centred, squared and added to the variance, multiplied by the
    inverse deviation and the weight, and shifted by the bias. Each pixel needs two divisions, an addition and a root.
    Q = e·(2·N·C + 2·C): x and the parameters are read, the result is written.

    Args:
        pixels: N, padded to windows.
        channels: C.
        width: e.
    """
    return pixels * (7.0 * channels + 4.0), width * (2.0 * pixels * channels + 2.0 * channels)


def convolution_work(pixels: int, channels: int, outputs: int, width: int) -> tuple[float, float]:
    """Return FLOPs and bytes of the first layer of an MLP: layer norm, 1×1 convolution with bias, and GELU.

    F = 2·N·C·O: each pixel has C products and C sums for each of O outputs. Normalisation, bias and GELU are not
    counted, because they need few operations in comparison.
    Q = e·(N·(C + O) + C·O + O + 2·C): x and the parameters are read, the result is written.

    Args:
        pixels: N, padded to windows.
        channels: C.
        outputs: O.
        width: e.
    """
    numbers = pixels * (channels + outputs) + channels * outputs + outputs + 2 * channels
    return 2.0 * pixels * channels * outputs, float(width * numbers)


def channel_gate_work(
    pixels: int, windows: int, channels: int, outputs: int, squeezed: int, width: int
) -> tuple[float, float]:
    """Return FLOPs and bytes of the gate of a channel attention block.

    F = 9·N·C + 2·M·O·(9·C + 2·S): nine shifted sums over the pixels, and three products for each of M windows.
    Q = e·(N·C + 9·C·O + 2·S·O + 2·O + S + M·O): x and the parameters are read, the gates are written.

    Args:
        pixels: N, padded to windows.
        windows: M.
        channels: C, of the input of the convolution.
        outputs: O.
        squeezed: S.
        width: e.
    """
    parameters = 9 * channels * outputs + 2 * squeezed * outputs + 2 * outputs + squeezed
    flops = 9.0 * pixels * channels + 2.0 * windows * outputs * (9 * channels + 2 * squeezed)
    return flops, float(width * (pixels * channels + parameters + windows * outputs))


def guided_projection_work(pixels: int, channels: int, latent: int, width: int, shift: bool) -> tuple[float, float]:
    """Return FLOPs and bytes of `savl.ops.guided_projection`, of whose products alone the FLOPs are.

    Args:
        pixels: Number of pixels of all images.
        channels: Channels of the features.
        latent: Channels of mu.
        width: Bytes per number.
        shift: Whether there is a beta.
    """
    outputs = 2 * channels if shift else channels
    parameters = channels * channels + channels + outputs * latent + outputs
    flops = 2.0 * pixels * (channels * channels + outputs * latent)
    return flops, float(width * (pixels * (3 * channels + latent) + parameters))


def projection_mlp_work(
    pixels: int, windows: int, channels: int, convolved: int, hidden: int, width: int
) -> tuple[float, float]:
    """Return FLOPs and bytes of `savl.ops.projection_mlp`, of whose products alone the FLOPs are.

    Args:
        pixels: Number of pixels of all images.
        windows: Number of parts of the gate's grid in all images.
        channels: Channels of the features.
        convolved: Channels of the input of the convolution.
        hidden: Channels between the layers of the MLP.
        width: Bytes per number.
    """
    products = channels * (channels + 9 * convolved + 2 * hidden)
    parameters = products + 5 * channels + hidden + windows * channels
    return 2.0 * pixels * products, float(width * (pixels * (3 * channels + convolved) + parameters))


def network_calls(
    config: SAVLConfig, *, height: int, width: int, batch: int, dtype: torch.dtype, device: torch.device
) -> list[Call]:
    """Return one call of each op of a network, with random numbers and windows that are not shifted.

    Args:
        config: The network.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        batch: Number of images.
        dtype: Dtype of the network.
        device: Device of the tensors.
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
    hidden = int(channels * config.mlp_ratio)
    expand = partial(
        ops.convolution,
        x,
        normal(hidden, channels),
        normal(hidden),
        norm_weight=weight,
        norm_bias=bias,
        eps=1e-5,
        activation="gelu",
    )
    work = convolution_work(pixels, channels, hidden, size)
    calls.append(Call("convolution", lambda kernels: expand(kernels=kernels), expand.args, *work))
    compressed, squeezed = channels // config.cab_compress, channels // config.cab_squeeze
    down, across = (rows // window, columns // window) if config.cab_neighbourhood else (1, 1)
    square, residual = normal(channels, channels), normal(*features, channels)
    if config.degradation_code != "none" and config.channel_modulation:
        outputs = 2 * channels if config.modulation_shift else channels
        guides = (normal(*features, latent), normal(outputs, latent), normal(outputs))
        guide = partial(ops.guided_projection, x, square, bias, residual, *guides)
        work = guided_projection_work(pixels, channels, latent, size, config.modulation_shift)
        calls.append(Call("guided_projection", lambda kernels: guide(kernels=kernels), guide.args, *work))
    end = partial(
        ops.projection_mlp,
        x,
        square,
        bias,
        residual,
        normal(*features, compressed),
        normal(channels, compressed, 3, 3),
        normal(channels),
        normal(batch, down, across, channels),
        weight,
        bias,
        normal(hidden, channels),
        normal(hidden),
        normal(channels, hidden),
        normal(channels),
        eps=1e-5,
    )
    work = projection_mlp_work(pixels, batch * down * across, channels, compressed, hidden, size)
    calls.append(Call("projection_mlp", lambda kernels: end(kernels=kernels), end.args, *work))
    gate = partial(
        ops.channel_gate,
        normal(*features, compressed),
        normal(channels, compressed, 3, 3),
        normal(channels),
        normal(squeezed, channels),
        normal(squeezed),
        normal(channels, squeezed),
        normal(channels),
        rows=down,
        columns=across,
        neighbourhood=config.cab_neighbourhood or 1,
        scale=config.cab_scale,
    )
    work = channel_gate_work(pixels, batch * down * across, compressed, channels, squeezed, size)
    calls.append(Call("channel_gate", lambda kernels: gate(kernels=kernels), gate.args, *work))
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
    """Measure the ceilings, and every op of a network: eager, and fused where a kernel serves.

    Args:
        config: The network.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        batch: Number of images.
        dtype: Dtype of the network.
        device: Device of the tensors.
        rounds: Number of measurements; the backends of an op take turns.
        matrix: Side of the matrices in the product; None for 8192 on a GPU and 1536 elsewhere.
        copied: Bytes to copy; None for 1 GiB on a GPU and 256 MiB elsewhere.
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
    """Measure the ceilings. A ceiling is the fastest of several measurements, not the median.

    Where float32 products are faster than those of the dtype, as on processors without instructions for it, their
    speed is the ceiling, because kernels may convert their numbers to float32.

    Args:
        dtype: Dtype of the product.
        device: Device to measure.
        rounds: Number of measurements.
        matrix: As in `measure_roofline`.
        copied: As in `measure_roofline`.
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
    """Return seconds per call in each round. The calls take turns, so that other load on the machine affects all.

    Args:
        calls: Calls by name.
        device: Device that they run on.
        rounds: Number of rounds.
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
    """Return the name of the device, for a CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def cpu_name() -> str:
    """Return the name of the processor, as reported by the operating system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []  # not Linux
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]
