"""What `benchmarks.gpu_ratios` measures: the parts of savl-base, several ways each, on any device and in any dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import savl
from benchmarks import flex, sdpa
from savl import ops
from savl.ops.switch import BACKENDS, FUSED, OPS, KernelSettings

EAGER = KernelSettings.of(False)
COPY = "copy"
Result = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Run:
    """Where, on what and how often to measure."""

    device: torch.device
    dtype: torch.dtype
    side: int
    rounds: int
    compiled: bool
    network: str

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
        return KernelSettings(
            **{op: next(name for name in BACKENDS[op] if FUSED[name].device == kind) for op in OPS}  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class Case:
    """One computation, several ways.

    Attributes:
        what: What is computed.
        inputs: What it is computed from.
        variants: Ways to compute it from the inputs, eager first.
        wanted: How many times as fast as which variants the fused one shall be; against a copy, the share of its
            bandwidth. Of variants whose names begin alike ("sdpa", "sdpa, padded") the fastest counts. None: measured,
            nothing promised.
        wide: Dtype of the reference.
        backward: Whether gradients of all inputs are computed too.
        moved: Bytes that must be read and written.
        flops: Multiplications and additions of the products.
    """

    what: str
    inputs: tuple[Tensor, ...]
    variants: Mapping[str, Callable[..., Result]]
    wanted: Mapping[str, float | None]
    wide: torch.dtype
    backward: bool = False
    moved: float = 0.0
    flops: float = 0.0


def window(run: Run, backward: bool = False) -> Case:
    """Window attention of savl-base: 16×16 windows, shift 8, 6 heads of 24, severity."""
    side = run.side
    inputs = (
        run.draw(1, side, side, 432, seed=0),
        run.draw(961, 6, seed=1),
        2 * run.draw(1, side, side, seed=2, uniform=True),
    )
    call = partial(ops.window_attention, window=16, shift=8)
    peer = partial(sdpa.window_attention, window=16, shift=8, backend=_efficient(run))
    variants: dict[str, Callable[..., Result]] = {
        "eager": partial(call, kernels=EAGER),
        "sdpa": peer,
        "sdpa, padded": partial(peer, padded_head_dim=32),
        "fused": partial(call, kernels=run.fused()),
    }
    if run.compiled:
        mask = flex.shift_block_mask(side, side, 16, 8, device=run.device)

        def by_flex(qkv: Tensor, table: Tensor, severity: Tensor) -> Tensor:
            return flex.window_attention(qkv, table, severity, window=16, shift=8, block_mask=mask)

        variants["flex"] = torch.compile(by_flex, dynamic=False)
    wanted = {"eager": 5, "sdpa": 1.5, "flex": 1.3} if backward else {"eager": 8, "sdpa": 2, "flex": 1.5}
    return _attention("window attention", run, inputs, variants, wanted, 256, backward)


def overlapping(run: Run, backward: bool = False) -> Case:
    """Overlapping attention of savl-base: 24×24 keys for 16×16 queries, 6 heads of 24."""
    side = run.side
    inputs = (run.draw(1, side, side, 144, seed=3), run.draw(1, side, side, 288, seed=4), run.draw(39**2, 6, seed=5))
    call = partial(ops.overlapping_window_attention, window=16, key_window=24)
    peer = partial(sdpa.overlapping_window_attention, window=16, key_window=24, backend=_efficient(run))
    variants: dict[str, Callable[..., Result]] = {
        "eager": partial(call, kernels=EAGER),
        "sdpa": peer,
        "sdpa, padded": partial(peer, padded_head_dim=32),
        "fused": partial(call, kernels=run.fused()),
    }
    if run.compiled:
        attend = partial(flex.overlapping_window_attention, window=16, key_window=24)
        variants["flex"] = torch.compile(attend, dynamic=False)
    wanted = {"eager": None if backward else 8.0, "sdpa": None, "flex": None}
    return _attention("overlapping attention", run, inputs, variants, wanted, 576, backward)


def _efficient(run: Run) -> SDPBackend | None:
    return SDPBackend.EFFICIENT_ATTENTION if run.cuda else None


def _attention(
    what: str,
    run: Run,
    inputs: tuple[Tensor, ...],
    variants: dict[str, Callable[..., Result]],
    wanted: Mapping[str, float | None],
    keys: int,
    backward: bool,
) -> Case:
    products = 11 if backward else 2  # as the fused kernels compute them: 3 + 4 + 2 again on the way back
    flops = 2.0 * products * run.side**2 * keys * 144
    size = inputs[0].element_size() * 144 * run.side**2
    moved = 4.0 * size + (8.0 * size if backward else 0)  # q, k, v, out; on the way back these, theirs and delta's
    what += ", forward and backward" if backward else ", forward"
    return Case(what, inputs, variants, wanted, run.wide, backward, moved, flops)


def posterior(run: Run, noise: bool = True) -> Case:
    """The posterior of a 64-channel field, with given noise or the mean as its sample."""
    parts = 3 if noise else 2
    inputs = tuple(0.3 * run.draw(1, 64, run.side, run.side, seed=6 + part) for part in range(parts))

    def call(*fields: Tensor, kernels: KernelSettings) -> Result:
        found = ops.gaussian_posterior(*fields, kernels=kernels)
        return found.sample, found.kl, found.severity, found.variance

    pixels = run.side**2
    moved = inputs[0].element_size() * 64.0 * pixels * (4 if noise else 2) + 4.0 * 3 * pixels
    return _elementwise(f"posterior, {'given' if noise else 'no'} noise", run, inputs, call, moved)


def modulation(run: Run) -> Case:
    """The modulation of savl-base, without beta as there."""
    inputs = tuple(run.draw(1, run.side, run.side, 144, seed=9 + part) for part in range(3))

    def call(attended: Tensor, gamma: Tensor, residual: Tensor, kernels: KernelSettings) -> Result:
        return ops.channel_modulation(attended, gamma, None, residual, kernels=kernels)

    return _elementwise("modulation", run, inputs, call, 4.0 * inputs[0].nbytes)


def _elementwise(what: str, run: Run, inputs: tuple[Tensor, ...], call: Callable[..., Result], moved: float) -> Case:
    variants = {"eager": partial(call, kernels=EAGER), "fused": partial(call, kernels=run.fused())}
    return Case(what, inputs, variants, {"eager": None, COPY: 0.9}, torch.float64, moved=moved)


def network(run: Run, mode: str | None = None) -> Case:
    """A whole network on one image; random weights, since time does not depend on them.

    Args:
        run: Where and on what.
        mode: Of torch.compile, which then stands beside eager and fused instead of SDPA.
    """
    torch.manual_seed(0)
    wide = savl.build(run.network).eval().to(run.device)
    narrow = copy.deepcopy(wide).to(run.dtype)
    lr = run.draw(1, 3, run.side, run.side, seed=12, uniform=True)
    fused = run.fused()
    by_op = {op: getattr(fused, op) for op in OPS}

    def eager(image: Tensor) -> Tensor:
        with savl.use_fused_kernels(False):
            return narrow(image) if image.dtype == run.dtype else _exactly(wide, image)

    def with_sdpa(image: Tensor) -> Tensor:
        with savl.use_fused_kernels(False), sdpa.in_every_network(padded_head_dim=32, backend=_efficient(run)):
            return narrow(image)

    def with_fused(image: Tensor) -> Tensor:
        with savl.use_fused_kernels(**by_op):
            return narrow(image)

    if run.wide == torch.float64:
        wide = wide.double()
    variants: dict[str, Callable[..., Result]] = {"eager": eager, "fused": with_fused}
    wanted: dict[str, float | None] = {"eager": 3}
    what = f"{run.network}, {run.side}×{run.side}"
    if mode is None:
        return Case(what, (lr,), variants | {"sdpa": with_sdpa}, wanted | {"sdpa": None}, run.wide)
    compiled = torch.compile(narrow, dynamic=False, mode=mode)

    def with_compile(image: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with savl.use_fused_kernels(False):
            result: Tensor = compiled(image)
        return result

    name = "compile" if mode == "default" else f"compile, {mode}"
    promised = {name: None if mode == "default" else 1.5}
    return Case(f"{what}, {mode}", (lr,), variants | {name: with_compile}, promised, run.wide)


def _exactly(model: torch.nn.Module, image: Tensor) -> Tensor:
    """Convolutions in float32 and not, as is torch's default, in tf32."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        result: Tensor = model(image)
    finally:
        convolutions.fp32_precision = before
    return result


PARTS: dict[str, Callable[[Run], Case]] = {
    "window": window,
    "window-backward": partial(window, backward=True),
    "overlapping": overlapping,
    "overlapping-backward": partial(overlapping, backward=True),
    "posterior": posterior,
    "posterior-plain": partial(posterior, noise=False),
    "modulation": modulation,
    "network": network,
    "network-compile": partial(network, mode="default"),
    "max-autotune": partial(network, mode="max-autotune"),
}
ON_REQUEST = ("max-autotune",)
"""Parts that take long and run only when named."""
