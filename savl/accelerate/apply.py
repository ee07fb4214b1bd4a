"""`savl.accelerate`: find the blocks of a network, verify that savl's ops compute them, and replace their forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Each module registers its adapters.
from savl.accelerate import atd, convolution, dat, fdat, hat, omnisr, scunet, srformer, swin, swin2sr, uformer  # noqa: F401
from savl.accelerate.adapter import ADAPTERS, Accelerated, Adapter, Calls, accelerated_class, inner_types
from savl.accelerate.report import AccelerationReport, BlockReport
from savl.accelerate.verify import verify_block
from savl.network.savl import SAVL


def accelerate(model: Any, *, verify: bool = True, dtype: torch.dtype | None = None) -> AccelerationReport:
    """Compute the attention blocks of a network with savl's fused kernels, in place.

    Blocks are recognised by their structure, whatever the name of their class, so that copies of an architecture in
    other packages are served too. Weights, names in the state dict, hooks of the blocks, training mode, gradients,
    ``.to()``, `copy.deepcopy` and pickling go on working. A block falls back to its original forward where the kernels
    cannot serve a call: modules inside have hooks or were replaced, dropout is active, a mask is unknown, or the device
    or dtype has no kernel. `savl.use_fused_kernels` switches the blocks like savl's own networks, except that they use
    the fused kernels if nothing was set.

    Args:
        model: Any `torch.nn.Module`, also compiled or wrapped, or a model descriptor of spandrel.
        verify: Run every distinct block on small random inputs, computed by savl, by the block itself, and by the block
            in float64, and keep only what passes the rule of `savl.ops.equivalence`. For a model in training mode this
            includes the gradients. It takes up to some seconds.
        dtype: Convert the model to this dtype first, for example ``torch.bfloat16``. The original parameters are kept
            for `AccelerationReport.undo`. None keeps the dtype.

    Returns:
        What was done, block by block; ``print`` shows it, ``undo()`` restores the model.

    Raises:
        TypeError: ``model`` is neither a module nor a descriptor, or ``dtype`` is not a floating-point dtype.
    """
    network = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module or a model descriptor of spandrel, got {type(model).__name__}"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
    original = _convert(network, dtype)

    changed: list[nn.Module] = []
    verified: dict[Any, tuple[float, str | None]] = {}

    def try_to_serve(name: str, block: nn.Module, adapter: Adapter | None) -> BlockReport:
        kind = type(block).__name__
        if adapter is None:
            return BlockReport(name, kind, None, "no adapter knows its structure")
        if any(each.is_meta for each in (*block.parameters(), *block.buffers())):
            return BlockReport(name, kind, None, "its tensors are on the meta device")
        reason = adapter.refusal(block, network)
        closeness = None
        if reason is None and verify:
            key = _signature(block, adapter)
            if key not in verified:
                verified[key] = verify_block(block, adapter, network, _changer(adapter))
            closeness, reason = verified[key]
        if reason is not None:
            return BlockReport(name, kind, None, reason, closeness)
        report = BlockReport(name, kind, f"{adapter.title}: {adapter.label(block)}", None, closeness)
        _change(block, adapter, report.calls)
        changed.append(block)
        return report

    def undo() -> None:
        for block in changed:
            if isinstance(block, Accelerated):
                _restore(block)
        changed.clear()
        original()

    try:
        found = list(_candidates(network))
        blocks = [try_to_serve(*each) for each in found]
        layers = [try_to_serve(*each) for each in _layers(network, [block for _, block, _ in found])] if changed else []
    except BaseException:  # such as an interrupt during the verification
        undo()
        raise
    return AccelerationReport(type(network).__name__, blocks, layers, undo)


def _candidates(network: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter | None]]:
    """Yield the blocks that an adapter matches, and the modules that look like attention which none matches."""
    inside: set[nn.Module] = set()
    module: Any
    for name, module in network.named_modules():
        if module in inside:
            continue
        if isinstance(module, SAVL | Accelerated):  # these use savl's ops already
            inside.update(nn.Module.modules(module))  # type: ignore[arg-type]
            continue
        adapter = next((each for each in ADAPTERS.values() if not each.is_layer and each.matches(module)), None)
        if adapter is not None:
            inside.update(module.modules())
            yield name, module, adapter
        elif _looks_like_attention(module):
            inside.update(module.modules())
            yield name, module, None


def _layers(network: nn.Module, blocks: list[nn.Module]) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """Yield the layers outside of the blocks that an adapter for layers matches."""
    inside = {module for block in blocks for module in block.modules()}
    adapters = [each for each in ADAPTERS.values() if each.is_layer]
    for name, module in network.named_modules():
        adapter = next((each for each in adapters if module not in inside and each.matches(module)), None)
        if adapter is not None:
            yield name, module, adapter


def _looks_like_attention(module: nn.Module) -> bool:
    """Return whether a module is attention over pixels, as far as names and layers show it."""
    named = "attention" in type(module).__name__.lower() or "msa" in type(module).__name__.lower()
    projections = any(hasattr(module, name) for name in ("qkv", "to_qkv", "to_q", "q", "wq"))
    return projections or (named and any(isinstance(child, nn.Linear) for child in module.children()))


def _signature(block: nn.Module, adapter: Adapter) -> Any:
    """Return what a verification depends on: structure, sizes, settings and buffers, but no values of parameters."""
    parameters = tuple((name, tuple(each.shape), each.dtype) for name, each in block.named_parameters())
    buffers = tuple(
        (name, tuple(each.shape), float(each.double().sum()) if each.numel() else 0.0)
        for name, each in block.named_buffers()
    )
    settings = tuple(
        (where, key, repr(value))
        for where, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | tuple | list | torch.Size | None)
        and not key.startswith("_")
        and key not in adapter.irrelevant
    )
    return adapter.name, adapter.label(block), type(block), inner_types(block), parameters, buffers, settings


def _changer(adapter: Adapter) -> Callable[[nn.Module], None]:
    return lambda block: _change(block, adapter, Calls())


def _change(block: Any, adapter: Adapter, calls: Calls) -> None:
    block._savl_types = inner_types(block)
    block.kernels = None
    block._savl_calls = calls
    block.__class__ = accelerated_class(adapter.name, type(block))


def _restore(block: Any) -> None:
    block.__class__ = type(block)._savl_original
    for name in ("_savl_types", "kernels", "_savl_calls", "_savl_kept"):
        block.__dict__.pop(name, None)


def _convert(network: nn.Module, dtype: torch.dtype | None) -> Callable[[], None]:
    """Convert a network to a dtype; return a function that restores the tensors it had."""
    kept: list[tuple[Tensor, Tensor]] = []
    if dtype is not None:
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point() and tensor.dtype != dtype:
                kept.append((tensor, tensor.data))
                tensor.data = tensor.data.to(dtype)

    def restore() -> None:
        for tensor, before in kept:
            tensor.data = before.to(tensor.device)
        kept.clear()

    return restore
