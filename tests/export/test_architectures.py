"""Export of small models of spandrel with random weights. docs/export.md lists the architectures."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import drawn
from spandrel_import import spandrel
from torch import Tensor, nn

import savl
from savl.export import ExportError
from savl.export.foreign_code import fold_weights, free_batch

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

WINDOWS = {"img_size": 16, "embed_dim": 12, "depths": [2], "num_heads": [2], "window_size": 8, "upscale": 2}
STRIPES = {"img_size": 16, "embed_dim": 64, "depth": [2], "num_heads": [4], "split_size": [4, 8]}
PLKSR = {"dim": 16, "n_blocks": 1, "upscaling_factor": 2, "kernel_size": 5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "RealPLKSR": ("PLKSR.RealPLKSR", PLKSR),
    "SPAN": ("SPAN.SPAN", {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 8, "upscale": 2}),
    "SwinIR": ("SwinIR.SwinIR", {**WINDOWS, "upsampler": "pixelshuffle", "mlp_ratio": 2.0}),
    "DAT": ("DAT.DAT", {**STRIPES, "expansion_factor": 2.0}),
    "RGT": ("RGT.RGT", {**STRIPES, "mlp_ratio": 2.0}),
}


def model(name: str) -> Any:
    """Return a descriptor of spandrel with random weights, whose results are mostly between 0 and 1."""
    module, arguments = MODELS[name]
    package, kind = module.split(".")
    spandrel()
    torch.manual_seed(5)
    network = getattr(import_module(f"spandrel.architectures.{package}"), kind)(**arguments)
    return spandrel().ModelLoader().load_from_state_dict(drawn(network, 0.05).state_dict())


def images(batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height))


def check(run: Any, network: nn.Module) -> None:
    for size in ((1, 1, 1), (1, 16, 16), (3, 18, 33)):
        lr = images(*size)
        with torch.no_grad(), savl.use_fused_kernels(False):
            expected = network(lr)
        assert ((expected > 0) & (expected < 1)).float().mean() > 0.1  # a clamped result would hide errors
        torch.testing.assert_close(run(lr), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "RGT"])
def test_an_onnx_file_computes_the_same_at_any_size_and_batch(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    descriptor = model(name)
    assert savl.export(descriptor, path).architecture in (name, "PLKSR")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    check(lambda lr: torch.from_numpy(session.run(None, {"lr": lr.numpy()})[0]), savl.Upscaler(descriptor).model)


@pytest.mark.slow
def test_a_package_of_a_foreign_model_has_fused_ops_and_computes_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    descriptor = model("SwinIR")
    assert "window_attention" in savl.export(descriptor, path).fused_ops
    check(torch._inductor.aoti_load_package(str(path)), savl.Upscaler(descriptor).model)


@pytest.mark.slow
def test_a_network_whose_layers_depend_on_the_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"RGT.*math\.log of a free height or width \(rgt\.py, line \d+: _time"):
        savl.export(model("RGT"), tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


class Windows(nn.Module):
    """Computes the number of images from that of windows, as most networks with windows do."""

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        windows = x.view(batch, height // 4, 4, width // 4, 4, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16)
        images = int(windows.shape[0] * 16 / channels / (height * width / 4 / 4) / 16)
        assert isinstance(images, int | torch.SymInt)
        assert not isinstance("1", int)
        return windows.reshape(images, -1) * int("3")


class Whole(nn.Module):
    """Passes the number of images to `free_batch`, as the export does."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = Windows()

    def forward(self, x: Tensor) -> Tensor:
        with free_batch(self, (x.shape[0],)):
            out: Tensor = self.windows(x)
        return out


def test_the_number_of_images_stays_free_where_a_network_computes_it_with_int() -> None:
    free = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(Whole(), (torch.rand(11, 8, 12, 2),), dynamic_shapes=(free,)).module()
    for batch in (1, 5):
        x = torch.rand(batch, 8, 12, 2)
        torch.testing.assert_close(program(x), Windows()(x), rtol=0, atol=0)
    assert "int" not in globals()


def test_weights_that_are_computed_in_each_call_are_folded() -> None:
    network = savl.Upscaler(model("SPAN")).model
    lr = images(1, 9, 8)
    with torch.no_grad():
        expected = network(lr)
        fold_weights(network)
        for layer in network.modules():
            if hasattr(layer, "eval_conv"):
                layer.update_params()
        torch.testing.assert_close(network(lr), expected, rtol=0, atol=0)
