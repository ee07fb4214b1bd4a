"""What is measured: for each op and network the same computation by eager, SDPA, `torch.compile` and the fused kernels.

Every variant of a subject computes the same numbers; `Subject.check` sees to that before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import savl
from benchmarks import sdpa
from savl import ops
from savl.ops.switch import KernelSettings

EAGER, FUSED = KernelSettings.of(False), KernelSettings.of(True)
SIDE = 64
"""Tokens along a side of the tile that everything is measured on."""


@dataclass(frozen=True)
class Subject:
    """One computation, several ways.

    Attributes:
        name: What is computed.
        variants: Ways to compute it; each returns its (first) result.
        flops: Multiplications and additions of the fused way.
        bytes: Each input read once and each output written once, float32.
        copies: Ways to move that many bytes, for what is bound by memory.
    """

    name: str
    variants: dict[str, Callable[[], Tensor]]
    flops: float = 0.0
    bytes: float = 0.0
    copies: dict[str, Callable[[], object]] | None = None

    def check(self) -> None:
        """Compare all variants with the first.

        Raises:
            AssertionError: One computes something else: its time would mean nothing.
        """
        (first, reference), *others = ((name, call()) for name, call in self.variants.items())
        scale = float(reference.abs().max())
        for name, result in others:
            error = float((result - reference).abs().max())
            assert error <= 1e-4 * scale, f"{self.name}: {name} is {error:.1e} from {first}, largest value {scale:.1e}"


def window_attention(compiled: bool = False) -> Subject:
    """Window attention of savl-base: 16×16 windows, shift 8, 6 heads of 24, severity."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, SIDE, SIDE, 432, generator=generator)
    table, severity = torch.randn(961, 6, generator=generator), 2 * torch.rand(1, SIDE, SIDE, generator=generator)
    mask = sdpa.folded_mask(table, SIDE, SIDE, 16, 16, 8)
    eager = partial(ops.window_attention, qkv, table, severity, window=16, shift=8)
    variants: dict[str, Callable[[], Tensor]] = {
        "eager": partial(eager, kernels=EAGER),
        "sdpa": lambda: sdpa.window_attention(qkv, table, severity, window=16, shift=8),
        "sdpa, mask kept": lambda: sdpa.window_attention(qkv, table, severity, window=16, shift=8, kept=mask),
        "fused": partial(eager, kernels=FUSED),
    }
    if compiled:
        variants["compile"] = torch.compile(partial(eager, kernels=EAGER))
    pairs = sum(rows**2 for rows in _runs(SIDE, 16, 8)) ** 2  # query-key pairs that see each other
    return Subject("window attention", variants, flops=4.0 * pairs * 144, bytes=4.0 * SIDE**2 * 144 * 4)


def _runs(length: int, window: int, shift: int) -> list[int]:
    """Lengths of the windows along one axis once the shift has cut the last one in two."""
    whole = length // window - (1 if shift else 0)
    return [window] * whole + ([shift, window - shift] if shift else [])


def overlapping_window_attention(compiled: bool = False) -> Subject:
    """Overlapping attention of savl-base: 24×24 keys for 16×16 queries, 6 heads of 24."""
    generator = torch.Generator().manual_seed(1)
    q, kv = torch.randn(1, SIDE, SIDE, 432, generator=generator).split((144, 288), dim=-1)
    table = torch.randn(39**2, 6, generator=generator)
    mask = sdpa.folded_mask(table, SIDE, SIDE, 16, 24, 0)
    eager = partial(ops.overlapping_window_attention, q, kv, table, None, window=16, key_window=24)
    other = partial(sdpa.overlapping_window_attention, q, kv, table, None, window=16, key_window=24)
    variants: dict[str, Callable[[], Tensor]] = {
        "eager": partial(eager, kernels=EAGER),
        "sdpa": other,
        "sdpa, mask kept": partial(other, kept=mask),
        "fused": partial(eager, kernels=FUSED),
    }
    if compiled:
        variants["compile"] = torch.compile(partial(eager, kernels=EAGER))
    flops = 4.0 * SIDE**2 * 24**2 * 144
    return Subject("overlapping window attention", variants, flops, bytes=4.0 * SIDE**2 * 144 * 4)


def gaussian_posterior(compiled: bool = False, side: int = SIDE) -> Subject:
    """The posterior of a 64-channel field with given noise."""
    generator = torch.Generator().manual_seed(2)
    mu, logvar, eps = (0.3 * torch.randn(1, 64, side, side, generator=generator) for _ in range(3))

    def call(kernels: KernelSettings) -> Tensor:
        return ops.gaussian_posterior(mu, logvar, eps, kernels=kernels).sample

    variants: dict[str, Callable[[], Tensor]] = {"eager": partial(call, EAGER), "fused": partial(call, FUSED)}
    if compiled:
        variants["compile"] = torch.compile(partial(call, EAGER))
    moved = 4.0 * side**2 * (3 * 64 + 64 + 3)  # mu, logvar, eps; sample, kl, variance, severity
    return Subject("gaussian posterior", variants, 25.0 * mu.numel(), moved, _copies(moved))


def channel_modulation(compiled: bool = False, side: int = SIDE) -> Subject:
    """The modulation of savl-base, without beta as there."""
    generator = torch.Generator().manual_seed(3)
    attended, gamma, residual = (torch.randn(1, side, side, 144, generator=generator) for _ in range(3))
    eager = partial(ops.channel_modulation, attended, gamma, None, residual)
    variants: dict[str, Callable[[], Tensor]] = {
        "eager": partial(eager, kernels=EAGER),
        "fused": partial(eager, kernels=FUSED),
    }
    if compiled:
        variants["compile"] = torch.compile(partial(eager, kernels=EAGER))
    moved = 4.0 * attended.numel() * 4
    return Subject("channel modulation", variants, 3.0 * attended.numel(), moved, _copies(moved))


def _copies(moved: float) -> dict[str, Callable[[], object]]:
    """Copies that read and write ``moved`` bytes together: into memory at hand, and into new memory as an op does."""
    source = torch.randn(int(moved) // 8)
    target = torch.empty_like(source)
    return {"copy": lambda: target.copy_(source), "clone": source.clone}


def network(name: str, compiled: bool = False, peers: bool = True) -> Subject:
    """A whole network on one tile; random weights, since time does not depend on them."""
    torch.manual_seed(0)
    model = savl.build(name).eval()
    lr = torch.rand(1, 3, SIDE, SIDE)

    @torch.no_grad()
    def run(fused: bool) -> Tensor:
        with savl.use_fused_kernels(fused):
            return model(lr)

    @torch.no_grad()
    def run_sdpa() -> Tensor:
        with savl.use_fused_kernels(False), sdpa.in_every_network():
            return model(lr)

    variants: dict[str, Callable[[], Tensor]] = {"eager": partial(run, False)}
    if peers:
        variants["sdpa"] = run_sdpa
    variants["fused"] = partial(run, True)
    if compiled:
        by_inductor = torch.compile(model)

        @torch.no_grad()
        def run_compiled() -> Tensor:
            with savl.use_fused_kernels(False):
                result: Tensor = by_inductor(lr)
            return result

        variants["compile"] = run_compiled
    return Subject(name, variants)
