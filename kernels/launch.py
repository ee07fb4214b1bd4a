"""Launches of the attention kernels: shapes, strides, block sizes and grids for the tensors of a call."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from savl.kernels import attention, attention_backward, attention_backward_bias, attention_backward_joint
from savl.kernels.configs import KernelConfig, Problem, config_for, stages_of
from savl.kernels.gpu import architecture_of, gpu_names, kind
from savl.kernels.log_sum_exp import lse_dtype
from savl.kernels.targets import Architecture

BIAS_PROGRAMS = 1024
"""Approximate number of programs that share the sum over windows of `backward_bias`. It is the same for every GPU, so
that the same shapes give the same bits on all of them."""

OPTIONS = {"enable_fp_fusion": True}
"""Options of Triton for every kernel. Fused multiply-adds were the default up to Triton 3.9."""


Pair = tuple[int, int]
"""Vertical and horizontal, in pixels."""


@dataclass(frozen=True)
class Attention:
    """One call: its tensors and its geometry.

    q, k and v are (B, H, W, C) views with contiguous channels and evenly spaced pixels, k and v with the same strides.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    """A table ``(span_y · span_x, heads)``, or dense ``(heads, queries, keys)``."""
    severity: Tensor | None
    """``(B, H, W)``, contiguous."""
    window: Pair
    key_window: Pair
    heads: int
    scale: Tensor | None = None
    """``(heads,)``, contiguous: the similarity is the cosine multiplied by it."""
    shift: Pair = (0, 0)
    margin: int = 0
    """Pixels by which windows of keys reach beyond those of the queries, in the same image."""
    dilated: bool = False
    mask: float = -math.inf
    """Added to logits between sides of a shifted image."""

    @property
    def problem(self) -> Problem:
        """The problem that block sizes are looked up for."""
        dtype, head_dim = str(self.q.dtype).removeprefix("torch."), self.q.shape[3] // self.heads
        return Problem(dtype, head_dim, self.window, self.key_window, self.bias_kind, self.scale is not None)

    @property
    def windows(self) -> int:
        """Number of windows of all images."""
        batch, height, width, _ = self.q.shape
        return batch * (height // self.window[0]) * (width // self.window[1])

    @property
    def spans(self) -> Pair:
        """Numbers of offsets between a query and a key along both axes."""
        return self.window[0] + self.key_window[0] - 1, self.window[1] + self.key_window[1] - 1

    @property
    def bias_kind(self) -> str:
        """The layout of the bias: ``"table"``, ``"dense"`` or ``"none"``."""
        return "none" if self.bias is None else "table" if self.bias.dim() == 2 else "dense"

    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments that all kernels share."""
        problem = self.problem
        scale = 1.0 if self.scale is not None else problem.head_dim**-0.5
        grows = self.severity is not None or self.scale is not None or scale * math.log2(math.e) > 1
        return {
            "HEADS": self.heads,
            "HEAD_DIM": problem.head_dim,
            "BLOCK_D": problem.block_d,
            "WINDOW": self.window,
            "KEY_WINDOW": self.key_window,
            "MARGIN": self.margin,
            "BIAS": self.bias_kind,
            "MASK": self.mask * math.log2(math.e),
            "SCALE": scale,
            "HAS_SEVERITY": self.severity is not None,
            "COSINE": self.scale is not None,
            # A factor of the logits that is larger than q or k may exceed the range of float16.
            "WIDE_FACTORS": self.q.dtype == torch.float16 and grows,
            "SHIFTED": self.shift != (0, 0),
            "DILATED": self.dilated,
            "FAR": max(each.shape[1] * each.shape[2] * each.stride(2) for each in (self.q, self.k)) >= 2**31,
            "PRECISION": precision(self.q.dtype, problem.head_dim),
        }

    def image(self) -> tuple[int | None, ...]:
        """Return size, shift and strides of the image, the arguments that all kernels share."""
        shift_y, shift_x = self.shift
        # Triton compiles None in: where both axes share a shift, it takes one register.
        shared = None if shift_x == shift_y else shift_x
        return *self.q.shape[1:3], shift_y, shared, self.q.stride(2), self.k.stride(2)

    def scaled_bias(self) -> Tensor | None:
        """Return the bias as float32 in units of ln 2, with the heads outermost: (heads, offsets) or (heads, N, N')."""
        if self.bias is None:
            return None
        bias = self.bias.t() if self.bias_kind == "table" else self.bias
        scaled = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
        return torch.mul(bias, math.log2(math.e), out=scaled)

    def config(self, stage: str) -> KernelConfig:
        """Return the block sizes of one of `savl.kernels.configs.STAGES`."""
        return config_for(stage, self.problem, *_gpu(None if self.q.is_cpu else self.q.device.index))[0]

    def stages(self) -> tuple[str, ...]:
        """Return the kernels that a forward and a backward pass run, of `savl.kernels.configs.STAGES`."""
        return stages_of(self.problem, _gpu(None if self.q.is_cpu else self.q.device.index)[1])

    def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        """Run a kernel. Every launch of an attention kernel is a call of this method.

        Args:
            kernel: One of `savl.kernels.attention` or of the modules ``attention_backward*``.
            programs: How many of its programs to run.
            arguments: Its positional arguments.
            constants: Its compile-time arguments, and options of Triton.
        """
        kernel[(programs,)](*arguments, **constants, **OPTIONS)


@cache
def _gpu(index: int | None) -> tuple[str | None, Architecture]:
    """Return name and architecture of a GPU; None and (9, 0) for no GPU, as when interpreted."""
    return (None, (9, 0)) if index is None else (gpu_names()[index], architecture_of(index))


def architecture_for(x: Tensor) -> Architecture:
    """Return the architecture of the GPU that a tensor is on; (9, 0) for a tensor of the CPU, as when interpreted."""
    return _gpu(None if x.is_cpu else x.device.index)[1]


def precision(dtype: torch.dtype, head_dim: int) -> str:
    """Return how products are computed: as torch does, which uses tf32 only for rows of whole 16 bytes.

    Only NVIDIA GPUs have the instruction that rounds to tf32; elsewhere float32 is multiplied exactly.
    """
    if dtype != torch.float32:
        return "tf32"  # for the float32 factors of float16 tensors; 16-bit operands are not affected
    allowed = kind().compiler == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32" and head_dim % 4 == 0
    return "tf32, rounded" if allowed else "ieee"


def forward(call: Attention) -> tuple[Tensor, Tensor]:
    """Run the forward kernel.

    Returns:
        The result ``(B, H, W, C)``, dtype of q, and the log-sum-exp of the logits in units of ln 2,
        ``(B, heads, H, W)`` of `savl.kernels.log_sum_exp.lse_dtype`.
    """
    batch, height, width, channels = call.q.shape
    out = torch.empty(batch, height, width, channels, dtype=call.q.dtype, device=call.q.device)
    lse = torch.empty(batch, call.heads, height, width, dtype=lse_dtype(call.q.dtype), device=call.q.device)
    if call.windows == 0:
        return out, lse
    config = call.config("forward")
    with device_of(call.q):
        call.launch(
            attention.forward,
            call.windows * call.heads * triton.cdiv(call.problem.queries, config.block_m),
            call.q,
            call.k,
            call.v,
            *(lse if each is None else each for each in (call.scaled_bias(), call.severity, call.scale)),
            out,
            lse,
            *call.image(),
            **call.constants(),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            KEY_BLOCK=key_block(config.block_n, call.key_window),
            STAGES=config.stages,
            num_warps=config.warps,
        )
    return out, lse


def key_block(block_n: int, key_window: Pair) -> Pair | None:
    """Return height and width of a block of keys in `forward`: the widest of powers of two that divide the key window.

    Args:
        block_n: Keys of a block.
        key_window: Height and width of the windows of keys.

    Returns:
        None if there is no such block, where a tile has keys in the order of the window.
    """
    for exponent in reversed(range(block_n.bit_length())):
        width = 1 << exponent
        if block_n % width == 0 and key_window[1] % width == 0 and key_window[0] % (block_n // width) == 0:
            return block_n // width, width
    return None


def backward(
    call: Attention, out: Tensor, lse: Tensor, grad_out: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernels.

    Args:
        call: As for `forward`.
        out: Output that `forward` returned.
        lse: Log-sum-exp that `forward` returned.
        grad_out: Gradient of out.
        grad_q: Output; a (B, H, W, C) view with contiguous channels and evenly spaced pixels.
        grad_k: Output; a view with the same layout requirements as ``grad_q``.
        grad_v: Output; a view with the strides of ``grad_k``.

    Returns:
        Gradients of the bias, the severity and the scale, in their shapes and dtypes; empty for what is absent.
    """
    batch, height, width, _ = call.q.shape
    problem, severity = call.problem, call.severity
    stages = call.stages()
    # A compiler that saves tensors for the backward pass may choose their strides.
    out, lse, grad_out = out.contiguous(), lse.contiguous(), grad_out.contiguous()
    if call.windows == 0 or problem.keys == 1:
        if problem.keys == 1:
            _backward_of_single_keys(call, grad_out, grad_q, grad_k, grad_v)
        bias, s, scale = (
            call.q.new_empty(0) if each is None else torch.zeros_like(each, memory_format=torch.contiguous_format)
            for each in (call.bias, severity, call.scale)
        )
        return bias, s, scale
    maps = (batch, call.heads, height, width)
    single = {"dtype": torch.float32, "device": call.q.device}
    delta = torch.empty(maps, **single)
    # Parts of the severity's gradient, through q and through k, and of that of the scale, for each head.
    shares = torch.empty(2, *maps, **single) if severity is not None else None
    through_q, through_k = (lse, lse) if shares is None else (shares[0], shares[1])
    of_scale = torch.empty(maps, **single) if call.scale is not None else None
    image = call.image()
    # What is absent is not read: any pointer will do.
    given = [lse if each is None else each for each in (call.scaled_bias(), severity, call.scale)]
    grad_bias = call.q.new_empty(0)
    with device_of(call.q):
        if "backward_qkv" in stages:
            config = call.config("backward_qkv")
            call.launch(
                attention_backward_joint.backward_qkv, call.windows * call.heads,
                call.q, call.k, call.v, *given, out, lse, grad_out, delta, grad_q, grad_k, grad_v, through_q, through_k,
                lse if of_scale is None else of_scale, *image, grad_q.stride(2), grad_k.stride(2), **call.constants(),
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.stages, num_warps=config.warps,
            )  # fmt: skip
        if "backward_q" in stages:
            config = call.config("backward_q")
            call.launch(
                attention_backward.backward_q,
                call.windows * call.heads * triton.cdiv(problem.queries, config.block_m),
                call.q, call.k, call.v, *given, out, lse, grad_out, delta, grad_q, through_q,
                lse if of_scale is None else of_scale, *image, grad_q.stride(2), **call.constants(),
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.stages, num_warps=config.warps,
            )  # fmt: skip
        if "backward_kv" in stages:
            config = call.config("backward_kv")
            tile_height, tile_width = key_tile(config.block_n, call.key_window, call.margin)
            tiles = batch * key_tiles(call.k.shape[1], tile_height, call.margin)
            tiles *= key_tiles(call.k.shape[2], tile_width, call.margin)
            call.launch(
                attention_backward.backward_kv, tiles * call.heads,
                call.q, call.k, call.v, *given, lse, grad_out, delta, grad_k, grad_v, through_k,
                *image, grad_k.stride(2), **call.constants(),
                BLOCK_M=config.block_m, TILE_HEIGHT=tile_height, TILE_WIDTH=tile_width, STAGES=config.stages,
                num_warps=config.warps,
            )  # fmt: skip
        if "backward_bias" in stages:
            config = call.config("backward_bias")
            pairs = triton.cdiv(problem.queries, config.block_m) * triton.cdiv(problem.keys, config.block_n)
            chunks = bias_chunks(call.windows, pairs * call.heads)
            sums = torch.empty(chunks, call.heads, problem.queries, problem.keys, **single)
            call.launch(
                attention_backward_bias.backward_bias, pairs * call.heads * chunks,
                call.q, call.k, call.v, *given, lse, grad_out, delta, sums, call.windows,
                *image, **call.constants(), CHUNKS=chunks,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.stages, num_warps=config.warps,
            )  # fmt: skip
            grad_bias = sums.sum(0)
        if call.bias is not None and call.bias_kind == "table":
            folded = torch.empty(call.bias.shape, dtype=call.bias.dtype, device=call.q.device)
            call.launch(
                attention_backward_bias.fold_bias, call.spans[0] * call.heads,
                grad_bias, folded, call.heads, call.window, call.key_window,
                triton.next_power_of_2(call.window[1]), triton.next_power_of_2(call.spans[1]),
            )  # fmt: skip
            grad_bias = folded
    return (
        grad_bias if call.bias is None else grad_bias.to(call.bias.dtype),
        call.q.new_empty(0) if shares is None or severity is None else shares.sum((0, 2)).to(severity.dtype),
        call.q.new_empty(0) if of_scale is None or call.scale is None else of_scale.sum((0, 2, 3)).to(call.scale.dtype),
    )


def _backward_of_single_keys(call: Attention, grad_out: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> None:
    """Write the gradients of q, k and v for windows with one key.

    It has the weight 1 for any logit, so its logit has no gradient, and rounding must not give it one. A logit that is
    NaN makes the output NaN, but not the gradients. Such windows are not shifted by whole keys.
    """
    grad_q.zero_()
    grad_k.zero_()
    batch, height, width, channels = grad_out.shape
    (wh, ww), (rows, columns) = call.window, call.k.shape[1:3]
    split = (wh, rows, ww, columns) if call.dilated else (rows, wh, columns, ww)
    windows = grad_out.reshape(batch, *split, channels)
    grad_v.copy_(windows.sum((1, 3) if call.dilated else (2, 4), dtype=torch.float32))


def key_tile(block_n: int, key_window: Pair, margin: int = 0) -> Pair:
    """Return height and width, in pixels, of a tile of keys in `backward_kv`: powers of two.

    A tile meets as few windows as possible, on average over the places of tiles; among equals it is the most square.

    Args:
        block_n: Pixels of a tile.
        key_window: Height and width of the windows of keys.
        margin: As in `Attention`.
    """

    def windows(size: int, side: int) -> float:
        seen = windows_seen(size, side, margin)
        return sum(seen) / len(seen)

    def cost(width: int) -> tuple[float, float, bool]:
        height = block_n // width
        meets = windows(height, key_window[0]) * windows(width, key_window[1])
        return meets, max(width / height, height / width), width < height

    width = min((1 << exponent for exponent in range(block_n.bit_length())), key=cost)
    return block_n // width, width


def windows_seen(size: int, side: int, margin: int) -> list[int]:
    """Return how many windows see a pixel of each tile of `backward_kv` along one axis, in one period of the pattern.

    Args:
        size: Side of a tile.
        side: Side of the windows of keys.
        margin: As in `Attention`.
    """
    step = side - 2 * margin
    starts = range(margin, margin + math.lcm(size, step), size)
    return [(first + size - 1 + margin) // step - (first - margin) // step + 1 for first in starts]


def key_tiles(size: int, tile: int, margin: int) -> int:
    """Return the number of tiles of `backward_kv` along one axis of the image: one begins at the margin.

    Args:
        size: Side of the image.
        tile: Side of a tile.
        margin: As in `Attention`.
    """
    return triton.cdiv(size + -margin % tile, tile)


def bias_chunks(windows: int, programs: int) -> int:
    """Return the number of chunks of windows in `backward_bias`: a power of two, so that few kernels are compiled."""
    wanted = max(1, min(windows, BIAS_PROGRAMS // programs))
    return 1 << (wanted.bit_length() - 1)


def device_of(tensor: Tensor) -> Any:
    """Return a context in which launches go to the tensor's device; it has no effect for tensors on the CPU."""
    return nullcontext() if tensor.is_cpu else torch.get_device_module(tensor.device).device(tensor.device)


def with_even_pixels(tensor: Tensor) -> Tensor:
    """Return ``(B, H, W, C)`` with contiguous channels and evenly spaced pixels: the tensor itself, or a copy."""
    batch, height, width, channels = tensor.shape
    step = tensor.stride(2)
    wanted = ((batch, height * width * step), (height, width * step), (width, step), (channels, 1))
    even = all(size == 1 or stride == want for (size, want), stride in zip(wanted, tensor.stride(), strict=True))
    return tensor if even and step >= channels else tensor.contiguous()


def with_even_keys(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values as `with_even_pixels`, with the same strides: the tensors themselves, or copies."""
    k, v = with_even_pixels(k), with_even_pixels(v)
    return (k, v) if k.stride(2) == v.stride(2) else (k.contiguous(), v.contiguous())
