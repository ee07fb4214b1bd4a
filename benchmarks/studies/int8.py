"""Measure whether linear layers and the convolutions of CAB should be computed in int8 on a CPU.

    python -m benchmarks.studies.int8 --lr FOLDER --hr FOLDER --calibration FOLDER [--json FILE]

The layers are those of `LAYERS`, which read one row of features per pixel. They are computed by oneDNN with packed
weights: in bfloat16, and in int8 with AVX512-VNNI, with results in bfloat16. Weights are int8, symmetric, with a scale
for each output channel. Activations are uint8 with a scale and a zero point for the whole tensor, either static, from
calibration images, or dynamic, from the minimum and maximum of every input.

Time: each layer alone, and whole networks under bfloat16 autocast with the fused kernels, in which the layers are
replaced. `REST` is the network whose layers return a constant. A layer alone reads its input in bfloat16, or for int8
in float32, because PyTorch quantises no other dtype; in a network, inputs are converted if necessary.

Quality: the network in float32 with weights and inputs of these layers rounded as in int8. Only a trained network is
compared with the originals. A network with random weights is compared with its own results in float32, on tiles.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import savl
from benchmarks import machine
from benchmarks.cases import Run
from benchmarks.timing import time_in_turn
from savl.atomic_write import write_atomically
from savl.evaluation import fidelity
from savl.images.folder import find_images, read_rgb
from savl.images.pairs import match_pairs, read_pair
from savl.network import CONFIGS, SAVL
from savl.weights import shipped

LAYERS = re.compile(r"\.(qkv|proj|mlp\.(expand|contract)|cab\.(compress|expand))$")
SIDE = 64
"""Side of the tile in pixels; a linear layer has as many rows as the tile has pixels."""
BFLOAT16, STATIC, DYNAMIC = "bfloat16", "int8, static", "int8, dynamic"
BFLOAT16_PRODUCT, INT8_PRODUCT = "bfloat16, product alone", "int8, product alone"
"""The input is already in the dtype of the product, as if the operation before had written it in this dtype."""
REST = "without the layers"
BASELINES = {STATIC: BFLOAT16, DYNAMIC: BFLOAT16, INT8_PRODUCT: BFLOAT16_PRODUCT}
PERCENTILES = (100.0, 99.9)
"""Percentiles of the values of a calibration image that are the upper end of a static range; 100 is the maximum."""
RANDOM_IMAGES = 3
"""Number of images that a network with random weights is measured on."""
TOLERANCE = 0.03
"""Largest error of a layer relative to float32, as root mean squares; rounding to int8 causes about 0.013."""

Layer = nn.Linear | nn.Conv2d
Call = Callable[[Tensor], Tensor]
Bounds = tuple[float, float]


def layers_of(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Yield names and layers that the study computes in int8."""
    for name, layer in model.named_modules():
        if LAYERS.search(name):
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            yield name, layer


def kind(layer: Layer) -> str:
    """Return the type of a layer with its numbers of channels, such as ``"linear 48 → 144"``."""
    outputs, inputs = layer.weight.shape[:2]
    return f"{'linear' if isinstance(layer, nn.Linear) else 'conv 3×3'} {inputs} → {outputs}"


# Quantisation


def affine(low: float, high: float) -> tuple[float, int]:
    """Return scale and zero point that map the range from ``low`` to ``high``, and 0, to uint8."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, 1e-12)
    return scale, round(-low / scale)


def bounds_of(x: Tensor) -> Bounds:
    """Return the smallest and the largest value."""
    low, high = x.aminmax()
    return low.item(), high.item()


def weight_scales(layer: Layer) -> Tensor:
    """Return the scale of every output channel, ``(out,)``, with which its largest weight becomes 127."""
    return layer.weight.detach().flatten(1).abs().amax(dim=1).clamp(min=1e-12) / 127


def as_uint8(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Quantise float32 values. `Tensor.int_repr` would copy them, which takes longer than to quantise them."""
    quantised = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
    out = torch.empty(0, dtype=torch.uint8)
    return out.set_(quantised.untyped_storage(), 0, quantised.shape, quantised.stride())


# Time


def why_not_timed() -> str | None:
    """Return why this processor or version of PyTorch cannot run the int8 layers, or None if it can."""
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    missing = [flag for flag in ("avx512_vnni", "avx512_bf16") if not flags.get(flag)]
    private = {
        "mkldnn": (
            "_reorder_linear_weight", "_linear_pointwise", "_reorder_convolution_weight", "_convolution_pointwise",
        ),
        "onednn": ("qlinear_prepack", "qlinear_pointwise", "qconv_prepack", "qconv_pointwise"),
    }  # fmt: skip
    for library, names in private.items():
        missing += [f"torch.ops.{library}.{name}" for name in names if not hasattr(getattr(torch.ops, library), name)]
    missing += [] if hasattr(torch, "quantize_per_tensor") else ["torch.quantize_per_tensor"]  # it is deprecated
    return f"missing: {', '.join(missing)}" if missing else None


def bfloat16_product(layer: Layer, side: int) -> Call:
    """Return a function that computes a layer in bfloat16, ``(1, side, side, in)`` to ``(1, side, side, out)``."""
    weight = layer.weight.detach().bfloat16()
    bias = None if layer.bias is None else layer.bias.detach().bfloat16()
    if isinstance(layer, nn.Linear):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, side * side)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "none")
    size = [1, layer.in_channels, side, side]
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, [1, 1], [1, 1], [1, 1], 1, size)

    def convolve(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x.permute(0, 3, 1, 2), packed, bias, [1, 1], [1, 1], [1, 1], 1, "none", [], "none"
        )
        return out.permute(0, 2, 3, 1)

    return convolve


def int8_product(layer: Layer, side: int) -> Callable[[Tensor, float, int], Tensor]:
    """Return a function of a uint8 input with its scale and zero point that computes a layer; shapes as above."""
    scales = weight_scales(layer)
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    shape = (-1,) + (1,) * (layer.weight.dim() - 1)
    weight = (layer.weight.detach() / scales.view(shape)).round().clamp(-127, 127).to(torch.int8)
    bias = None if layer.bias is None else layer.bias.detach()
    if isinstance(layer, nn.Linear):
        packed = torch.ops.onednn.qlinear_prepack(weight, [side * side, layer.in_features])

        def multiply(x: Tensor, scale: float, zero_point: int) -> Tensor:
            out: Tensor = torch.ops.onednn.qlinear_pointwise(
                x, scale, zero_point, packed, scales, zeros, bias, 1.0, 0, torch.bfloat16, "none", [], ""
            )
            return out

        return multiply
    size = [1, layer.in_channels, side, side]
    # The weights are packed for any zero point but 0; scale and zero point of the input are arguments of every call.
    packed = torch.ops.onednn.qconv_prepack(weight, scales, 1.0, 128, [1, 1], [1, 1], [1, 1], 1, size)

    def convolve(x: Tensor, scale: float, zero_point: int) -> Tensor:
        out: Tensor = torch.ops.onednn.qconv_pointwise(
            x.permute(0, 3, 1, 2), scale, zero_point, packed, scales, zeros, bias, [1, 1], [1, 1], [1, 1], 1,
            1.0, 0, torch.bfloat16, "none", [], "",
        )  # fmt: skip
        return out.permute(0, 2, 3, 1)

    return convolve


@functools.cache
def features(channels: int, side: int) -> Tensor:
    """Return ``(1, side, side, channels)`` standard normal values, float32."""
    return torch.randn(1, side, side, channels, generator=torch.Generator().manual_seed(channels))


def variants(layer: Layer, side: int) -> dict[str, Call]:
    """Return functions of ``(1, side, side, in)`` that compute a layer, with the range of `features` if static."""
    outputs, inputs = layer.weight.shape[:2]
    x = features(inputs, side)
    narrow, quantised = bfloat16_product(layer, side), int8_product(layer, side)
    static = affine(*bounds_of(x))
    x_bfloat16, x_uint8 = x.bfloat16(), as_uint8(x, *static)
    constant = features(outputs, side).bfloat16()

    def dynamic(x: Tensor) -> Tensor:
        x = x.float()
        found = affine(*bounds_of(x))
        return quantised(as_uint8(x, *found), *found)

    return {
        BFLOAT16: lambda x: narrow(x.bfloat16()),
        STATIC: lambda x: quantised(as_uint8(x.float(), *static), *static),
        DYNAMIC: dynamic,
        BFLOAT16_PRODUCT: lambda x: narrow(x_bfloat16),
        INT8_PRODUCT: lambda x: quantised(x_uint8, *static),
        REST: lambda x: constant,
    }


def medians(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median time of each call in seconds, the calls in turn."""
    times, failed = time_in_turn(calls, Run(torch.device("cpu"), torch.float32, SIDE), rounds)
    if failed:
        raise RuntimeError(f"not timed: {failed}")
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def layer_times(layer: Layer, side: int, rounds: int) -> dict[str, float]:
    """Return the median time of each variant of a layer in seconds, except `REST`.

    Args:
        layer: A layer that is selected by `LAYERS`.
        side: Side of the image that it computes, in pixels.
        rounds: Number of measurements.

    Raises:
        ArithmeticError: A variant computes something else than the layer.
    """
    x = features(layer.weight.shape[1], side)
    inputs = {BFLOAT16: x.bfloat16()}
    calls = {name: call for name, call in variants(layer, side).items() if name not in (REST, BFLOAT16_PRODUCT)}
    exact = layer(x)
    for name, call in calls.items():
        error = (call(inputs.get(name, x)) - exact).norm() / exact.norm()
        if not error < TOLERANCE:
            raise ArithmeticError(f"{kind(layer)}, {name}: relative error {error:.3f}, allowed {TOLERANCE}")
    return medians({name: functools.partial(call, inputs.get(name, x)) for name, call in calls.items()}, rounds)


class Replacement(nn.Module):
    """A layer with several variants, of which `chosen` is computed."""

    chosen = BFLOAT16

    def __init__(self, layer: Layer, calls: Mapping[str, Call]) -> None:
        super().__init__()
        self.calls = calls
        self.weight, self.bias = layer.weight, layer.bias

    def forward(
        self,
        x: Tensor,
        norm: nn.Module | None = None,
        *,
        activation: str = "none",
        residual: Tensor | None = None,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Map ``(1, side, side, in)`` to ``(1, side, side, out)``, with torch's operations around the layer."""
        y = self.calls[self.chosen](x if norm is None else norm(x))
        y = F.gelu(y) if activation == "gelu" else y
        if gamma is not None:
            y = y + gamma * y + (0 if beta is None else beta)
        if gate is not None:
            side = y.shape[1] // gate.shape[1]
            y = y * gate.repeat_interleave(side, 1).repeat_interleave(side, 2)
        return y if residual is None else residual + y


def layer_input(inputs: tuple[Any, ...]) -> Tensor:
    """Return what a layer multiplies, given its positional arguments: features, and perhaps a normalisation."""
    x: Tensor = inputs[0]
    return x if len(inputs) == 1 or inputs[1] is None else inputs[1](x)


@torch.no_grad()
def network_times(model: SAVL, side: int, rounds: int) -> dict[str, float]:
    """Return the median time of a tile in seconds, by variant of the layers.

    Args:
        model: The network.
        side: Side of the tile in pixels, a multiple of the window.
        rounds: Number of measurements.
    """
    model = copy.deepcopy(model)
    replaced = []
    for name, layer in list(layers_of(model)):
        replaced.append(Replacement(layer, variants(layer, side)))
        model.set_submodule(name, replaced[-1])
    lr = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))

    def compute(variant: str) -> Tensor:
        for layer in replaced:
            layer.chosen = variant
        with torch.autocast("cpu", torch.bfloat16):
            sr: Tensor = model(lr)
        return sr

    return medians({name: functools.partial(compute, name) for name in replaced[0].calls}, rounds)


def measure_times(model: SAVL, side: int, rounds: int) -> dict[str, Any]:
    """Return the times of the layers and of a tile of a network in seconds, by variant.

    Returns:
        ``layers``: by kind, the times and the number of such layers; ``tile``: the times; and ``estimated``: the same
        as the sum of `REST` and of the times of the layers alone.
    """
    layers = {kind(layer): layer for _, layer in layers_of(model)}
    counts = Counter(kind(layer) for _, layer in layers_of(model))
    alone = {name: layer_times(layer, side, rounds) for name, layer in layers.items()}
    tile = network_times(model, side, max(rounds // 4, 1))
    estimated = {
        variant: tile[REST] + sum(count * alone[name][variant] for name, count in counts.items())
        for variant in (BFLOAT16, STATIC, DYNAMIC, INT8_PRODUCT)
    }
    return {
        "layers": {name: {"count": counts[name], "seconds": times} for name, times in alone.items()},
        "tile": tile,
        "estimated": estimated,
    }


# Quality


@torch.no_grad()
def calibrated(model: nn.Module, images: Sequence[Tensor]) -> dict[float, dict[str, Bounds]]:
    """Return the ranges of the inputs of the layers, by percentile and by name of the layer.

    The range of one image leaves out as many of the largest as of the smallest values. The range of a layer covers
    those of all images.

    Args:
        model: The network.
        images: ``(3, h, w)`` in [0, 1].
    """
    found: dict[float, dict[str, Bounds]] = {percentile: {} for percentile in PERCENTILES}

    def observe(name: str, x: Tensor) -> None:
        values = x.flatten(0, -2)[:: math.ceil(x.numel() / 2**17)].flatten()  # all channels of some of the pixels
        for percentile, ranges in found.items():
            share = percentile / 100
            low, high = values.quantile(torch.tensor([1 - share, share])).tolist() if share < 1 else bounds_of(x)
            before = ranges.get(name, (low, high))
            ranges[name] = min(low, before[0]), max(high, before[1])

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: observe(name, layer_input(inputs)))
        for name, layer in layers_of(model)
    ]
    for image in images:
        model(image[None])
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def simulated(model: nn.Module, ranges: Mapping[str, Bounds] | None) -> nn.Module:
    """Return a network in float32 with weights and inputs of the layers rounded as in int8.

    Args:
        model: The network, which is copied.
        ranges: Range of the input of every layer, by name; None for those of each input.
    """
    model = copy.deepcopy(model)

    def rounded(x: Tensor, bounds: Bounds | None) -> Tensor:
        scale, zero_point = affine(*(bounds or bounds_of(x)))
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)

    for name, layer in layers_of(model):
        scales = weight_scales(layer)
        zeros = torch.zeros(len(scales), dtype=torch.int32)
        layer.weight.copy_(torch.fake_quantize_per_channel_affine(layer.weight, scales, zeros, 0, -127, 127))
        bounds = None if ranges is None else ranges[name]

        def round_input(_: nn.Module, inputs: tuple[Any, ...], bounds: Bounds | None = bounds) -> tuple[Any, ...]:
            return rounded(layer_input(inputs), bounds), *([None] * (len(inputs) - 1))

        layer.register_forward_pre_hook(round_input)
    return model


@torch.inference_mode()
def measure_quality(
    model: SAVL, calibration: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor | None]]
) -> dict[str, dict[str, float]]:
    """Compare a network in bfloat16 and in simulated int8 with the network in float32, means over images.

    Args:
        model: The network.
        calibration: ``(3, h, w)`` images in [0, 1] that set the static ranges.
        pairs: ``(3, h, w)`` images and their originals ``(3, scale·h, scale·w)``, in [0, 1]; None without an original.

    Returns:
        By variant, ``float32`` in dB: PSNR against the result in float32, all channels. With originals also
        ``psnr_y``: PSNR of luma; and ``lost``: how much lower it is than in float32.
    """
    networks: dict[str, nn.Module] = {"float32": model, BFLOAT16: model, DYNAMIC: simulated(model, None)}
    for percentile, ranges in calibrated(model, calibration).items():
        networks[f"{STATIC}, {percentile:g} %"] = simulated(model, ranges)
    scores: dict[str, dict[str, list[float]]] = {name: {"float32": [], "psnr_y": [], "lost": []} for name in networks}
    for lr, hr in pairs:
        exact = psnr_y = None
        for name, network in networks.items():
            with torch.autocast("cpu", torch.bfloat16) if name == BFLOAT16 else nullcontext():
                sr = network(lr[None])[0].float()
            found = scores[name]
            exact = sr if exact is None else exact
            if name != "float32":
                found["float32"].append(-10 * math.log10(max(F.mse_loss(sr, exact).item(), 1e-20)))
            if hr is not None:
                own = fidelity(sr.clamp(0, 1), hr, crop=model.config.scale).psnr_y
                psnr_y = own if psnr_y is None else psnr_y
                found["psnr_y"].append(own)
                found["lost"].append(psnr_y - own)
    means = {
        name: {score: statistics.fmean(values) for score, values in found.items() if values}
        for name, found in scores.items()
    }
    return {name: found for name, found in means.items() if found}


# Output


def table(results: Mapping[str, Any]) -> str:
    """Return the results as a Markdown table; int8 times are followed by the speedup over bfloat16."""
    columns = (BFLOAT16, STATIC, DYNAMIC, BFLOAT16_PRODUCT, INT8_PRODUCT)
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]

    def add_times(label: str, seconds: Mapping[str, float], factor: float, digits: int) -> None:
        cells = []
        for name in columns:
            cell = f"{factor * seconds[name]:.{digits}f}" if name in seconds else ""
            baseline = seconds.get(BASELINES.get(name, ""), seconds[BFLOAT16])
            cells.append(f"{cell} ({baseline / seconds[name]:.2f})" if cell and name in BASELINES else cell)
        lines.append(f"| {label} | {' | '.join(cells)} |")

    for network, found in results.items():
        if times := found.get("times"):
            for name, layer in times["layers"].items():
                add_times(f"{network}, {name}, {layer['count']} times, µs", layer["seconds"], 1e6, 0)
            add_times(f"{network}, tile, estimated, ms", times["estimated"], 1e3, 1)
            add_times(f"{network}, tile, measured, ms ({1e3 * times['tile'][REST]:.1f} {REST})", times["tile"], 1e3, 1)
        quality = found["quality"]
        for score, label in (("lost", "loss of PSNR-Y"), ("float32", "PSNR against float32")):
            for percentile in PERCENTILES:
                names = (BFLOAT16, f"{STATIC}, {percentile:g} %", DYNAMIC)
                if score in quality[BFLOAT16]:
                    cells = [f"{quality[name][score]:.3f}" for name in names]
                    lines.append(f"| {network}, {label}, ranges of {percentile:g} %, dB | {' | '.join(cells)} | | |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the results and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", required=True, metavar="FOLDER", help="low-resolution images")
    parser.add_argument("--hr", required=True, metavar="FOLDER", help="their originals, with the same names")
    parser.add_argument("--calibration", required=True, metavar="FOLDER", help="other low-resolution images")
    parser.add_argument(
        "--networks", nargs="+", default=["savl-tiny", "hat-s"], metavar="NAME",
        help="shipped weights, files, or configurations, which get random weights",
    )  # fmt: skip
    parser.add_argument("--side", type=int, default=SIDE, metavar="N", help="side of the tile in pixels")
    parser.add_argument("--rounds", type=int, default=40, metavar="N", help="measurements of each layer")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")  # deprecated, see `why_not_timed`
    reason = why_not_timed()
    results: dict[str, Any] = {}
    calibration = [read_rgb(path) for path in find_images([options.calibration], argument="--calibration")]
    for name in options.networks:
        torch.manual_seed(0)
        trained = name in shipped() or name not in CONFIGS
        model = (savl.load(name) if trained else savl.build(name)).eval()
        savl.use_fused_kernels(model=model)
        images = calibration
        pairs: list[tuple[Tensor, Tensor | None]]
        pairs = [read_pair(pair, model.config.scale) for pair in match_pairs(options.lr, options.hr)]
        if not trained:
            images = [image[:, : options.side, : options.side] for image in calibration]
            pairs = [(lr[:, : options.side, : options.side], None) for lr, _ in pairs[:RANDOM_IMAGES]]
        results[name] = {"quality": measure_quality(model, images, pairs)}
        if reason is None:
            results[name]["times"] = measure_times(model, options.side, options.rounds)
    print(table(results))
    if reason is not None:
        print(f"Times were not measured, {reason}")
    if options.json is not None:
        report = {"machine": machine.facts(), "side": options.side, "networks": results}
        write_atomically(options.json, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
