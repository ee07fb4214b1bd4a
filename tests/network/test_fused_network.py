"""The whole network on fused kernels: the same image, gradients, compilation, export, autocast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from savl.build_info import build_info
from savl.inference import Upscaler
from savl.network import DSCA, HAB, OCAB, SAVL, SAVLConfig
from savl.ops import use_fused_kernels
from savl.ops.equivalence import Budget, measure
from savl.ops.library import EXTENSION_UNAVAILABLE
from savl.ops.op import OPS
from savl.weights import load

pytestmark = pytest.mark.skipif(
    EXTENSION_UNAVAILABLE is not None, reason=str(build_info()["reason"] or EXTENSION_UNAVAILABLE)
)

Small = Callable[..., SAVLConfig]
PerturbParameters = Callable[[Any], Any]
Outputs = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _forget_compiled() -> None:
    torch.compiler.reset()


@pytest.fixture(scope="module")
def small(small_config: Small, perturb_parameters: PerturbParameters) -> SAVL:
    """Return the small network with parameters away from zero, float32."""
    torch.manual_seed(0)
    model: SAVL = perturb_parameters(SAVL(small_config())).float()
    return model


@pytest.fixture(scope="module")
def smallest(small_config: Small, perturb_parameters: PerturbParameters) -> SAVL:
    """Return a network with one group, which has every block and a shifted window; tracing takes half as long."""
    torch.manual_seed(0)
    config = small_config(depths=(2,), estimator_dilations=(1,))
    model: SAVL = perturb_parameters(SAVL(config)).float()
    return model


@pytest.fixture(scope="module")
def tiny() -> SAVL:
    return load("savl-tiny")


def image(height: int, width: int, seed: int = 3, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=generator)


def run(model: SAVL, lr: Tensor, fused: bool, gradients: bool) -> Outputs:
    """Return image, field, and gradients of all parameters and the input, in the dtype of the model."""
    model = copy.deepcopy(model)
    lr = lr.detach().clone().requires_grad_(gradients)
    with use_fused_kernels(fused), torch.set_grad_enabled(gradients):
        sr, field = model(lr, return_field=True)
        assert field is not None
        outputs = {"sr": sr, "mu": field.mu, "severity": field.severity, "variance": field.variance, "kl": field.kl}
        if gradients:
            generator = torch.Generator().manual_seed(4)
            weights = torch.rand(sr.shape, generator=generator).to(sr.dtype)
            ((sr * weights).mean() + 0.01 * field.kl.mean()).backward()  # type: ignore[union-attr]
            outputs["d lr"] = lr.grad
            outputs |= {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in outputs.items()}  # type: ignore[union-attr]


def judge(model: SAVL, lrs: list[Tensor], gradients: bool) -> list[Budget]:
    found: dict[str, list[Budget]] = {}
    wide = copy.deepcopy(model).double()
    for lr in lrs:
        fused, eager = run(model, lr, True, gradients), run(model, lr, False, gradients)
        exact = run(wide, lr.double(), False, gradients)
        assert fused.keys() == eager.keys() == exact.keys(), "a gradient is missing"
        for name in exact:
            found.setdefault(name, []).append(measure(name, fused[name], eager[name], exact[name], lr.numel()))
    return [Budget.pooled(budgets) for budgets in found.values()]


def assert_kept(budgets: list[Budget]) -> None:
    broken = [
        f"the error of {b.name} is {b.error:.3g}, but at most {b.allowed:.3g} is allowed" for b in budgets if not b.kept
    ]
    assert not broken, "; ".join(broken)


def test_the_fused_network_is_as_accurate_as_eager(small: SAVL) -> None:
    lrs = [image(11, 18, seed, batch=2) for seed in range(6)]
    assert_kept(judge(small, lrs, gradients=False))


def test_all_gradients_of_the_fused_network_are_as_accurate_as_eager(small: SAVL) -> None:
    # Some parameters have few gradients, so the error budget is shared by all of them, each relative to the largest
    # gradient of its parameter.
    lrs = [image(9, 14, seed) for seed in range(6)]
    budgets = [budget for budget in judge(small, lrs, gradients=True) if budget.name.startswith("d ")]
    assert len(budgets) > 50
    shares = torch.tensor([budget.used for budget in budgets]).sort().values
    names = [budget.name for budget in budgets if budget.used > 3]
    assert float(shares[int(0.95 * len(shares))]) <= 1, "more than one in twenty gradients breaks the rule"
    assert not names, f"{names} are off by more than three times what is allowed"


def test_savl_tiny_fused_is_as_accurate_as_eager(tiny: SAVL) -> None:
    assert_kept(judge(tiny, [image(20, 35, seed) for seed in range(4)], gradients=False))


def test_a_fused_upscaler_gives_the_picture_of_an_eager_one(tiny: SAVL) -> None:
    upscaler = Upscaler(tiny, tile=32, tile_pad=8, device="cpu")
    lr = image(40, 52)
    eager = upscaler(lr)
    with use_fused_kernels():
        fused = upscaler(lr)
    torch.testing.assert_close(fused.sr, eager.sr, rtol=0, atol=1e-4)
    torch.testing.assert_close(fused.severity, eager.severity, rtol=0, atol=1e-4)


def test_bfloat16_autocast_works_on_fused_kernels_and_agrees(tiny: SAVL) -> None:
    lr = image(17, 30)
    with torch.no_grad():
        exact = copy.deepcopy(tiny).double()(lr.double())
        with torch.autocast("cpu", torch.bfloat16):
            eager = tiny(lr)
            with use_fused_kernels():
                fused = tiny(lr)
    assert fused.dtype == eager.dtype
    budget = measure("sr", fused, eager, exact, lr.numel())
    assert budget.kept, f"the error is {budget.error:.3g}, but at most {budget.allowed:.3g} is allowed"


def test_autocast_trains_on_fused_kernels(small: SAVL) -> None:
    model = copy.deepcopy(small).train()
    with torch.autocast("cpu", torch.bfloat16), use_fused_kernels(**dict.fromkeys(OPS, "cpp")):
        loss = model(image(8, 12)).float().mean()
    loss.backward()
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    assert not broken, f"gradients of {broken} are not finite"
    assert all(p.grad is not None and p.grad.dtype == p.dtype for n, p in model.named_parameters() if "bias_table" in n)


# What is left to torch


class ArithmeticOnFeatures(TorchDispatchMode):
    """Names of torch's arithmetic operations whose results have features of every pixel, unlike images and averages."""

    PRODUCTS = ("addmm", "mm", "bmm", "convolution")
    OTHERS = (
        "native_layer_norm",
        "gelu",
        "leaky_relu",
        "add",
        "sub",
        "mul",
        "div",
        "addcmul",
        "sum",
        "mean",
        "_softmax",
    )

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function.namespace == "aten" and name in (*self.PRODUCTS, *self.OTHERS):
            result = out if isinstance(out, Tensor) else out[0]
            if result.is_floating_point() and result.numel() >= self.pixels and result.shape[1] != 3:
                self.found.add(name)
        return out


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(
    ("part", "eager"),
    [
        pytest.param(HAB, {"native_layer_norm", "addmm", "convolution", "gelu", "add"}, id="HAB"),
        pytest.param(OCAB, {"native_layer_norm", "addmm", "gelu", "add"}, id="OCAB"),
        pytest.param(DSCA, {"native_layer_norm", "addmm", "add", "mul"}, id="DSCA"),
        pytest.param(SAVL, {"native_layer_norm", "addmm", "convolution", "gelu", "leaky_relu", "add"}, id="network"),
    ],
)
@torch.no_grad()
def test_no_arithmetic_on_features_is_left_to_torch(
    smallest: SAVL, part: type[torch.nn.Module], eager: set[str], autocast: bool
) -> None:
    module = next(each for each in smallest.modules() if isinstance(each, part))
    features, mu, severity = torch.rand(1, 8, 16, 12), torch.rand(1, 8, 16, 6), torch.rand(1, 8, 16)
    inputs = {SAVL: (image(8, 16),), DSCA: (features, mu, severity)}.get(part, (features,))
    found = {}
    for fused in (False, True):
        recorded = ArithmeticOnFeatures(8 * 16)
        with use_fused_kernels(fused), torch.autocast("cpu", torch.bfloat16, enabled=autocast), recorded:
            module(*inputs)
        found[fused] = recorded.found
    assert eager <= found[False], "the record misses what it looks for"
    assert found[True] == set()


# Compilation and export


def savl_ops(graph: torch.fx.Graph) -> set[str]:
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return {target.split(".")[1] for target in targets if target.startswith("savl.")}


def test_the_fused_network_compiles_without_graph_breaks_and_has_the_same_gradients(smallest: SAVL) -> None:
    lr = image(8, 12)
    expected = run(smallest, lr, fused=True, gradients=True)
    model = copy.deepcopy(smallest)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    weights = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(4))
    with use_fused_kernels():
        sr, field = compiled(lr, return_field=True)
        ((sr * weights).mean() + 0.01 * field.kl.mean()).backward()
    torch.testing.assert_close(sr, expected["sr"])
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[f"d {name}"], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("inside", ["convolution", "channel_modulation"])
def test_the_exported_network_contains_the_ops(smallest: SAVL, inside: str) -> None:
    lr = image(8, 12)
    model = copy.deepcopy(smallest).requires_grad_(False)
    # A fused convolution modulates its result itself; an eager one calls the other op.
    with use_fused_kernels(convolution=inside == "convolution"):
        program = torch.export.export(model, (lr,))
        expected = model(lr)
    composed = {"guided_projection", "projection_mlp"}  # of other ops, when exported on a CPU
    absent = {"convolution", "channel_modulation"} - {inside}
    assert savl_ops(program.graph) == set(OPS) - composed - absent
    torch.testing.assert_close(program.module()(lr), expected)


def test_a_network_exported_without_fused_kernels_contains_no_ops_of_savl(smallest: SAVL) -> None:
    model = copy.deepcopy(smallest).requires_grad_(False)
    with use_fused_kernels(False):
        program = torch.export.export(model, (image(8, 12),))
    assert savl_ops(program.graph) == set()
