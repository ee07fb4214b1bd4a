"""Make the step that is profiled: inference or training of a network on random images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from savl.network import CONFIGS, SAVL
from savl.profile.ranges import annotate, named_range
from savl.weights import build, load_savl

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEP = "step"
PHASES = ("forward", "backward", "optimizer")
"""Names of the ranges in a training step."""


@dataclass(frozen=True)
class Workload:
    """One step that can be repeated.

    Attributes:
        model: The network.
        annotated: The modules that `ranges` annotates.
        work: Function that computes the step.
        device: Device of the step.
        title: Model, size and settings in one line.
    """

    model: SAVL
    annotated: tuple[nn.Module, ...]
    work: Callable[[], object]
    device: torch.device
    title: str

    def step(self) -> None:
        """Run one step in a range named ``step``."""
        with named_range(STEP):
            self.work()

    def ranges(self) -> AbstractContextManager[object]:
        """Return a context manager that annotates all modules."""
        stack = ExitStack()
        for module in self.annotated:
            stack.enter_context(annotate(module))
        return stack


def make_workload(
    model: SAVL,
    name: str,
    *,
    height: int,
    width: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    train: bool = False,
) -> Workload:
    """Return a step of a network on random images.

    In inference the step is a forward pass of the network in ``dtype``. In training it is a step of `savl.training`:
    the objective of the paper under autocast to ``dtype``, the backward pass, and Adam with clipped gradients.

    Args:
        model: The network. It is moved to the device and, for inference, converted to the dtype.
        name: Name of the network in the title.
        height: Height of the input images in pixels.
        width: Width of the input images in pixels.
        batch: Number of images.
        dtype: One of `DTYPES`.
        device: Device to run on.
        train: Whether the step is one of training.

    Raises:
        ValueError: The device cannot compute in the dtype.
    """
    check_dtype(dtype, device)
    model = model.to(device)
    spelt = str(dtype).removeprefix("torch.")
    mode = "training" if train else "inference"
    title = f"{name}, {mode}, {batch}×3×{height}×{width}, {spelt}, {device}"
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(batch, 3, height, width, generator=generator)
    if not train:
        model = model.eval().to(dtype)
        lr = low.to(device, dtype)

        @torch.inference_mode()
        def infer() -> None:
            model(lr)

        return Workload(model, (model,), infer, device, title)

    from savl.training.data import Batch
    from savl.training.objective_config import ObjectiveConfig, OptimizerConfig
    from savl.training.objectives import Objective

    scale, settings = model.config.scale, OptimizerConfig()
    high = torch.rand(batch, 3, scale * height, scale * width, generator=generator)
    images = Batch(low.to(device), high.to(device), low.to(device))
    model = model.train()
    objective = Objective(model, ObjectiveConfig()).to(device).train()
    parameters = list(objective.parameters())
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, betas=settings.betas)

    def learn() -> None:
        with named_range("forward"), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = objective(images, 0, 0).losses
        optimizer.zero_grad(set_to_none=True)
        # In this thread, because its ranges do not contain what other threads launch.
        with named_range("backward"), torch.autograd.set_multithreading_enabled(False):
            losses.total.backward()
        with named_range("optimizer"):
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()

    decoder = () if objective.decoder is None else (objective.decoder,)
    return Workload(model, (model, *decoder), learn, device, title)


def find_model(source: str) -> SAVL:
    """Return a network by name, with random weights because time does not depend on them, or one from a file.

    Args:
        source: A name in ``savl.CONFIGS``, or a path that `savl.load` accepts as a savl or HAT network.

    Raises:
        ValueError: ``source`` is neither, or the file cannot be used.
        OSError: The file cannot be read.
    """
    if source in CONFIGS:
        torch.manual_seed(0)
        return build(source)
    if not Path(source).is_file():
        raise ValueError(f"model must be one of {', '.join(CONFIGS)} or an existing file, got {source!r}")
    return load_savl(source)


def parse_size(text: str) -> tuple[int, int]:
    """Return height and width from text such as ``"64x96"``.

    Raises:
        ValueError: The text has another form, or a side is less than one pixel.
    """
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"size must be HEIGHTxWIDTH in pixels, such as 64x64, got {text!r}")
    return int(height), int(width)


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Try the operations of a network in a dtype.

    Raises:
        ValueError: The device does not support the dtype.
    """
    reason = None
    if dtype == torch.bfloat16 and device.type == "cuda":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                reason = "the GPU has no bfloat16 units"
    try:
        image = torch.ones(1, 4, 4, 4, dtype=dtype, device=device)
        features = F.conv2d(image, torch.ones(4, 4, 3, 3, dtype=dtype, device=device), padding=1)
        F.layer_norm(features @ image, (4,)).softmax(dim=-1).exp().sum().item()
    except (RuntimeError, TypeError) as error:
        reason = reason or str(error).partition("\n")[0]
    if reason is not None:
        raise ValueError(f"dtype {str(dtype).removeprefix('torch.')} is not supported on {device}: {reason}")


def synchronise(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
