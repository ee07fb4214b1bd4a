"""The node for ComfyUI in `examples/`, called as ComfyUI calls it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import savl

FILE = Path(__file__).resolve().parents[2] / "examples" / "comfyui_savl.py"


@pytest.fixture
def node() -> type[Any]:
    spec = importlib.util.spec_from_file_location("comfyui_savl", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: type[Any] = module.NODE_CLASS_MAPPINGS["SavlUpscale"]
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys()
    return found


def call(node: type[Any], model: Any, image: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Call the node as ComfyUI does: by the names of its inputs, with their defaults."""
    instance = node()
    declared = node.INPUT_TYPES()["required"]
    for name, (kind, *options) in declared.items():
        if name not in inputs and name not in ("upscale_model", "image"):
            inputs[name] = kind[0] if isinstance(kind, list) else options[0]["default"]
    assert set(inputs) | {"upscale_model", "image"} == set(declared)
    results = getattr(instance, node.FUNCTION)(upscale_model=model, image=image, **inputs)
    assert len(results) == len(node.RETURN_TYPES)
    result: torch.Tensor = results[0]
    return result


def test_a_batch_of_images_is_that_of_the_upscaler(
    node: type[Any], spandrel: ModuleType, foreign_model: Callable[[str], nn.Module]
) -> None:
    model = spandrel.ModelLoader().load_from_state_dict(foreign_model("Compact x3").state_dict())
    image = torch.rand(2, 9, 13, 3)
    out = call(node, model, image)
    assert out.shape == (2, 27, 39, 3)
    assert out.dtype == torch.float32
    expected = savl.Upscaler(model)(image.movedim(-1, 1)).sr.movedim(1, -1)
    torch.testing.assert_close(out, expected)
    half = call(node, model, image, strength=0.5)
    assert not torch.allclose(half, out)


def test_the_upscaler_is_kept_while_model_and_settings_are_the_same(
    node: type[Any], spandrel: ModuleType, foreign_model: Callable[[str], nn.Module]
) -> None:
    model = spandrel.ModelLoader().load_from_state_dict(foreign_model("Compact x3").state_dict())
    image = torch.rand(1, 4, 4, 3) * 1.2 - 0.1
    assert call(node, model, image).min() >= 0
    first = node._last[2]
    call(node, model, image)
    assert node._last[2] is first
    call(node, model, image, dtype="bfloat16")
    assert node._last[2].dtype == torch.bfloat16
