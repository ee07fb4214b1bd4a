"""Benchmark cases: ops, blocks, networks and training steps, on any device and in any dtype.

A case has several variants, which compute the same results from the same inputs in different ways, such as eager,
fused or compiled. `benchmarks.timing` compares their results before it times them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

import savl
from benchmarks.peers import flex, runtimes, sdpa
from savl.inference.graphs import Capture, CudaCapture
from savl.network import CONFIGS, SAVL
from savl.network.dsca import DSCA
from savl.network.rhag import DARHAG, HAB, OCAB
from savl.ops import KernelSettings
from savl.ops.case import Draw
from savl.ops.library import EAGER as EAGER_BACKEND
from savl.ops.op import OPS, why_unavailable
from savl.weights import shipped

EAGER = KernelSettings.of(False)
FUSED_BFLOAT16 = "fused, bfloat16"
"""Name of the variant with fused kernels under bfloat16 autocast."""
FUSED_COMPILED, FUSED_GRAPH = "fused, compiled", "fused, CUDA graph"
"""Names of the variants of fused kernels under torch.compile, and replayed as a CUDA graph."""
FLOAT32_ONLY = (*runtimes.VARIANTS, FUSED_BFLOAT16)
WINDOW, CHANNELS, LATENT = 16, 144, 64
"""Window size in pixels, channels, and channels of the degradation code of savl-base, for benchmarks of its blocks."""
Result = Tensor | Sequence[Tensor]


class NotAvailableError(RuntimeError):
    """A variant cannot be measured on this device or with these settings."""


@dataclass(frozen=True)
class Run:
    """Device, dtype and size to measure with."""

    device: torch.device
    dtype: torch.dtype
    side: int
    """Side of the image in tokens; a multiple of 16."""
    compiled: bool = True
    """Whether to measure ops and blocks under torch.compile, which compiles them quickly."""
    precomputed_masks: bool = False
    """Whether to also measure SDPA with precomputed masks, whose memory grows with the image."""

    @property
    def cuda(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.type == "cuda"

    @property
    def reference_dtype(self) -> torch.dtype:
        """Dtype of the reference: float64 for float32, and float32 for 16-bit types, to save memory."""
        return torch.float64 if self.dtype == torch.float32 else torch.float32

    def draw(self, *shape: int, seed: int, uniform: bool = False) -> Tensor:
        """Return random numbers, the same on every device: uniform in [0, 1), or standard normal."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.rand(shape, generator=generator) if uniform else torch.randn(shape, generator=generator)
        return values.to(self.device, self.dtype)

    def fused(self) -> KernelSettings:
        """Return settings that name the fused kernels of the device, so that an unavailable kernel raises an error."""
        kind = self.device.type
        return KernelSettings(**{name: op.backend_for(kind) or EAGER_BACKEND for name, op in OPS.items()})

    def fused_in_networks(self) -> dict[str, str | bool]:
        """Return settings for whole networks, not every call of which a kernel with limits can serve.

        Such a kernel serves the others.

        Raises:
            NotAvailableError: A fused kernel of the device cannot be used at all.
        """
        settings: dict[str, str | bool] = dict(vars(self.fused()))
        for name, backend in settings.items():
            if backend == EAGER_BACKEND:
                continue
            assert isinstance(backend, str)
            if (missing := why_unavailable(name, backend)) is not None:
                raise NotAvailableError(f"{name} · {backend}: {missing}")
            if OPS[name].backends[backend] is not None:
                settings[name] = True
        return settings


@dataclass(frozen=True)
class BenchmarkCase:
    """One computation and the variants that compute it.

    Attributes:
        title: Name of the computation.
        inputs: Inputs of every variant.
        variants: Functions of the inputs, by name, eager first. They are compiled when they are first called.
        reference_dtype: Dtype in which eager computes the reference; None to use the result of eager as it is.
        backward: Whether gradients of all inputs are computed too.
        moved: Number of bytes that must be read and written.
        flops: Number of multiplications and additions in matrix products.
        bandwidth_bound: Whether memory bandwidth limits the time; it is then compared with a copy of as many bytes.
        skipped: Reasons, by name, why this run omits a variant.
        items: Number of images per call.
        precisions: Dtype, by name, of variants that compute in a lower precision than that of the inputs.
    """

    title: str
    inputs: tuple[Tensor, ...]
    variants: Mapping[str, Callable[..., Result]]
    reference_dtype: torch.dtype | None
    backward: bool = False
    moved: float = 0.0
    flops: float = 0.0
    bandwidth_bound: bool = False
    skipped: Mapping[str, str] = field(default_factory=dict)
    items: int = 1
    precisions: Mapping[str, torch.dtype] = field(default_factory=dict)

    def only(self, variants: Sequence[str]) -> BenchmarkCase:
        """Return the case with the given variants and eager only."""
        kept = {name: call for name, call in self.variants.items() if name in variants or name == "eager"}
        return replace(
            self, variants=kept, skipped={name: self.skipped[name] for name in variants if name in self.skipped}
        )


# Ops


def op_case(run: Run, name: str, backward: bool = False, title: str | None = None, **options: Any) -> BenchmarkCase:
    """Return the benchmark of an op (`savl.ops.op.Op.benchmark`), with variants eager, fused, compiled and baselines.

    The baselines of an op are the functions of its name in `benchmarks.peers.sdpa` and `benchmarks.peers.flex`.

    Args:
        run: Device, dtype and size.
        name: Name of the op.
        backward: Whether gradients of all inputs are computed too.
        title: Name of the case; None for the title of the op.
        options: Options of the benchmark.
    """
    op = OPS[name]
    assert op.benchmark is not None
    problem = op.benchmark(Draw(run.dtype), run.side, **options)
    names = [each for each, value in problem.arguments.items() if value is not None]
    absent = {each: None for each, value in problem.arguments.items() if value is None}
    inputs = tuple(value.to(run.device) for value in problem.arguments.values() if value is not None)

    def call(*tensors: Tensor, kernels: KernelSettings) -> Result:
        given = dict(zip(names, tensors, strict=True))
        result: Result = op.function(**given, **absent, **problem.options, kernels=kernels)
        return result if isinstance(result, Tensor) else result[: problem.outputs]

    variants: dict[str, Callable[..., Result]] = {"eager": partial(call, kernels=EAGER)}
    if hasattr(sdpa, name):
        variants |= _sdpa_variants(run, name, inputs, problem.options, backward)
    variants["fused"] = partial(call, kernels=run.fused())
    if run.compiled:
        variants["compile"] = torch.compile(partial(call, kernels=EAGER), dynamic=False)
        if hasattr(flex, name):
            variants["flex"] = torch.compile(_flex_variant(run, name, problem.options), dynamic=False)
    skipped = () if run.compiled else ("compile", "flex") if hasattr(flex, name) else ("compile",)
    return BenchmarkCase(
        f"{title or op.title}, forward{' and backward' if backward else ''}",
        inputs,
        variants,
        torch.float64 if problem.bandwidth_bound else run.reference_dtype,
        backward,
        problem.moved + (problem.moved_backward if backward else 0.0),
        problem.flops + (problem.flops_backward if backward else 0.0),
        bandwidth_bound=problem.bandwidth_bound,
        skipped=dict.fromkeys(skipped, "torch.compile was switched off"),
    )


def _sdpa_variants(
    run: Run, name: str, inputs: tuple[Tensor, ...], options: Mapping[str, Any], backward: bool
) -> dict[str, Callable[..., Result]]:
    """Return variants of an attention op that use `torch.nn.functional.scaled_dot_product_attention`."""
    baseline = partial(getattr(sdpa, name), **options, backend=_efficient(run))
    variants: dict[str, Callable[..., Result]] = {"sdpa": baseline}
    if run.cuda:
        variants["sdpa, padded"] = partial(baseline, padded_head_dim=32)
    if run.precomputed_masks and not backward:
        table = next(value for value in inputs if value.dim() == 2)
        window, shift = options["window"], options.get("shift", 0)
        mask = sdpa.folded_mask(table, run.side, run.side, window, options.get("key_window", window), shift)
        variants["sdpa, mask kept"] = partial(baseline, kept=mask)
    return variants


def _flex_variant(run: Run, name: str, options: Mapping[str, Any]) -> Callable[..., Result]:
    """Return an attention op that uses `torch.nn.attention.flex_attention`, with a precomputed block mask."""
    function, masks = getattr(flex, name), {}
    if shift := options.get("shift", 0):
        masks["block_mask"] = flex.shift_block_mask(run.side, run.side, options["window"], shift, device=run.device)

    def compute(*tensors: Tensor) -> Tensor:
        result: Tensor = function(*tensors, **options, **masks)
        return result

    return compute


def _efficient(run: Run) -> SDPBackend | None:
    return SDPBackend.EFFICIENT_ATTENTION if run.cuda else None


# Blocks


def block(run: Run, name: str) -> BenchmarkCase:
    """Return the benchmark of one block of savl-base.

    Args:
        run: Device, dtype and size.
        name: ``"DSCA"``, ``"HAB"``, ``"OCAB"`` or ``"DA-RHAG"``.
    """
    torch.manual_seed(0)
    config = CONFIGS["savl-base"]
    modules: dict[str, nn.Module] = {
        "DSCA": DSCA(config, shift=WINDOW // 2),
        "HAB": HAB(config, shift=WINDOW // 2, drop_path=0.0),
        "OCAB": OCAB(config),
        "DA-RHAG": DARHAG(config, [0.0] * config.depths[0]),
    }
    inputs = (run.draw(1, run.side, run.side, CHANNELS, seed=14),)
    if name in ("DSCA", "DA-RHAG"):
        severity = 2 * run.draw(1, run.side, run.side, seed=16, uniform=True)
        inputs = (*inputs, run.draw(1, run.side, run.side, LATENT, seed=15), severity)
    return _module(run, name, modules[name], inputs)


def _module(run: Run, title: str, module: nn.Module, inputs: tuple[Tensor, ...], items: int = 1) -> BenchmarkCase:
    """Return the benchmark of a module in evaluation mode, with variants eager, SDPA, fused, compiled and captured."""
    reference = module.eval().to(run.device).requires_grad_(False)
    measured = copy.deepcopy(reference).to(run.dtype)
    if run.reference_dtype == torch.float64:
        reference = copy.deepcopy(reference).double()

    def eager(*given: Tensor) -> Tensor:
        with savl.use_fused_kernels(False):
            return measured(*given) if given[0].dtype == run.dtype else _without_tf32(reference, *given)

    def with_sdpa(*given: Tensor) -> Tensor:
        padded = 32 if run.cuda else None
        with savl.use_fused_kernels(False), sdpa.in_every_network(padded_head_dim=padded, backend=_efficient(run)):
            result: Tensor = measured(*given)
        return result

    def with_fused(*given: Tensor) -> Tensor:
        with savl.use_fused_kernels(**run.fused_in_networks()):
            result: Tensor = measured(*given)
        return result

    def compiled(mode: str, fused: bool = False) -> Callable[..., Tensor]:
        by_inductor = torch.compile(measured, dynamic=False, mode=mode)

        def call(*given: Tensor) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            with savl.use_fused_kernels(**run.fused_in_networks()) if fused else savl.use_fused_kernels(False):
                result: Tensor = by_inductor(*given)
            return result

        return call

    variants: dict[str, Callable[..., Result]] = {
        "eager": eager,
        "sdpa": with_sdpa,
        "fused": with_fused,
        FUSED_COMPILED: compiled("default", fused=True),
        "compile": compiled("default"),
        "compile, max-autotune": compiled("max-autotune"),
    }
    skipped = {}
    capture = graph_capture(run)
    if capture is not None:
        variants[FUSED_GRAPH] = _replayed(with_fused, inputs, capture)
    else:
        skipped[FUSED_GRAPH] = "CUDA graphs need a CUDA GPU"
    return BenchmarkCase(title, inputs, variants, run.reference_dtype, skipped=skipped, items=items)


def _without_tf32(model: nn.Module, *given: Tensor) -> Tensor:
    """Call a module with convolutions in float32, for which cuDNN uses TF32 by default."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        result: Tensor = model(*given)
    finally:
        convolutions.fp32_precision = before
    return result


def graph_capture(run: Run) -> Capture | None:
    """Return what records CUDA graphs on the device, or None."""
    return CudaCapture(run.device) if run.cuda else None


def _replayed(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], capture: Capture) -> Callable[..., Tensor]:
    """Return a function that replays the call as a CUDA graph, which is captured at the first call.

    The graph always computes from ``inputs``; the arguments of the returned function are ignored.
    """
    captured: list[tuple[Callable[[], object], Tensor]] = []

    def replay(*given: Tensor) -> Tensor:
        if not captured:
            captured.append(capture.record(lambda: call(*inputs)))
        again, out = captured[0]
        again()
        return out

    return replay


# Networks


def network(run: Run, name: str, batch: int = 1) -> BenchmarkCase:
    """Return the benchmark of a network on a batch of tiles, on a CPU also with the runtimes of `benchmarks.peers`."""
    lr = run.draw(batch, 3, run.side, run.side, seed=12, uniform=True)
    title = f"{name}, {run.side}×{run.side}" + (f", batch of {batch}" if batch > 1 else "")
    model = _weighted(name)
    case = _module(run, title, model, (lr,), batch)
    if run.cuda or run.dtype != torch.float32:
        reasons = dict.fromkeys(FLOAT32_ONLY, "measured in runs on a CPU with a float32 network")
        return replace(case, skipped={**case.skipped, **reasons})

    def in_bfloat16(given: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = case.variants["fused"](given)
        return result

    precisions = {FUSED_BFLOAT16: torch.bfloat16}
    left_out = runtimes.unavailable()
    if runtimes.OPENVINO_DEFAULT not in left_out:
        precisions[runtimes.OPENVINO_DEFAULT] = runtimes.default_precision()
    return replace(
        case,
        variants={**case.variants, **runtimes.calls(model, lr), FUSED_BFLOAT16: in_bfloat16},
        skipped={**case.skipped, **left_out},
        precisions=precisions,
    )


def _weighted(name: str) -> nn.Module:
    """Return a network with its shipped weights, or with random ones if it has none.

    Random weights do not affect the time. But savl-tiny without training is exactly bicubic interpolation, whatever its
    attention computes, so that errors would not show.
    """
    torch.manual_seed(0)
    return savl.load(name) if name in shipped() else savl.build(name)


def without_groups(run: Run, name: str) -> BenchmarkCase:
    """Return the benchmark of what a network does besides its groups: estimator, first and last layers, upsampler."""
    torch.manual_seed(0)
    model = SAVL(replace(CONFIGS[name], depths=(1,)))
    model.groups = nn.ModuleList()
    lr = run.draw(1, 3, run.side, run.side, seed=12, uniform=True)
    return _module(run, f"{name} without its groups", model, (lr,))


def image(run: Run, name: str, pixels: int = 2**20, tile: int = 256) -> BenchmarkCase:
    """Return the benchmark of upscaling a square image of about ``pixels`` pixels in tiles, as `savl.upscale` does."""
    model = _weighted(name).eval().to(run.device)
    side = math.isqrt(pixels)
    lr = Run(run.device, torch.float32, side).draw(1, 3, side, side, seed=17, uniform=True)

    def upscale(given: Tensor, **settings: Any) -> Tensor:
        with savl.use_fused_kernels(**settings) if settings else savl.use_fused_kernels(False):
            upscaler = savl.Upscaler(model, tile=tile, dtype=run.dtype)
            return upscaler(given).sr

    variants: dict[str, Callable[..., Result]] = {
        "eager": upscale,
        "fused": lambda given: upscale(given, **run.fused_in_networks()),
    }
    return BenchmarkCase(f"{name}, {side}×{side} in tiles of {tile}", (lr,), variants, None)


def training_step(run: Run, name: str, batch: int = 2) -> BenchmarkCase:
    """Return the benchmark of a forward and backward pass in training, with an L1 loss and without an optimiser.

    On a CPU in float32, a variant in bfloat16 is measured too.
    """
    torch.manual_seed(0)
    model = savl.build(name).to(run.device).train()
    lr = run.draw(batch, 3, run.side, run.side, seed=18, uniform=True)
    hr = run.draw(batch, 3, 4 * run.side, 4 * run.side, seed=19, uniform=True)
    parameters = list(model.parameters())

    def step(given: Tensor, dtype: torch.dtype = run.dtype, **settings: Any) -> Result:
        torch.manual_seed(1)  # stochastic depth and the posterior's noise
        with savl.use_fused_kernels(**settings) if settings else savl.use_fused_kernels(False), torch.enable_grad():
            with torch.autocast(run.device.type, dtype, enabled=dtype != torch.float32):
                loss = (model(given) - hr).abs().mean()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norm = torch.stack([each.float().norm() for each in gradients if each is not None])
        return loss.detach().float(), norm

    def fused(given: Tensor, dtype: torch.dtype = run.dtype) -> Result:
        return step(given, dtype, **run.fused_in_networks())

    variants: dict[str, Callable[..., Result]] = {"eager": step, "fused": fused}
    precisions = {}
    if not run.cuda and run.dtype == torch.float32:
        variants[FUSED_BFLOAT16] = partial(fused, dtype=torch.bfloat16)
        precisions[FUSED_BFLOAT16] = torch.bfloat16
    title = f"{name}, training step, {batch} of {run.side}×{run.side}"
    return BenchmarkCase(title, (lr,), variants, None, items=batch, precisions=precisions)
