"""Tests of the whole network with the kernels of the GPU: accuracy, compiled, exported, and in a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import savl
from savl.network import SAVL, SAVLConfig
from savl.ops import use_fused_kernels
from savl.ops.equivalence import Budget, measure
from savl.ops.op import OPS
from savl.weights import load

Small = Callable[..., SAVLConfig]
PerturbParameters = Callable[[Any], Any]
Outputs = dict[str, Tensor]

ON_GPU = [name for name, op in OPS.items() if op.backend_for("cuda") is not None]
"""The ops that have a kernel for GPUs."""


@pytest.fixture(autouse=True)
def _every_op_serves(backend_of: Callable[[str], str]) -> Iterator[None]:
    for op in ON_GPU:
        backend_of(op)
    torch.compiler.reset()
    # Convolutions in float32 as they are, not in tf32: they would drown what is looked for.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def small(small_config: Small, perturb_parameters: PerturbParameters) -> SAVL:
    """Return the small network in float32 on the GPU, with parameters for which every part affects the output."""
    torch.manual_seed(0)
    model: SAVL = perturb_parameters(SAVL(small_config())).float().cuda()
    return model


@pytest.fixture(scope="module")
def tiny() -> SAVL:
    return load("savl-tiny").cuda()


@pytest.fixture(scope="module")
def base() -> SAVL:
    """Return savl-base with random weights."""
    torch.manual_seed(0)
    model: SAVL = savl.build("savl-base").eval().cuda()
    return model


def image(height: int, width: int, seed: int = 3, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=generator)


def run(model: SAVL, lr: Tensor, fused: bool, gradients: bool = False, autocast: torch.dtype | None = None) -> Outputs:
    """Compute image, field and gradients on the device of the model, and return them on the CPU."""
    model = copy.deepcopy(model)
    device = next(model.parameters()).device
    lr = lr.detach().to(device).requires_grad_(gradients)
    cast = nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    with use_fused_kernels(fused), torch.set_grad_enabled(gradients):
        with cast:
            sr, field = model(lr, return_field=True)
        outputs = {"sr": sr, "severity": field.severity, "variance": field.variance, "kl": field.kl}
        if gradients:
            generator = torch.Generator().manual_seed(4)
            weights = torch.rand(sr.shape, generator=generator).to(device, sr.dtype)
            ((sr * weights).mean() + 0.01 * field.kl.mean()).backward()
            outputs["d lr"] = lr.grad
            outputs |= {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu() for name, value in outputs.items()}


def judge(model: SAVL, lrs: list[Tensor], **settings: Any) -> list[Budget]:
    """Apply the equivalence rule to the whole network; the float64 reference runs on the CPU."""
    found: dict[str, list[Budget]] = {}
    wide = copy.deepcopy(model).cpu().double()
    for lr in lrs:
        fused, eager = run(model, lr, True, **settings), run(model, lr, False, **settings)
        exact = run(wide, lr.double(), False, gradients=settings.get("gradients", False))
        assert fused.keys() == eager.keys() == exact.keys(), "a gradient is missing"
        for name in exact:
            found.setdefault(name, []).append(measure(name, fused[name], eager[name], exact[name], lr.numel()))
    return [Budget.pooled(budgets) for budgets in found.values()]


def assert_kept(budgets: list[Budget]) -> None:
    broken = [
        f"the error of {b.name} is {b.error:.3g}, but at most {b.allowed:.3g} is allowed" for b in budgets if not b.kept
    ]
    assert not broken, "; ".join(broken)


def assert_gradients_kept(budgets: list[Budget]) -> None:
    """Check that at most one gradient in twenty exceeds its budget, and none three times its budget.

    Some gradients consist of few numbers, whose maximum error is not a reliable estimate of the rounding error.
    """
    budgets = [budget for budget in budgets if budget.name.startswith("d ")]
    assert len(budgets) > 50
    shares = torch.tensor([budget.used for budget in budgets]).sort().values
    names = [budget.name for budget in budgets if budget.used > 3]
    assert float(shares[int(0.95 * len(shares))]) <= 1, "more than one in twenty gradients breaks the rule"
    assert not names, f"{names} are off by more than three times what is allowed"


AUTOCAST = pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])


@AUTOCAST
def test_the_small_network_is_as_accurate_as_eager(small: SAVL, autocast: torch.dtype | None) -> None:
    assert_kept(judge(small, [image(11, 18, seed, batch=2) for seed in range(6)], autocast=autocast))


@AUTOCAST
def test_savl_tiny_is_as_accurate_as_eager(tiny: SAVL, autocast: torch.dtype | None) -> None:
    assert_kept(judge(tiny, [image(20, 35, seed) for seed in range(4)], autocast=autocast))


@pytest.mark.slow
@AUTOCAST
def test_savl_base_is_as_accurate_as_eager(base: SAVL, autocast: torch.dtype | None) -> None:
    assert_kept(judge(base, [image(40, 56, seed) for seed in range(3)], autocast=autocast))


def test_all_gradients_are_as_accurate_as_eager(small: SAVL) -> None:
    assert_gradients_kept(judge(small, [image(9, 14, seed) for seed in range(6)], gradients=True))


def test_the_gradients_of_a_training_step_under_autocast_are_as_accurate_as_eager(tiny: SAVL) -> None:
    lrs = [image(24, 24, seed, batch=2) for seed in range(4)]
    assert_gradients_kept(judge(tiny, lrs, gradients=True, autocast=torch.bfloat16))


def test_a_training_step_updates_the_parameters_like_eager(small: SAVL) -> None:
    lr, hr = image(8, 12).cuda(), image(32, 48, seed=5).cuda()
    moved = {}
    for fused in (True, False):
        model = copy.deepcopy(small)
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
        with use_fused_kernels(fused):
            (model(lr) - hr).abs().mean().backward()
        optimiser.step()
        moved[fused] = dict(model.named_parameters())
    for name, value in moved[False].items():
        torch.testing.assert_close(moved[True][name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# Compilation, export, graphs


@pytest.mark.slow
def test_savl_tiny_compiles_to_one_graph_under_autocast(tiny: SAVL) -> None:
    lr = image(24, 40)
    model = copy.deepcopy(tiny).requires_grad_(False)
    exact = run(model.cpu().double(), lr.double(), fused=False)["sr"]
    model = copy.deepcopy(tiny).requires_grad_(False)
    eager = run(model, lr, fused=False, autocast=torch.bfloat16)["sr"]
    compiled = torch.compile(model, fullgraph=True)
    with use_fused_kernels(), torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        found = compiled(lr.cuda())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            compiled(lr.cuda())
    used = {event.key for event in profile.key_averages() if event.key.startswith("savl::")}
    assert used >= {f"savl::{op}" for op in ON_GPU}
    budget = measure("sr", found.cpu().to(eager.dtype), eager, exact, lr.numel())
    assert budget.kept, f"the error is {budget.error:.3g}, but at most {budget.allowed:.3g} is allowed"


@pytest.mark.slow
def test_the_compiled_network_can_be_trained(small: SAVL) -> None:
    lr = image(8, 12).cuda()
    gradients = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = copy.deepcopy(small)
        forward = torch.compile(model, fullgraph=True) if compiled else model
        with use_fused_kernels():
            forward(lr).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    uncompiled, found = gradients
    assert found.keys() == uncompiled.keys()
    for name, value in uncompiled.items():
        largest = float(value.abs().max())
        torch.testing.assert_close(
            found[name], value, rtol=1e-3, atol=1e-4 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_exported_network_contains_the_ops(small: SAVL) -> None:
    lr = image(8, 12).cuda()
    model = copy.deepcopy(small).requires_grad_(False)
    with use_fused_kernels():
        program = torch.export.export(model, (lr,))
        expected = model(lr)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert {target.split(".")[1] for target in targets if target.startswith("savl.")} == set(ON_GPU)
    torch.testing.assert_close(program.module()(lr), expected)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["f32", "bf16"])
def test_a_cuda_graph_of_savl_tiny_computes_the_same_as_a_launch(tiny: SAVL, autocast: torch.dtype | None) -> None:
    still, other = image(24, 40, seed=0).cuda(), image(24, 40, seed=1).cuda()
    model = copy.deepcopy(tiny).requires_grad_(False)
    cast = nullcontext() if autocast is None else torch.autocast("cuda", autocast, cache_enabled=False)
    with use_fused_kernels(), torch.no_grad(), cast:
        expected = model(other)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(still)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(still)
    still.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    # Libraries may choose other algorithms while a graph is captured.
    tolerance = 1e-5 if autocast is None else 2e-2
    torch.testing.assert_close(captured, expected, rtol=0, atol=tolerance)


def test_the_forward_pass_does_not_synchronise(tiny: SAVL) -> None:
    lr = image(24, 40).cuda()
    with use_fused_kernels(), torch.no_grad():
        tiny(lr)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            tiny(lr)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_an_upscaler_on_the_gpu_returns_the_same_image_as_eager(tiny: SAVL) -> None:
    upscaler = savl.Upscaler(tiny, tile=32, tile_pad=8, device="cuda")
    lr = image(40, 52)
    with use_fused_kernels(False):
        eager = upscaler(lr)
    with use_fused_kernels():
        fused = upscaler(lr)
    torch.testing.assert_close(fused.sr, eager.sr, rtol=0, atol=2e-3)
