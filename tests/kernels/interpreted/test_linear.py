"""Linear layers and what surrounds them: `convolution` with 1×1 kernels, `guided_projection` and `projection_mlp`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from kernel_checks import (
    DTYPES,
    FLOAT32,
    LAYOUTS,
    TRITON,
    argument,
    assert_accurate,
    assert_same_bits,
    changed,
    uninitialised_memory_is_nan,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from savl.network import HAB, OCAB, SAVLConfig
from savl.network.dsca import DSCA
from savl.ops import KernelSettings, use_fused_kernels
from savl.ops.convolution import convolution_case
from savl.ops.guided_projection import guided_projection_case
from savl.ops.op import OPS
from savl.ops.projection_mlp import projection_mlp_case

LINEAR: dict[str, dict[str, Any]] = {
    "C 144 to 48, pixels of two tiles": {"height": 9, "width": 8, "channels": 144, "outputs": 48, "norm": True},
    "C 180 to 7": {"height": 2, "width": 3, "channels": 180, "outputs": 7, "modulation": True, "activation": "gelu"},
    "C 1 to 1": {"height": 2, "width": 3, "channels": 1, "outputs": 1, "residual": True},
    "C 288 to 80": {"height": 2, "width": 2, "channels": 288, "outputs": 80, "gate": (2, 1)},
    "C 400 normalised": {"height": 1, "width": 3, "channels": 400, "outputs": 5, "norm": True},
}
SMALL = {
    "convolution": partial(
        convolution_case, batch=1, height=3, width=5, channels=19, outputs=21, norm=True, modulation=True
    ),
    "guided_projection": partial(
        guided_projection_case, height=3, width=5, inner=19, channels=21, latent=7, shift=True
    ),
    "projection_mlp": partial(
        projection_mlp_case, height=4, width=6, inner=19, channels=21, convolved=3, grid=(2, 3), expanded=24
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_outputs_and_gradients_are_as_accurate_as_eager(name: str, dtype: torch.dtype) -> None:
    assert_accurate(lambda seed: convolution_case(dtype, batch=1, seed=seed, **LINEAR[name]))


@pytest.mark.parametrize("channels", [16, 48])  # one piece, and two without masks
def test_the_end_of_a_block_is_as_accurate_as_eager(channels: int) -> None:
    sizes = {"height": 9, "width": 8, "inner": channels, "channels": channels, "convolved": 2, "grid": (3, 2)}
    assert_accurate(lambda seed: projection_mlp_case(FLOAT32, seed=seed, **sizes), draws=1)


@pytest.mark.parametrize("op", SMALL)
def test_every_element_is_written_and_every_run_is_bit_identical(op: str) -> None:
    case = SMALL[op](FLOAT32)
    expected = case.run("triton")
    with uninitialised_memory_is_nan():
        assert_same_bits(case.run("triton"), expected, "on the second run, with memory full of NaN")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", SMALL)
def test_any_layout_gives_the_same_bits(op: str, layout: str) -> None:
    case = SMALL[op](FLOAT32)
    images = [name for name, value in case.arguments.items() if value is not None and value.shape[:3] == (1, 3, 5)]
    views = {name: LAYOUTS[layout](argument(case, name)) for name in images or ("x", "residual", "hidden")}
    assert_same_bits(changed(case, **views).run("triton"), case.run("triton"), layout)


def test_a_float32_residual_of_float16_features_gives_a_float32_sum() -> None:
    case = convolution_case(torch.float16, batch=1, height=2, width=3, channels=19, outputs=5, residual=True)
    wide = changed(case, residual=argument(case, "residual").float())
    found, expected = wide.run("triton")["out"], wide.run("eager", torch.float64)["out"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("op", ["guided_projection", "projection_mlp"])
def test_opcheck_accepts_the_registration_and_the_fake_kernels(op: str) -> None:
    case = SMALL[op](FLOAT32)
    options = (1e-5,) if op == "projection_mlp" else ()
    given = tuple(None if each is None else each.clone().requires_grad_() for each in case.arguments.values())
    forward, backward = (getattr(torch.ops.savl, name).default for name in (op, f"{op}_backward"))
    torch.library.opcheck(forward, (*given, *options))
    detached = tuple(None if each is None else each.detach() for each in given)
    arguments = (torch.ones_like(forward(*detached, *options)), *detached, *options)
    torch.library.opcheck(backward, arguments)
    with FakeTensorMode() as mode:
        fake = backward(*(mode.from_tensor(each) if isinstance(each, Tensor) else each for each in arguments))
    for found, promised in zip(backward(*arguments), fake, strict=True):
        assert (found.shape, found.dtype, found.stride()) == (promised.shape, promised.dtype, promised.stride())


@pytest.mark.parametrize("op", SMALL)
def test_a_compiled_op_equals_the_op(op: str) -> None:
    function, tensors = SMALL[op](FLOAT32).function()
    results = []
    with use_fused_kernels(**vars(KernelSettings.of(False, **{op: "triton"}))):
        for called in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            given = [each.clone().requires_grad_() for each in tensors]
            (out,) = called(*given)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), given)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_blocks_of_a_network_end_in_these_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SAVLConfig(channels=12, depths=(1,), heads=2, window=4, latent=3, cab_compress=3, cab_squeeze=3)
    torch.manual_seed(0)
    x, mu = torch.randn(1, 4, 8, 12), torch.randn(1, 4, 8, 3)
    launched: list[str] = []
    for module in (DSCA(config, 0), HAB(config, 2, 0.0), OCAB(config)):
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        given = (x, mu, torch.rand(1, 4, 8)) if isinstance(module, DSCA) else (x,)
        expected = module(*given)
        with use_fused_kernels(**vars(TRITON)), Names(launched):
            found = module(*given)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert launched.count("guided_projection") == 1
    assert launched.count("projection_mlp") == 2
    assert launched.count("convolution") == 4, "three projections to q, k and v, and the compression of CAB"
    assert set(launched) <= set(OPS)


class Names(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the ops of savl that run."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "savl":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))
