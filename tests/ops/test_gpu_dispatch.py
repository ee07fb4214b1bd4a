"""Dispatch of calls with tensors on a GPU, tested on any machine: fake tensors have a device and shapes, no numbers.

The tests of builds of torch for AMD GPUs replace what torch says about itself and its device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from savl.kernels import gpu as kinds
from savl.ops import (
    KernelSettings,
    KernelUnavailable,
    channel_gate,
    channel_modulation,
    convolution,
    fuses_convolution,
    gaussian_posterior,
    guided_projection,
    kernel_report,
    layer_norm,
    overlapping_window_attention,
    projection_mlp,
    switch,
    use_fused_kernels,
    window_attention,
)
from savl.ops import gpu as gpus
from savl.ops import op as op_registry
from savl.ops.gpu import why_unfit
from savl.ops.library import FUSED, TRITON_MISSING, load_cuda_library
from savl.ops.op import OPS


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that every backend has kernels for, as far as the switch can tell."""
    everything = dict.fromkeys(op_registry.UNAVAILABLE)
    monkeypatch.setattr(op_registry, "UNAVAILABLE", everything)
    monkeypatch.setattr(switch, "why_unfit", lambda backend, index: None)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


class Calls(TorchDispatchMode):
    """Names of the ops of savl that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "savl":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def attend(dtype: torch.dtype, kernels: KernelSettings | None = None) -> Tensor:
    table, severity = on_gpu(31 * 31, 6, dtype=torch.float32), on_gpu(1, 32, 48, dtype=torch.float32)
    return window_attention(
        on_gpu(1, 32, 48, 3 * 144, dtype=dtype), table, severity, window=16, shift=8, kernels=kernels
    )


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_op_goes_to_its_fused_kernel(dtype: torch.dtype) -> None:
    q, kv = on_gpu(2, 16, 32, 144, dtype=dtype), on_gpu(2, 16, 32, 288, dtype=dtype)
    mu = on_gpu(2, 64, 16, 32, dtype=dtype)
    with use_fused_kernels(), Calls() as calls:
        out = attend(dtype)
        wide = overlapping_window_attention(q, kv, on_gpu(39 * 39, 6, dtype=dtype), None, window=16, key_window=24)
        posterior = gaussian_posterior(mu, mu, seed=3)
        modulated = channel_modulation(q, q, None, q)
        normed = layer_norm(q, on_gpu(144, dtype=dtype), on_gpu(144, dtype=torch.float32))
        projected = convolution(q, on_gpu(288, 144, dtype=dtype))
        hidden, expand, squeeze, excite, short, long = (
            on_gpu(*shape, dtype=dtype) for shape in ((1, 32, 48, 6), (144, 6, 3, 3), (6, 144), (144, 6), (6,), (144,))
        )
        square, line = on_gpu(144, 144, dtype=dtype), on_gpu(144, dtype=dtype)
        guide = (on_gpu(2, 16, 32, 64, dtype=dtype), on_gpu(144, 64, dtype=dtype), line)
        guided = guided_projection(q, square, line, q, *guide)
        mlp = (line, line, on_gpu(288, 144, dtype=dtype), on_gpu(288, dtype=dtype), on_gpu(144, 288, dtype=dtype), line)
        end = projection_mlp(q, square, line, q, None, None, None, None, *mlp)
        gate = channel_gate(hidden, expand, long, squeeze, short, excite, long, rows=2, columns=3)
    assert calls.names == [name for name, op in OPS.items() if op.backend_for("cuda") is not None]
    assert (out.shape, out.dtype, out.device.type) == ((1, 32, 48, 144), dtype, "cuda")
    assert (wide.shape, wide.dtype) == (q.shape, dtype)
    assert (posterior.sample.dtype, posterior.severity.dtype) == (dtype, torch.float32)
    assert (modulated.shape, modulated.dtype) == (q.shape, dtype)
    assert (normed.shape, normed.dtype) == (q.shape, dtype)
    assert (guided.shape, guided.dtype) == (end.shape, end.dtype) == (q.shape, dtype)
    assert (projected.shape, projected.dtype) == (kv.shape, dtype)
    assert (gate.shape, gate.dtype) == ((1, 2, 3, 144), dtype)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_convolution_without_a_kernel_goes_to_the_kernels_of_the_other_ops(dtype: torch.dtype) -> None:
    x, gamma, wide = (on_gpu(1, 16, 16, 1024, dtype=dtype) for _ in range(3))
    weight, line = on_gpu(1024, 1024, 1, 1, dtype=torch.float32), on_gpu(1024, dtype=dtype)
    with use_fused_kernels(), Calls() as calls:
        out = convolution(x, weight, line, line, line, wide, gamma)
    assert calls.names == ["layer_norm", "channel_modulation"]
    assert (out.shape, out.dtype, out.device.type) == (x.shape, dtype, "cuda")


@pytest.fixture
def autocast() -> Iterator[None]:
    """CUDA's autocast, which `torch.autocast` refuses to enable where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.usefixtures("gpu", "autocast")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_is_fused_under_autocast_to_bfloat16_alone(dtype: torch.dtype) -> None:
    x, weight, line = (on_gpu(*shape, dtype=torch.float32) for shape in ((1, 16, 16, 48), (96, 48), (48,)))
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    with use_fused_kernels(), Calls() as calls:
        out = convolution(x.to(dtype), weight, None, line, line)
        assert fuses_convolution(x)
        torch.set_autocast_dtype("cuda", torch.float16)
        assert not fuses_convolution(x)
    assert calls.names == ["convolution"]
    assert (out.shape, out.dtype) == ((1, 16, 16, 96), torch.bfloat16)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
def test_the_log_sum_exp_is_promised_per_head_and_pixel_and_wider_than_the_tensors(
    dtype: torch.dtype, exact: torch.dtype
) -> None:
    table = on_gpu(31 * 31, 6, dtype=torch.float32)
    absent, windows = (None,) * 5, (6, 16, 16, 16, 16, 8, 8, False, float("-inf"))
    _, lse = torch.ops.savl.window_attention(on_gpu(1, 32, 48, 3 * 144, dtype=dtype), table, *absent, *windows)
    assert (lse.shape, lse.dtype, lse.device.type) == ((1, 6, 32, 48), exact, "cuda")


REFERENCE = object()


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of window attention gives itself away; torch without CUDA could not even pretend to run it."""
    module = import_module("savl.ops.window_attention")
    monkeypatch.setattr(module, "window_attention_reference", lambda *args, **options: REFERENCE)


@pytest.mark.usefixtures("gpu", "reference")
def test_float64_falls_back_silently_and_by_name_raises() -> None:
    with use_fused_kernels(), Calls() as calls:
        assert attend(torch.float64) is REFERENCE
    assert calls.names == []
    with pytest.raises(KernelUnavailable, match="Triton kernels take float32, bfloat16, float16.*float64"):
        attend(torch.float64, KernelSettings(window_attention="triton"))


@pytest.mark.usefixtures("gpu")
def test_kernels_of_the_cpu_asked_for_by_name_say_where_they_work() -> None:
    with pytest.raises(KernelUnavailable, match="C\\+\\+ kernels are for the CPU, the tensors are on cuda:0"):
        attend(torch.bfloat16, KernelSettings(window_attention="cpp"))


@pytest.mark.usefixtures("gpu", "reference")
def test_a_gpu_that_is_too_old_falls_back_and_by_name_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "why_unfit", lambda backend, index: f"GPU {index} is too old")
    with use_fused_kernels(), Calls() as calls:
        assert attend(torch.bfloat16) is REFERENCE
    assert calls.names == []
    with pytest.raises(KernelUnavailable, match="GPU 0 is too old"):
        attend(torch.bfloat16, KernelSettings(window_attention="triton"))


@pytest.mark.usefixtures("gpu")
def test_a_compiled_function_goes_to_the_fused_kernel_without_a_graph_break() -> None:
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes if str(node.target).startswith("savl.")])
        return graph.forward

    compiled = torch.compile(lambda: attend(torch.bfloat16), fullgraph=True, backend=keep)
    with use_fused_kernels():
        assert compiled().shape == (1, 32, 48, 144)
    assert graphs == [["savl.window_attention"]]
    torch.compiler.reset()


@pytest.mark.usefixtures("gpu")
def test_the_report_names_the_backend_of_each_device() -> None:
    with use_fused_kernels():
        report = kernel_report()
    on_gpus = {op: report.serving(op, "cuda") for op in OPS}
    assert on_gpus == {name: op.backend_for("cuda") or "eager" for name, op in OPS.items()}
    assert {report.serving(op, "cpu") for op in OPS} == {"cpp"}
    assert {FUSED[backend].device for backend in on_gpus.values() if backend != "eager"} == {"cuda"}


def test_the_question_to_the_driver_is_marked_as_torch_marks_constants() -> None:
    def asked() -> None: ...

    marked = vars(torch.compiler.assume_constant_result(asked))
    assert marked, "torch marks the function itself"
    assert marked.items() <= vars(why_unfit).items()


# Builds of torch for AMD GPUs

ROCM = """
import torch
from types import SimpleNamespace
torch.version.cuda, torch.version.hip = None, "7.0"
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda index=None: "AMD Test"
torch.cuda.get_device_capability = lambda index=None: (9, 4)
torch.cuda.get_device_properties = lambda index: SimpleNamespace(gcnArchName="{architecture}")
from savl.cli import main
main(["kernels", "info", *{options}])
"""
ON_AMD = {name for name, op in OPS.items() if "triton" in op.backends}
needs_triton = pytest.mark.skipif(TRITON_MISSING is not None, reason=str(TRITON_MISSING))


def info_on_rocm(architecture: str, *options: str) -> str:
    """Return what `savl kernels info` prints in a new process, whose torch says that it is built for AMD GPUs."""
    code = ROCM.format(architecture=architecture, options=options)
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def rocm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Torch as built for AMD GPUs, with one; gives its properties, which tests may change."""
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "AMD Test")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return properties


@needs_triton
def test_on_a_rocm_build_the_report_names_triton_where_it_serves_and_eager_elsewhere() -> None:
    found = json.loads(info_on_rocm("gfx942:sramecc+:xnack-", "--json"))
    assert found["gpus"] == ["AMD Test"]
    serving = {name: op["serves"]["cuda"] for name, op in found["ops"].items()}
    assert serving == {name: "triton" if name in ON_AMD else "eager" for name in OPS}
    libraries = [op["backends"]["cuda"] for op in found["ops"].values() if "cuda" in op["backends"]]
    assert libraries
    for library in libraries:
        assert not library["serves"]
        assert "the CUDA library is for NVIDIA GPUs" in library["reason"]
        assert "is built for ROCm" in library["reason"]


@needs_triton
def test_on_a_rocm_build_info_has_the_block_sizes_for_the_gpu() -> None:
    text = info_on_rocm("gfx1100", "--all")
    assert "AMD Test" in text
    assert "· rule" in text


@needs_triton
def test_info_says_that_an_architecture_of_amd_is_not_supported() -> None:
    assert "the Triton kernels support the architectures gfx942, gfx1100, AMD Test has gfx906" in " ".join(
        info_on_rocm("gfx906:sramecc-:xnack-").split()
    )


def test_an_amd_gpu_is_served_if_the_kernels_are_compiled_for_its_architecture(rocm: SimpleNamespace) -> None:
    assert gpus.why_no_gpu() is None
    assert kinds.architecture_of(0) == "gfx942"
    assert why_unfit("triton", 0) is None
    rocm.gcnArchName = "gfx90a:sramecc+:xnack-"
    assert "AMD Test has gfx90a" in (why_unfit("triton", 0) or "")
    assert "is for NVIDIA GPUs" in (load_cuda_library() or "")


@pytest.mark.usefixtures("rocm")
def test_a_rocm_build_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpus.why_no_gpu() == "torch finds no ROCm GPU"
    assert load_cuda_library() == "torch finds no ROCm GPU"


@needs_triton
@pytest.mark.usefixtures("rocm")
def test_only_nvidia_gpus_multiply_float32_as_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    from savl.kernels.launch import precision

    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert precision(torch.float32, 24) == "ieee"
    monkeypatch.setattr(torch.version, "hip", None)
    assert precision(torch.float32, 24) == "tf32, rounded"


def test_every_kind_of_gpu_has_an_entry_and_one_that_torch_is_built_for_comes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert kinds.kind().title == "CUDA"
    assert "is built without CUDA or ROCm" in (gpus.why_no_gpu() or "")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert kinds.kind().title == "ROCm"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert kinds.kind().title == "CUDA"
