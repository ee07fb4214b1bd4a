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

from savl.kernels import attention, attention_backward
from savl.kernels.configs import KernelConfig, Problem, config_for
from savl.kernels.log_sum_exp import lse_dtype

BIAS_PROGRAMS = 1024
"""Approximate number of programs that share the sum over windows of `backward_bias`. It is the same for every GPU, so
that the same shapes give the same bits on all of them."""

OPTIONS = {"enable_fp_fusion": True}
"""Options of Triton for every kernel. Fused multiply-adds were the default up to Triton 3.9."""


@dataclass(frozen=True)
class Attention:
    """One call: its tensors as (B, H, W, C) views with contiguous channels, and its geometry in pixels."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias_table: Tensor
    severity: Tensor | None
    window: int
    key_window: int
    shift: int

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.bias_table.shape[1]

    @property
    def problem(self) -> Problem:
        """The problem that block sizes are looked up for."""
        head_dim = self.q.shape[3] // self.heads
        return Problem(str(self.q.dtype).removeprefix("torch."), head_dim, self.window, self.key_window)

    @property
    def windows(self) -> int:
        """Number of windows of all images."""
        batch, height, width, _ = self.q.shape
        return batch * (height // self.window) * (width // self.window)

    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments that all kernels share."""
        problem = self.problem
        scale = problem.head_dim**-0.5
        grows = self.severity is not None or scale * math.log2(math.e) > 1
        return {
            "HEADS": self.heads,
            "HEAD_DIM": problem.head_dim,
            "BLOCK_D": problem.block_d,
            "WINDOW": self.window,
            "KEY_WINDOW": self.key_window,
            "SCALE": scale,
            "HAS_SEVERITY": self.severity is not None,
            # A factor of the logits that is larger than q or k may exceed the range of float16.
            "WIDE_FACTORS": self.q.dtype == torch.float16 and grows,
            "SHIFTED": self.shift > 0,
            "FAR": self.q.shape[1] * self.q.shape[2] * max(self.q.stride(2), self.k.stride(2)) >= 2**31,
            "PRECISION": precision(self.q.dtype, problem.head_dim),
        }

    def scaled_bias(self) -> Tensor:
        """Return the bias table as float32 (heads, span²), in units of ln 2."""
        rows, heads = self.bias_table.shape
        bias = torch.empty(heads, rows, dtype=torch.float32, device=self.q.device)
        return torch.mul(self.bias_table.t(), math.log2(math.e), out=bias)

    def config(self, stage: str) -> KernelConfig:
        """Return the block sizes of one of `savl.kernels.configs.STAGES`."""
        return config_for(stage, self.problem, *_gpu(self.q.device.index if self.q.is_cuda else None))[0]

    def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        """Run a kernel. Every launch of an attention kernel is a call of this method.

        Args:
            kernel: One of `savl.kernels.attention` or `attention_backward`.
            programs: How many of its programs to run.
            arguments: Its positional arguments.
            constants: Its compile-time arguments, and options of Triton.
        """
        kernel[(programs,)](*arguments, **constants, **OPTIONS)


@cache
def _gpu(index: int | None) -> tuple[str | None, tuple[int, int]]:
    """Return name and compute capability of a CUDA device; None and (9, 0) for no device, as when interpreted."""
    if index is None:
        return None, (9, 0)
    return torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)


def precision(dtype: torch.dtype, head_dim: int) -> str:
    """Return how products are computed: as torch does, which uses tf32 only for rows of whole 16 bytes."""
    if dtype != torch.float32:
        return "tf32"  # for the float32 factors of float16 tensors; 16-bit operands are not affected
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and head_dim % 4 == 0
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
            call.windows * call.heads * triton.cdiv(call.window**2, config.block_m),
            call.q,
            call.k,
            call.v,
            call.scaled_bias(),
            call.severity if call.severity is not None else lse,
            out,
            lse,
            height,
            width,
            call.shift,
            call.q.stride(2),
            call.k.stride(2),
            **call.constants(),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            STAGES=config.stages,
            num_warps=config.warps,
        )
    return out, lse


def backward(
    call: Attention, out: Tensor, lse: Tensor, grad_out: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the backward kernels.

    Args:
        call: As for `forward`.
        out: Output that `forward` returned.
        lse: Log-sum-exp that `forward` returned.
        grad_out: Gradient of out, contiguous.
        grad_q: Output; a (B, H, W, C) view with contiguous channels and evenly spaced pixels.
        grad_k: Output; a view with the same layout requirements as ``grad_q``.
        grad_v: Output; a view with the strides of ``grad_k``.

    Returns:
        Gradients of the bias table and of the severity, in their shapes and dtypes; without severity the second is
        empty.
    """
    batch, height, width, _ = call.q.shape
    table = call.bias_table
    grad_table = torch.zeros_like(table, memory_format=torch.contiguous_format)
    severity = call.severity
    # A single key has the weight 1 for any logit, so its logit has no gradient, and rounding must not give it one. A
    # logit that is NaN makes the output NaN, but not the gradients.
    if call.key_window == 1:
        grad_q.zero_()
        grad_k.zero_()
        grad_v.copy_(grad_out)
    if call.windows == 0 or call.key_window == 1:
        return grad_table, call.q.new_empty(0) if severity is None else torch.zeros_like(severity)
    maps = (batch, call.heads, height, width)
    delta = torch.empty(maps, dtype=torch.float32, device=call.q.device)
    # Parts of the severity's gradient: through q and through k, for each head.
    shares = torch.empty((2, *maps) if severity is not None else 0, dtype=torch.float32, device=call.q.device)
    through_q, through_k = (shares[0], shares[1]) if severity is not None else (lse, lse)
    image = (height, width, call.shift, call.q.stride(2), call.k.stride(2))
    bias = call.scaled_bias()
    severity_map = severity if severity is not None else lse  # some pointer: not read without severity
    with device_of(call.q):
        config = call.config("backward_q")
        call.launch(
            attention_backward.backward_q, call.windows * call.heads * triton.cdiv(call.window**2, config.block_m),
            call.q, call.k, call.v, bias, severity_map, out, lse, grad_out, delta, grad_q, through_q,
            *image, grad_q.stride(2), **call.constants(),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip
        config = call.config("backward_kv")
        tile_height, tile_width = key_tile(config.block_n)
        tiles = batch * triton.cdiv(height, tile_height) * triton.cdiv(width, tile_width)
        call.launch(
            attention_backward.backward_kv, tiles * call.heads,
            call.q, call.k, call.v, bias, severity_map, lse, grad_out, delta, grad_k, grad_v, through_k,
            *image, grad_k.stride(2), **call.constants(),
            BLOCK_M=config.block_m, TILE_HEIGHT=tile_height, TILE_WIDTH=tile_width, STAGES=config.stages,
            num_warps=config.warps,
        )  # fmt: skip
        config = call.config("backward_bias")
        pairs = triton.cdiv(call.window**2, config.block_m) * triton.cdiv(call.key_window**2, config.block_n)
        chunks = bias_chunks(call.windows, pairs * call.heads)
        sums = torch.empty(
            chunks, call.heads, call.window**2, call.key_window**2, dtype=torch.float32, device=call.q.device
        )
        call.launch(
            attention_backward.backward_bias, pairs * call.heads * chunks,
            call.q, call.k, call.v, bias, severity_map, lse, grad_out, delta, sums, call.windows,
            *image, **call.constants(), CHUNKS=chunks,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip
        span = call.window + call.key_window - 1
        call.launch(
            attention_backward.fold_bias, span * call.heads,
            sums.sum(0), grad_table, call.heads, call.window, call.key_window,
            triton.next_power_of_2(call.window), triton.next_power_of_2(span),
        )  # fmt: skip
    if severity is None:
        return grad_table, call.q.new_empty(0)
    return grad_table, shares.sum((0, 2)).to(severity.dtype)


def key_tile(block_n: int) -> tuple[int, int]:
    """Return height and width, in pixels, of a tile of keys in `backward_kv`: powers of two, as square as possible."""
    width = 1 << (block_n.bit_length() // 2)
    return block_n // width, width


def bias_chunks(windows: int, programs: int) -> int:
    """Return the number of chunks of windows in `backward_bias`: a power of two, so that few kernels are compiled."""
    wanted = max(1, min(windows, BIAS_PROGRAMS // programs))
    return 1 << (wanted.bit_length() - 1)


def device_of(tensor: Tensor) -> Any:
    """Return a context in which launches go to the tensor's device; it has no effect for tensors on the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def with_even_pixels(tensor: Tensor) -> Tensor:
    """Return ``(B, H, W, C)`` with contiguous channels and evenly spaced pixels: the tensor itself, or a copy."""
    batch, height, width, channels = tensor.shape
    step = tensor.stride(2)
    wanted = ((batch, height * width * step), (height, width * step), (width, step), (channels, 1))
    even = all(size == 1 or stride == want for (size, want), stride in zip(wanted, tensor.stride(), strict=True))
    return tensor if even and step >= channels else tensor.contiguous()
