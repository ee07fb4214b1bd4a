"""What is measured: ops, blocks, networks, a training step; each several ways, on any device and in any dtype.

Every way of a case computes the same numbers from the same inputs; `benchmarks.timing` sees to that before it times
anything.
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
from benchmarks.peers import flex, sdpa
from savl import ops
from savl.network import CONFIGS
from savl.network.dsca import DSCA
from savl.network.rhag import HAB, OCAB
from savl.ops.switch import BACKENDS, FUSED, OPS, KernelSettings

EAGER = KernelSettings.of(False)
WINDOW, KEY_WINDOW, HEADS, CHANNELS, LATENT = 16, 24, 6, 144, 64
"""Of savl-base, whose shapes the ops and blocks have."""
Result = Tensor | Sequence[Tensor]


class NotHereError(RuntimeError):
    """Something that this device or run does not have."""


@dataclass(frozen=True)
class Run:
    """Where and on what to measure."""

    device: torch.device
    dtype: torch.dtype
    side: int
    """Tokens along a side of the image; a multiple of 16."""
    compiled: bool = True
    """Whether to compile what torch.compile compiles quickly: single ops and blocks."""
    kept_masks: bool = False
    """Whether SDPA is also handed finished masks, which take memory that grows with the image."""

    @property
    def cuda(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.type == "cuda"

    @property
    def wide(self) -> torch.dtype:
        """Dtype of references that would take too much memory in float64."""
        return torch.float64 if self.dtype == torch.float32 else torch.float32

    def draw(self, *shape: int, seed: int, uniform: bool = False) -> Tensor:
        """Random numbers, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.rand(shape, generator=generator) if uniform else torch.randn(shape, generator=generator)
        return values.to(self.device, self.dtype)

    def fused(self) -> KernelSettings:
        """The fused kernels of the device by name: what cannot serve raises instead of falling back on eager."""
        kind = self.device.type
        chosen: dict[str, Any] = {op: next(name for name in BACKENDS[op] if FUSED[name].device == kind) for op in OPS}
        return KernelSettings(**chosen)


@dataclass(frozen=True)
class BenchmarkCase:
    """One computation, several ways.

    Attributes:
        what: What is computed.
        inputs: What it is computed from.
        variants: Ways to compute it from the inputs, eager first. Nothing is compiled before it is called.
        wide: Dtype of the reference; None where eager itself is the reference.
        backward: Whether gradients of all inputs are computed too.
        moved: Bytes that must be read and written.
        flops: Multiplications and additions of the products.
        copied: Whether bytes are what bounds it, so that copying as many is a peer.
        absent: Variants that this run leaves out, and why.
        items: Images of a call.
    """

    what: str
    inputs: tuple[Tensor, ...]
    variants: Mapping[str, Callable[..., Result]]
    wide: torch.dtype | None
    backward: bool = False
    moved: float = 0.0
    flops: float = 0.0
    copied: bool = False
    absent: Mapping[str, str] = field(default_factory=dict)
    items: int = 1

    def only(self, variants: Sequence[str]) -> BenchmarkCase:
        """The case with some of its variants, and eager."""
        kept = {name: call for name, call in self.variants.items() if name in variants or name == "eager"}
        return replace(
            self, variants=kept, absent={name: self.absent[name] for name in variants if name in self.absent}
        )


# Ops


def window(run: Run, backward: bool = False) -> BenchmarkCase:
    """Window attention of savl-base: 16×16 windows, shift 8, 6 heads of 24, severity."""
    side = run.side
    inputs = (
        run.draw(1, side, side, 3 * CHANNELS, seed=0),
        run.draw((2 * WINDOW - 1) ** 2, HEADS, seed=1),
        2 * run.draw(1, side, side, seed=2, uniform=True),
    )
    call = partial(ops.window_attention, window=WINDOW, shift=WINDOW // 2)
    peer = partial(sdpa.window_attention, window=WINDOW, shift=WINDOW // 2, backend=_efficient(run))
    variants = _with_peers(run, call, peer)
    if run.kept_masks and not backward:
        mask = sdpa.folded_mask(inputs[1], side, side, WINDOW, WINDOW, WINDOW // 2)
        variants["sdpa, mask kept"] = partial(peer, kept=mask)
    if run.compiled:
        kept = flex.shift_block_mask(side, side, WINDOW, WINDOW // 2, device=run.device)

        def by_flex(qkv: Tensor, table: Tensor, severity: Tensor) -> Tensor:
            return flex.window_attention(qkv, table, severity, window=WINDOW, shift=WINDOW // 2, block_mask=kept)

        variants["flex"] = torch.compile(by_flex, dynamic=False)
    # Pairs that see each other: along an axis, the last window of a shifted image is cut in two.
    runs = [WINDOW] * (side // WINDOW - 1) + [WINDOW // 2] * 2
    return _attention("window attention", run, inputs, variants, sum(length**2 for length in runs) ** 2, backward)


def overlapping(run: Run, backward: bool = False) -> BenchmarkCase:
    """Overlapping attention of savl-base: 24×24 keys for 16×16 queries, 6 heads of 24."""
    side = run.side
    inputs = (
        run.draw(1, side, side, CHANNELS, seed=3),
        run.draw(1, side, side, 2 * CHANNELS, seed=4),
        run.draw((WINDOW + KEY_WINDOW - 1) ** 2, HEADS, seed=5),
    )
    call = partial(ops.overlapping_window_attention, window=WINDOW, key_window=KEY_WINDOW)
    windows = {"window": WINDOW, "key_window": KEY_WINDOW}
    peer = partial(sdpa.overlapping_window_attention, **windows, backend=_efficient(run))
    variants = _with_peers(run, call, peer)
    if run.kept_masks and not backward:
        variants["sdpa, mask kept"] = partial(peer, kept=sdpa.folded_mask(inputs[2], side, side, WINDOW, KEY_WINDOW, 0))
    if run.compiled:
        variants["flex"] = torch.compile(partial(flex.overlapping_window_attention, **windows), dynamic=False)
    return _attention("overlapping attention", run, inputs, variants, side**2 * KEY_WINDOW**2, backward)


def _efficient(run: Run) -> SDPBackend | None:
    return SDPBackend.EFFICIENT_ATTENTION if run.cuda else None


def _with_peers(run: Run, call: Callable[..., Tensor], peer: Callable[..., Tensor]) -> dict[str, Callable[..., Result]]:
    variants: dict[str, Callable[..., Result]] = {"eager": partial(call, kernels=EAGER), "sdpa": peer}
    if run.cuda:
        variants["sdpa, padded"] = partial(peer, padded_head_dim=32)
    variants["fused"] = partial(call, kernels=run.fused())
    if run.compiled:
        variants["compile"] = torch.compile(partial(call, kernels=EAGER), dynamic=False)
    return variants


def _attention(
    what: str,
    run: Run,
    inputs: tuple[Tensor, ...],
    variants: dict[str, Callable[..., Result]],
    pairs: int,
    backward: bool,
) -> BenchmarkCase:
    # What the definition needs: q k and p v; on the way back q k once more, then gradients of p, q, k and v. Kernels
    # that compute something again do more than that, and do not get a higher rate for it.
    products = 7 if backward else 2
    size = inputs[0].element_size() * CHANNELS * run.side**2
    moved = 4.0 * size + (8.0 * size if backward else 0)  # q, k, v, out; on the way back these, theirs and delta's
    what += _both(backward)
    absent = {} if run.compiled else dict.fromkeys(("compile", "flex"), "torch.compile was switched off")
    return BenchmarkCase(
        what, inputs, variants, run.wide, backward, moved, 2.0 * products * pairs * CHANNELS, absent=absent
    )


def _both(backward: bool) -> str:
    return ", forward and backward" if backward else ", forward"


def posterior(run: Run, noise: bool = True, backward: bool = False) -> BenchmarkCase:
    """The posterior of a 64-channel field, with given noise or the mean as its sample."""
    parts = 3 if noise else 2
    inputs = tuple(0.3 * run.draw(1, LATENT, run.side, run.side, seed=6 + part) for part in range(parts))

    def call(*fields: Tensor, kernels: KernelSettings) -> Result:
        found = ops.gaussian_posterior(*fields, kernels=kernels)
        return found.sample, found.kl, found.severity, found.variance

    pixels = run.side**2
    one = float(inputs[0].nbytes)
    moved = one * (4 if noise else 2) + 4.0 * 3 * pixels
    if backward:  # mu, logvar, eps and the sample's gradient read again, gradients of the three written
        moved += one * (4 + parts if noise else 2 + parts) + 4.0 * 3 * pixels
    return _elementwise(f"posterior, {'given' if noise else 'no'} noise", run, inputs, call, moved, 25, backward)


def modulation(run: Run, backward: bool = False) -> BenchmarkCase:
    """The modulation of savl-base, without beta as there."""
    inputs = tuple(run.draw(1, run.side, run.side, CHANNELS, seed=9 + part) for part in range(3))

    def call(attended: Tensor, gamma: Tensor, residual: Tensor, kernels: KernelSettings) -> Result:
        return ops.channel_modulation(attended, gamma, None, residual, kernels=kernels)

    moved = (4.0 + (5 if backward else 0)) * inputs[0].nbytes
    return _elementwise("modulation", run, inputs, call, moved, 3, backward)


def layer_norm(run: Run, backward: bool = False) -> BenchmarkCase:
    """The layer normalisation of savl-base."""
    inputs = (run.draw(1, run.side, run.side, CHANNELS, seed=12), *(run.draw(CHANNELS, seed=13 + i) for i in range(2)))
    moved = (2.0 + (3 if backward else 0)) * inputs[0].nbytes
    return _elementwise("layer norm", run, inputs, ops.layer_norm, moved, 7, backward)


def _elementwise(
    what: str,
    run: Run,
    inputs: tuple[Tensor, ...],
    call: Callable[..., Result],
    moved: float,
    operations: int,
    backward: bool,
) -> BenchmarkCase:
    variants: dict[str, Callable[..., Result]] = {
        "eager": partial(call, kernels=EAGER),
        "fused": partial(call, kernels=run.fused()),
    }
    if run.compiled:
        variants["compile"] = torch.compile(partial(call, kernels=EAGER), dynamic=False)
    absent = {} if run.compiled else {"compile": "torch.compile was switched off"}
    flops = float(operations * inputs[0].numel())
    what += _both(backward)
    return BenchmarkCase(what, inputs, variants, torch.float64, backward, moved, flops, copied=True, absent=absent)


# Blocks


def block(run: Run, name: str) -> BenchmarkCase:
    """One block of savl-base.

    Args:
        run: Where and on what.
        name: ``"DSCA"``, ``"HAB"`` or ``"OCAB"``.
    """
    torch.manual_seed(0)
    config = CONFIGS["savl-base"]
    modules: dict[str, nn.Module] = {
        "DSCA": DSCA(config, shift=WINDOW // 2),
        "HAB": HAB(config, shift=WINDOW // 2, drop_path=0.0),
        "OCAB": OCAB(config),
    }
    inputs = (run.draw(1, run.side, run.side, CHANNELS, seed=14),)
    if name == "DSCA":
        severity = 2 * run.draw(1, run.side, run.side, seed=16, uniform=True)
        inputs = (*inputs, run.draw(1, run.side, run.side, LATENT, seed=15), severity)
    return _module(run, name, modules[name], inputs)


def _module(run: Run, what: str, module: nn.Module, inputs: tuple[Tensor, ...], items: int = 1) -> BenchmarkCase:
    """A module in evaluation mode by eager, SDPA, fused kernels and torch.compile."""
    wide = module.eval().to(run.device).requires_grad_(False)
    narrow = copy.deepcopy(wide).to(run.dtype)
    if run.wide == torch.float64:
        wide = copy.deepcopy(wide).double()
    by_op = run.fused().__dict__

    def eager(*given: Tensor) -> Tensor:
        with savl.use_fused_kernels(False):
            return narrow(*given) if given[0].dtype == run.dtype else _exactly(wide, *given)

    def with_sdpa(*given: Tensor) -> Tensor:
        padded = 32 if run.cuda else None
        with savl.use_fused_kernels(False), sdpa.in_every_network(padded_head_dim=padded, backend=_efficient(run)):
            result: Tensor = narrow(*given)
        return result

    def with_fused(*given: Tensor) -> Tensor:
        with savl.use_fused_kernels(**by_op):
            result: Tensor = narrow(*given)
        return result

    def compiled(mode: str) -> Callable[..., Tensor]:
        by_inductor = torch.compile(narrow, dynamic=False, mode=mode)

        def call(*given: Tensor) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            with savl.use_fused_kernels(False):
                result: Tensor = by_inductor(*given)
            return result

        return call

    variants: dict[str, Callable[..., Result]] = {
        "eager": eager,
        "sdpa": with_sdpa,
        "fused": with_fused,
        "compile": compiled("default"),
        "compile, max-autotune": compiled("max-autotune"),
    }
    absent = {}
    if run.cuda:
        variants["fused, CUDA graph"] = _replayed(with_fused, inputs)
    else:
        absent["fused, CUDA graph"] = "CUDA graphs need a CUDA GPU"
    return BenchmarkCase(what, inputs, variants, run.wide, absent=absent, items=items)


def _exactly(model: nn.Module, *given: Tensor) -> Tensor:
    """Convolutions in float32 and not, as is torch's default, in tf32."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        result: Tensor = model(*given)
    finally:
        convolutions.fp32_precision = before
    return result


def _replayed(call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """The call as a CUDA graph, captured when first asked for; on the inputs it was made with."""
    graph: list[torch.cuda.CUDAGraph] = []
    out: list[Tensor] = []

    def replay(*given: Tensor) -> Tensor:
        if not graph:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    call(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                out.append(call(*inputs))
            graph.append(captured)
        graph[0].replay()
        return out[0]

    return replay


# Networks


def network(run: Run, name: str, batch: int = 1) -> BenchmarkCase:
    """A whole network on one tile, or a batch of them; random weights, since time does not depend on them."""
    torch.manual_seed(0)
    lr = run.draw(batch, 3, run.side, run.side, seed=12, uniform=True)
    what = f"{name}, {run.side}×{run.side}" + (f", batch of {batch}" if batch > 1 else "")
    return _module(run, what, savl.build(name), (lr,), batch)


def image(run: Run, name: str, pixels: int = 2**20, tile: int = 256) -> BenchmarkCase:
    """A whole image in tiles, as `savl.upscale` does it: a square one of about so many pixels."""
    torch.manual_seed(0)
    model = savl.build(name).eval().to(run.device)
    side = math.isqrt(pixels)
    lr = Run(run.device, torch.float32, side).draw(1, 3, side, side, seed=17, uniform=True)

    def upscale(given: Tensor, **settings: Any) -> Tensor:
        with savl.use_fused_kernels(**settings) if settings else savl.use_fused_kernels(False):
            upscaler = savl.Upscaler(model, tile=tile, dtype=run.dtype)
            return upscaler(given).sr

    variants: dict[str, Callable[..., Result]] = {
        "eager": upscale,
        "fused": partial(upscale, **run.fused().__dict__),
    }
    return BenchmarkCase(f"{name}, {side}×{side} in tiles of {tile}", (lr,), variants, None)


def training_step(run: Run, name: str, batch: int = 2) -> BenchmarkCase:
    """Forward and backward of a network in training: gradients of all its parameters for an L1 loss; no optimiser."""
    torch.manual_seed(0)
    model = savl.build(name).to(run.device).train()
    lr = run.draw(batch, 3, run.side, run.side, seed=18, uniform=True)
    hr = run.draw(batch, 3, 4 * run.side, 4 * run.side, seed=19, uniform=True)
    parameters = list(model.parameters())

    def step(given: Tensor, **settings: Any) -> Result:
        torch.manual_seed(1)  # stochastic depth and the posterior's noise
        with savl.use_fused_kernels(**settings) if settings else savl.use_fused_kernels(False), torch.enable_grad():
            with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
                loss = (model(given) - hr).abs().mean()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norm = torch.stack([each.float().norm() for each in gradients if each is not None])
        return loss.detach().float(), norm

    variants: dict[str, Callable[..., Result]] = {"eager": step, "fused": partial(step, **run.fused().__dict__)}
    return BenchmarkCase(f"{name}, training step, {batch} of {run.side}×{run.side}", (lr,), variants, None, items=batch)
