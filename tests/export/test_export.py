"""Export of networks: what is written, what it computes at any size, and what happens when it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_savl import small_savl
from spandrel_import import architecture
from torch import Tensor, nn
from typer.testing import CliRunner

import savl
from savl.cli.app import app
from savl.export import ExportError
from savl.network.upscaling import UpscalingNetwork

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZES = ((1, 1, 1), (2, 1, 7), (1, 11, 2), (3, 8, 6), (1, 23, 30))


class Sharpen(UpscalingNetwork):
    """A small network whose ×2 result depends on neighbours and on the mean of the image."""

    scale = 2

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)

    def forward(self, lr: Tensor, return_field: bool = False, strength: float | Tensor | None = None) -> Tensor:
        return self.reconstruct(lr, None, strength)

    def reconstruct(self, lr: Tensor, field: Any, strength: float | Tensor | None = None) -> Tensor:
        return nn.functional.pixel_shuffle(self.conv(lr), 2) + lr.mean((2, 3), keepdim=True)


class Constant(Sharpen):
    """A network that multiplies by the number of pixels as it is when the network is exported."""

    def reconstruct(self, lr: Tensor, field: Any, strength: float | Tensor | None = None) -> Tensor:
        pixels = float(torch.ones(lr.shape[-2:]).sum().item()) if not torch.compiler.is_exporting() else 7.0
        return super().reconstruct(lr, field) * pixels


class Branch(Sharpen):
    """A network whose code depends on the values of the image."""

    def reconstruct(self, lr: Tensor, field: Any, strength: float | Tensor | None = None) -> Tensor:
        return super().reconstruct(lr, field) if lr.mean() > 0.5 else lr.repeat(1, 1, 2, 2)


class NoTranslation(Sharpen):
    """A network with an op that ONNX does not have."""

    def reconstruct(self, lr: Tensor, field: Any, strength: float | Tensor | None = None) -> Tensor:
        return super().reconstruct(lr, field) + torch.special.bessel_j0(lr).mean()


def images(batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height))


def run_onnx(path: Path, lr: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"lr": lr.numpy()})[0])


def spandrel_model(network: nn.Module) -> Any:
    import spandrel

    return spandrel.ModelLoader().load_from_state_dict(network.state_dict())


@pytest.fixture(scope="module")
def compact() -> Any:
    """Return a random network of spandrel."""
    torch.manual_seed(0)
    network = architecture("Compact", "SRVGG").SRVGGNetCompact(num_feat=8, num_conv=1, upscale=2)
    return spandrel_model(network)


@pytest.mark.slow
def test_a_savl_file_computes_the_same_at_any_size_in_onnx_runtime_and_openvino(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model = small_savl()
    path = tmp_path / "savl.onnx"
    report = savl.export(model, path)
    assert report.difference is not None
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(path), "CPU", options)
    for size in SIZES:
        lr = images(*size)
        with torch.no_grad(), savl.use_fused_kernels(False):
            expected = model(lr)
        torch.testing.assert_close(run_onnx(path, lr), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(compiled(lr.numpy())[0]), expected, rtol=1e-5, atol=1e-5)


def test_a_model_of_spandrel_computes_the_same_at_any_size_and_batch(compact: Any, tmp_path: Path) -> None:
    path = tmp_path / "compact.onnx"
    report = savl.export(compact, path)
    assert len(report.checks) == 5
    assert report.checks[0].height == report.checks[0].width == 1
    network = savl.Upscaler(compact).model
    for size in SIZES:
        lr = images(*size)
        with torch.no_grad():
            torch.testing.assert_close(run_onnx(path, lr), network(lr), rtol=1e-5, atol=1e-5)
    file = onnx.load(path)
    assert [each.version for each in file.opset_import if each.domain == ""] == [20]
    shape = file.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in shape] == ["batch", 3, "height", "width"]


def test_float16_stores_rounded_weights_and_computes_in_float32(tmp_path: Path) -> None:
    model = Sharpen()
    rounded = Sharpen()
    rounded.load_state_dict({name: each.half().float() for name, each in model.state_dict().items()})
    path = tmp_path / "half.onnx"
    savl.export(model, path, dtype="float16")
    kinds = {each.data_type for each in onnx.load(path).graph.initializer if np.prod(each.dims) >= 64}
    assert kinds == {onnx.TensorProto.FLOAT16}
    lr = images(1, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(path, lr), rounded(lr), rtol=1e-6, atol=1e-6)


def test_a_weight_that_float16_cannot_hold_is_an_error(tmp_path: Path) -> None:
    model = Sharpen()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = 1e6
    with pytest.raises(ExportError, match=r"conv\.weight has the value 1e\+06"):
        savl.export(model, tmp_path / "x.onnx", dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Constant, r"another image at size 1x3x1x1: its error is .* at most"),
        (Branch, r"free batch, height and width: .*test_export\.py, line"),
        (NoTranslation, r"bessel_j0"),
    ],
)
def test_what_cannot_be_exported_is_an_error_that_says_why_and_leaves_the_old_file(
    network: type[Sharpen], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ExportError, match=message):
        savl.export(network(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_arguments(tmp_path: Path) -> None:
    model, path = Sharpen(), tmp_path / "x.onnx"
    with pytest.raises(ValueError, match=r"path must end in \.onnx or \.pt2"):
        savl.export(model, tmp_path / "x.engine")
    with pytest.raises(TypeError, match="model must be a network"):
        savl.export(nn.Conv2d(3, 3, 1), path)
    with pytest.raises(ValueError, match="no bfloat16 convolution"):
        savl.export(model, path, dtype="bfloat16")
    with pytest.raises(ValueError, match="overflow in float16"):
        savl.export(model, tmp_path / "x.pt2", dtype="float16")
    with pytest.raises(ValueError, match="opset must be from 20"):
        savl.export(model, path, opset=17)
    with pytest.raises(ValueError, match="strength must be"):
        savl.export(model, path, strength=2)
    path.touch()
    with pytest.raises(FileExistsError):
        savl.export(model, path, overwrite=False)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("savl.export.onnx_file.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ValueError, match=r"ONNX files need onnxscript: pip install 'savl\[export\]'"):
        savl.export(Sharpen(), tmp_path / "x.onnx")


def test_the_command_reports_the_difference(compact: Any, tmp_path: Path) -> None:
    weights, path = tmp_path / "compact.pth", tmp_path / "x.onnx"
    torch.save(compact.model.state_dict(), weights)
    result = CliRunner().invoke(app, ["export", str(weights), "-o", str(path)])
    assert result.exit_code == 0, result.output
    assert "Compact as ONNX, opset 20, float32" in result.output
    assert "largest difference" in result.output
    again = CliRunner().invoke(app, ["export", str(weights), "-o", str(path)])
    assert again.exit_code == 1
    assert "exists already" in again.output


@pytest.mark.slow
def test_a_package_of_aotinductor_computes_the_same_at_any_size(tmp_path: Path) -> None:
    model, path = Sharpen(), tmp_path / "x.pt2"
    savl.export(model, path)
    program = torch._inductor.aoti_load_package(str(path))
    for size in SIZES:
        lr = images(*size)
        with torch.no_grad():
            torch.testing.assert_close(program(lr), model(lr), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_bfloat16_package_of_savl_interpolates_in_float32(tmp_path: Path) -> None:
    model, path = small_savl(), tmp_path / "x.pt2"
    savl.export(model, path, dtype="bfloat16")
    lr = images(1, 9, 14)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(lr).float()
    # The interpolated image has values near 1. In bfloat16, its rounding alone would give differences of 4e-3.
    torch.testing.assert_close(torch._inductor.aoti_load_package(str(path))(lr), expected, rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ESRGAN"])
def test_larger_models_of_spandrel_compute_the_same(
    name: str, foreign_model: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    path = tmp_path / "x.onnx"
    model = spandrel_model(foreign_model(name))
    report = savl.export(model, path)
    assert report.architecture == name
    network = savl.Upscaler(model).model
    lr = images(2, 5, 11)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(path, lr), network(lr), rtol=1e-5, atol=1e-5)
