"""Argument checks of the ops. Every error message names the argument, its value, and the accepted values."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(op: str, name: str, value: object, shape: str) -> Tensor:
    """Check that ``value`` is a floating tensor with the rank written in ``shape``.

    Args:
        op: Name of the op, for the message.
        name: Name of the argument, for the message.
        value: Value of the argument.
        shape: Expected layout in words, for example ``"(B, H, W, 3C)"``; its commas give the rank.

    Returns:
        ``value``, now known to be a tensor.

    Raises:
        TypeError: ``value`` is not a tensor or not of a floating dtype.
        ValueError: The rank is not that of ``shape``.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor of shape {shape}, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{op}: {name} must have one of the dtypes {accepted}, got {value.dtype}")
    rank = shape.count(",") + 1
    if value.dim() != rank:
        raise ValueError(f"{op}: {name} must have {rank} dimensions {shape}, got {value.dim()}: {tuple(value.shape)}")
    return value


def check_shape(op: str, name: str, value: Tensor, expected: tuple[int, ...], why: str) -> None:
    """Check that a tensor has exactly the expected shape.

    Args:
        op: Name of the op, for the message.
        name: Name of the argument, for the message.
        value: The argument.
        expected: Expected shape.
        why: Reason for the expected shape, for the message, for example ``"one value per pixel of qkv"``.

    Raises:
        ValueError: The shape differs.
    """
    if tuple(value.shape) != expected:
        raise ValueError(f"{op}: {name} must have shape {expected} ({why}), got {tuple(value.shape)}")


def check_same_device(op: str, reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    """Check that every tensor is on the device of ``reference``. Arguments that are None are skipped.

    Raises:
        ValueError: A tensor is on another device.
    """
    for name, value in others.items():
        if value is not None and value.device != reference.device:
            raise ValueError(
                f"{op}: {name} is on {value.device} but {reference_name} is on {reference.device}; "
                f"move both to one device"
            )


def check_same_dtype(op: str, reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    """Check that every tensor has the dtype of ``reference``. Arguments that are None are skipped.

    Raises:
        TypeError: A dtype differs.
    """
    for name, value in others.items():
        if value is not None and value.dtype != reference.dtype:
            raise TypeError(
                f"{op}: {name} is {value.dtype} but {reference_name} is {reference.dtype}; cast one of them"
            )


def check_same_dtype_or_float32(op: str, reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    """Check that every tensor has the dtype of ``reference`` or float32. Arguments that are None are skipped.

    Under autocast, activations have a lower precision while parameters remain float32.

    Raises:
        TypeError: A tensor has another dtype.
    """
    for name, value in others.items():
        if value is not None and value.dtype not in (reference.dtype, torch.float32):
            raise TypeError(
                f"{op}: {name} must be {reference.dtype} like {reference_name}, or torch.float32, got {value.dtype}"
            )


def check_heads(op: str, channels: int, bias_table: Tensor, rows: int, why: str) -> int:
    """Return the number of heads, which is the number of columns of the bias table, and check the table's shape.

    Args:
        op: Name of the op, for the message.
        channels: Number C of channels of all heads together.
        bias_table: ``(rows, heads)``.
        rows: Number of rows that the size of the windows requires.
        why: Reason for the number of rows, for the message.

    Returns:
        The number of heads.

    Raises:
        ValueError: The table has another number of rows, or C is not a multiple of the number of heads.
    """
    heads = bias_table.shape[1]
    if bias_table.shape[0] != rows:
        raise ValueError(
            f"{op}: bias_table must have {rows} rows ({why}), got {bias_table.shape[0]} with shape "
            f"{tuple(bias_table.shape)}"
        )
    if heads == 0 or channels % heads != 0:
        raise ValueError(
            f"{op}: the {channels} channels must divide evenly among the heads, got {heads} heads (the number of "
            f"columns of bias_table)"
        )
    return heads


def check_int(op: str, name: str, value: object) -> None:
    """Check that an argument, such as a number of pixels or a seed, is an int. A bool or a float is refused.

    In a program with free sizes, which `torch.export` makes, it may be a symbol for an int.

    Raises:
        TypeError: The argument is not an int.
    """
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__} {value!r}")


def check_eps(op: str, eps: object) -> None:
    """Check that ``eps``, which is added to a variance, is a finite number of at least 0.

    Raises:
        TypeError: ``eps`` is not a number.
        ValueError: ``eps`` is negative or not finite.
    """
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"{op}: eps must be a number, got {eps!r}")
    if not 0 <= eps <= torch.finfo(torch.float64).max:
        raise ValueError(f"{op}: eps must be finite and at least 0, got {eps!r}")


def check_window(op: str, height: int, width: int, window: int) -> None:
    """Check that the window is positive and that whole windows cover the image.

    Raises:
        TypeError: ``window`` is not an int.
        ValueError: ``window`` < 1, or height or width is not a positive multiple of ``window``.
    """
    check_int(op, "window", window)
    if window < 1:
        raise ValueError(f"{op}: window must be at least 1 pixel, got {window}")
    if 0 in (height, width) or height % window != 0 or width % window != 0:
        raise ValueError(
            f"{op}: height and width must be positive multiples of window={window}, got {height}x{width}; pad the "
            f"image first, for example with savl.network.reflect_pad_to_multiple"
        )
