"""Published architectures of other authors, from spandrel, at their published sizes, with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

import savl
from benchmarks.cases import BenchmarkCase, NotAvailableError, Result, Run
from benchmarks.peers import runtimes, sdpa
from savl.weights.spandrel_model import SpandrelUnavailable, import_spandrel

ACCELERATED, BFLOAT16, EAGER_BFLOAT16 = "accelerated", "accelerated, bfloat16", "eager, bfloat16"
_SIX = [6] * 6
# The file in spandrel's package, the class, and its arguments, as in the papers' configurations for ×4.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "SwinIR-M": (
        "SwinIR.__arch.SwinIR",
        "SwinIR",
        {"img_size": 64, "embed_dim": 180, "depths": _SIX, "num_heads": _SIX, "window_size": 8, "mlp_ratio": 2,
         "upscale": 4, "upsampler": "pixelshuffle"},
    ),
    "HAT-S": (
        "HAT.__arch.HAT",
        "HAT",
        {"img_size": 64, "embed_dim": 144, "depths": _SIX, "num_heads": _SIX, "window_size": 16, "mlp_ratio": 2,
         "compress_ratio": 24, "squeeze_factor": 24, "overlap_ratio": 0.5, "upscale": 4, "upsampler": "pixelshuffle"},
    ),
    "DRCT": (
        "DRCT.__arch.drct_arch",
        "DRCT",
        {"img_size": 64, "embed_dim": 180, "depths": _SIX, "num_heads": _SIX, "window_size": 16, "mlp_ratio": 2,
         "gc": 32, "upscale": 4, "upsampler": "pixelshuffle"},
    ),
    "ATD": (
        "ATD.__arch.atd_arch",
        "ATD",
        {"img_size": 64, "embed_dim": 210, "depths": _SIX, "num_heads": _SIX, "window_size": 16, "category_size": 256,
         "num_tokens": 128, "reducted_dim": 20, "convffn_kernel_size": 5, "mlp_ratio": 2, "upscale": 4,
         "upsampler": "pixelshuffle"},
    ),
    "DAT-S": (
        "DAT.__arch.DAT",
        "DAT",
        {"img_size": 64, "embed_dim": 180, "depth": _SIX, "num_heads": _SIX, "split_size": [8, 16],
         "expansion_factor": 2, "upscale": 4},
    ),
    "RGT": (
        "RGT.__arch.rgt",
        "RGT",
        {"img_size": 64, "embed_dim": 180, "depth": [6] * 8, "num_heads": [6] * 8, "split_size": [8, 32],
         "mlp_ratio": 2, "c_ratio": 0.5, "upscale": 4},
    ),
    "CRAFT": (
        "CRAFT.__arch.CRAFT",
        "CRAFT",
        {"window_size": 16, "embed_dim": 48, "depths": [2] * 4, "num_heads": [6] * 4,
         "split_size_0": 4, "split_size_1": 16, "mlp_ratio": 2, "upscale": 4},
    ),
    "Swin2SR": (
        "Swin2SR.__arch.Swin2SR",
        "Swin2SR",
        {"img_size": 64, "embed_dim": 180, "depths": _SIX, "num_heads": _SIX, "window_size": 8, "mlp_ratio": 2,
         "upscale": 4, "upsampler": "pixelshuffle"},
    ),
    "OmniSR": ("OmniSR.__arch.OmniSR", "OmniSR", {"num_feat": 64, "up_scale": 4, "res_num": 5, "window_size": 8}),
    "SCUNet": ("SCUNet.__arch.SCUNet", "SCUNet", {"config": [4] * 7, "dim": 64}),
    "FDAT": ("FDAT.__arch.fdat", "FDAT", {"scale": 4}),
}  # fmt: skip


@cache
def network(name: str) -> nn.Module:
    """Return an architecture with random weights, in evaluation mode.

    Raises:
        NotAvailableError: spandrel is not installed.
    """
    file, kind, arguments = ARCHITECTURES[name]
    try:
        import_spandrel()
    except SpandrelUnavailable as error:
        raise NotAvailableError(str(error)) from error
    module = import_module(f"spandrel.architectures.{file}")
    torch.manual_seed(0)
    built: nn.Module = getattr(module, kind)(**arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            if "relative_position" in key:  # initialised so near to 0 that an error would not show
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return built.eval().requires_grad_(False)


def tile(run: Run, name: str) -> BenchmarkCase:
    """Return the benchmark of an architecture on one tile."""
    model = network(name).to(run.device)
    exact = copy.deepcopy(model).to(run.reference_dtype)
    lr = run.draw(1, 3, run.side, run.side, seed=12, uniform=True)
    eager_net = copy.deepcopy(model).to(run.dtype)

    def eager(given: Tensor) -> Tensor:
        result: Tensor = (eager_net if given.dtype == run.dtype else exact)(given)
        return result

    accelerated = copy.deepcopy(eager_net)
    report = savl.accelerate(accelerated)  # here, so that its time and memory do not count

    def with_savl(given: Tensor) -> Tensor:
        if report.served < len(report.blocks):
            raise RuntimeError(f"not every block is served: {report}")
        with savl.use_fused_kernels():
            result: Tensor = accelerated(given)
        return result

    by_sdpa = sdpa.patched(copy.deepcopy(eager_net))
    variants: dict[str, Callable[..., Result]] = {
        "eager": eager,
        ACCELERATED: with_savl,
        "compile": torch.compile(copy.deepcopy(eager_net), dynamic=False),
    }
    skipped: dict[str, str] = {}
    if by_sdpa is not None:
        variants["sdpa"] = by_sdpa
    else:
        skipped["sdpa"] = "its attention is not one that this baseline replaces"
    precisions: dict[str, torch.dtype] = {}
    if run.cuda or run.dtype != torch.float32:
        skipped |= dict.fromkeys((*runtimes.VARIANTS, EAGER_BFLOAT16, BFLOAT16), "measured on a CPU in float32")
    else:
        skipped |= runtimes.unavailable()
        variants |= runtimes.calls(model, lr)
        if torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported():
            precisions |= {EAGER_BFLOAT16: torch.bfloat16, BFLOAT16: torch.bfloat16}
            variants |= {EAGER_BFLOAT16: _in_bfloat16(eager), BFLOAT16: _in_bfloat16(with_savl)}
        else:
            skipped |= dict.fromkeys((EAGER_BFLOAT16, BFLOAT16), "this processor has no bfloat16 instructions")
        if runtimes.OPENVINO_DEFAULT not in skipped:
            precisions[runtimes.OPENVINO_DEFAULT] = runtimes.default_precision()
    return BenchmarkCase(
        f"{name}, {run.side}×{run.side}", (lr,), variants, run.reference_dtype, skipped=skipped, precisions=precisions
    )


def _in_bfloat16(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def compute(given: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(given)

    return compute
