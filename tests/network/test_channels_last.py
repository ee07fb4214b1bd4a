"""The estimator in channels_last under bfloat16 autocast, where a kernel of oneDNN once crashed the process.

Without AMX, oneDNN computes the weight gradient of a dilated convolution of 24 channels by a kernel that reads beyond
the end of its scratch memory. `ONEDNN_MAX_CPU_ISA` makes a processor with AMX run it too, and a small
`MALLOC_MMAP_THRESHOLD_` puts memory where reading beyond the end is noticed. If `savl.ops.convolution` gave oneDNN
these images in channels_last, both programs here would end in a segmentation fault on a processor with AVX-512.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from savl.network import CONFIGS, AmortizedEstimator
from savl.network.layers import ChannelsLastConv2d
from savl.ops import gaussian_posterior, use_fused_kernels
from savl.ops.op import OPS

LAST = torch.channels_last

ONE_BY_ONE = """
import torch
from savl.network import CONFIGS, AmortizedEstimator
torch.set_num_threads(1)
last = torch.channels_last
estimator = AmortizedEstimator(CONFIGS["savl-tiny"]).to(memory_format=last)
for convolution in estimator.body[2::2]:
    for side in (32, 48, 64):
        y = torch.randn(4, side, side, 24).bfloat16()[:2].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = convolution(y)
        gradient = torch.randn(out.shape).bfloat16()
        torch.autograd.grad(out, (y, *convolution.parameters()), gradient)
"""

TRAINING = """
import torch
from savl.network import CONFIGS, AmortizedEstimator
from savl.ops import gaussian_posterior, use_fused_kernels
torch.set_num_threads(1)
last = torch.channels_last
estimator = AmortizedEstimator(CONFIGS["savl-tiny"]).to(memory_format=last)
optimizer = torch.optim.AdamW(estimator.parameters(), 1e-3)
for step, side in enumerate((32, 40, 48, 64, 96)):
    y = torch.rand(2, 3, side, side).contiguous(memory_format=last)
    with use_fused_kernels(step % 2 == 0), torch.autocast("cpu", torch.bfloat16):
        posterior = gaussian_posterior(*estimator(y), seed=step)
        loss = posterior.sample.float().square().mean() + posterior.kl.mean() + posterior.severity.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


@pytest.mark.parametrize(("program", "threshold"), [(ONE_BY_ONE, None), (TRAINING, "16384")], ids=["single", "steps"])
def test_training_in_channels_last_and_bfloat16_does_not_crash(
    program: str, threshold: str | None, tmp_path: Path
) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    if threshold is not None:
        environment["MALLOC_MMAP_THRESHOLD_"] = threshold
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


class ConvolutionInputs(TorchDispatchMode):
    """Record which dilated convolutions get channels_last tensors while gradients are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.interleaved: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(function) and any(list(arg) == [4, 4] for arg in args if isinstance(arg, list)):
            self.seen += 1
            images = [arg for arg in args if isinstance(arg, Tensor) and arg.dim() == 4]
            if str(function).startswith("aten.convolution_backward"):
                images = images[1:]  # torch converts the gradient to the layout of the others
            if any(not image.is_contiguous() for image in images):
                self.interleaved.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["autocast", "bfloat16"])
def test_a_dilated_convolution_is_trained_in_the_contiguous_layout(way: str) -> None:
    convolution = ChannelsLastConv2d(24, 24, 3, dilation=4).to(memory_format=LAST)
    y = torch.rand(2, 16, 16, 24, requires_grad=True)
    if way == "bfloat16":
        convolution, y = convolution.bfloat16(), y.detach().bfloat16().requires_grad_()
    with ConvolutionInputs() as inputs:
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            out = convolution(y)
        out.float().square().mean().backward()
    assert inputs.seen >= 2
    assert not inputs.interleaved


def test_torch_computes_the_weight_gradient_of_the_fused_op_in_the_contiguous_layout() -> None:
    gradient, y = torch.rand(2, 2, 16, 16, 24).bfloat16()
    weight = torch.rand(24, 24, 3, 3).contiguous(memory_format=LAST)
    backward = OPS["convolution"].backward_in_torch
    assert backward is not None
    with ConvolutionInputs() as inputs:
        backward(gradient, y, weight, *[None] * 4, gradient, 4, 0, 0.0, 0.0, False, [False, True, *[False] * 7])
    assert inputs.seen == 1
    assert not inputs.interleaved


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
def test_gradients_in_channels_last_are_those_of_the_contiguous_layout(fused: bool) -> None:
    torch.manual_seed(0)
    plain = AmortizedEstimator(CONFIGS["savl-tiny"])
    y = torch.rand(2, 3, 17, 24)
    results = []
    for layout in (torch.contiguous_format, LAST):
        estimator = copy.deepcopy(plain).to(memory_format=layout)
        with use_fused_kernels(fused), torch.autocast("cpu", torch.bfloat16):
            posterior = gaussian_posterior(*estimator(y.contiguous(memory_format=layout)), seed=1)
            loss = posterior.sample.float().square().mean() + posterior.kl.mean() + posterior.severity.mean()
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in estimator.parameters())])
    for found, wanted in zip(results[1], results[0], strict=True):
        assert found is not None
        assert wanted is not None
        assert float((found - wanted).norm()) <= 2e-2 * float(wanted.norm())
