r"""Windowed attention: shifted, dilated or rectangular windows, with a severity, a bias, and cosine similarity.

For a query pixel i and a key pixel j of the same window, each head computes:

    logits_ij = s_i · s_j · similarity(q_i, k_j) + bias_ij + mask_ij
    out_i     = Σ_j softmax_j(logits_ij) · v_j

The similarity is (q_i · k_j) / √d, or, with a scale per head, scale · (q_i · k_j) / (‖q_i‖ · ‖k_j‖). The severity s
scales the similarity of each pair of pixels. Where the variance of the degradation field is low (s > 1), attention
becomes sharper; where the variance is high (s < 1), the positional bias dominates. Since
s_i·s_j·(q_i·k_j) = (s_i q_i)·(s_j k_j), a fused kernel only has to scale each query and each key once.

Shifted windows are taken from the image rolled by ``−shift`` along both axes. The rolled image wraps around, so windows
at the far edges hold pixels from both sides of the image; ``mask_ij`` is ``mask`` between pixels of different sides,
and 0 elsewhere.

Source: SAVL (ICLR 2026) for the severity; Swin Transformer (Liu et al., 2021) for the shift; HAT (Chen et al., 2023)
for the layout of the bias table; Swin Transformer V2 (Liu et al., 2022) for cosine similarity; OmniSR (Wang et al.,
2023) for dilated windows; SRFormer (Zhou et al., 2023) for keys with fewer pixels than queries.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from savl.ops.case import BenchmarkProblem, Case, Draw
from savl.ops.library import CPP, FUSED, TRITON
from savl.ops.op import Op, register
from savl.ops.relative_position import gather_bias
from savl.ops.settings import KernelSettings
from savl.ops.switch import serves
from savl.ops.validation import (
    check_int,
    check_same_device,
    check_same_dtype,
    check_same_dtype_or_float32,
    check_shape,
    check_tensor,
)

OP = "window_attention"

Pair = tuple[int, int]


def window_attention(
    qkv: Tensor,
    bias_table: Tensor | None = None,
    severity: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    window: int | Pair,
    shift: int | Pair = 0,
    key_window: int | Pair | None = None,
    dilated: bool = False,
    mask: float = float("-inf"),
    heads: int | None = None,
    kernels: KernelSettings | None = None,
) -> Tensor:
    """Compute attention within windows.

    Sizes along both axes are given as an int, or as a pair (vertical, horizontal).

    Args:
        qkv: ``(B, H, W, 3C)`` floating: queries, keys and values side by side, each C = heads × d channels with the
            heads outermost. If ``k`` and ``v`` are given, the queries alone, ``(B, H, W, C)``. H and W in pixels,
            positive multiples of ``window``. Any strides; contiguous channels save a copy.
        bias_table: ``((2h − 1)·(2w − 1), heads)`` for windows of h × w pixels, dtype of ``qkv`` or float32. Row
            ``(dy + h − 1)·(2w − 1) + dx + w − 1`` holds the bias for (dy, dx) = query − key, counted in pixels of the
            window.
        severity: ``(B, H, W)``, dtype of ``qkv`` or float32; None for s = 1.
        k: ``(B, H', W', C)`` keys, dtype of ``qkv``. H' and W' are H and W, unless ``key_window`` says otherwise.
        v: Values, like ``k``.
        bias: ``(heads, h·w, h'·w')``: the bias of each query and key of a window, both counted row by row; dtypes as
            for ``bias_table``, which it excludes. With neither, the bias is 0.
        scale: ``(heads,)``, dtype of ``qkv`` or float32: the similarity is the cosine multiplied by it. None for the
            scaled product.
        window: Size h × w of the windows, in pixels.
        shift: Cyclic shift in pixels, 0 ≤ shift < window along each axis.
        key_window: Size h' × w' of the windows of ``k`` and ``v``, for keys of another resolution; None for
            ``window``. The images of ``k`` and ``v`` then have H·h'/h × W·w'/w pixels. Their shift, shift·h'/h ×
            shift·w'/w, must be whole pixels. If ``key_window`` differs from ``window``, ``k`` and ``v`` are required,
            and ``bias_table`` and ``severity`` are not accepted.
        dilated: Take the pixels of a window from the whole image, at distances of H/h and W/w pixels (grid attention).
            Excludes a shift.
        mask: Value that is added to the logits of two pixels that the cyclic shift has brought into one window from
            opposite edges of the image, at most 0. −∞ excludes such pairs. A finite value, such as the −100 of Swin,
            only suppresses them.
        heads: Number of heads. Required if none of ``bias_table``, ``bias`` and ``scale`` is given; otherwise it is
            inferred from them.
        kernels: Kernels to use in this call. None uses the setting of `savl.use_fused_kernels`.

    Returns:
        ``(B, H, W, C)``, dtype of ``qkv``, heads outermost in C.

    Raises:
        TypeError: An argument is not a floating-point tensor, dtypes are incompatible, or sizes are not ints.
        ValueError: Shapes, sizes or devices are incompatible, or arguments exclude each other.
        KernelUnavailable: A backend was requested by name and cannot compute this call.
    """
    tensors = (qkv, bias_table, severity, k, v, bias, scale)
    geometry = _validate(*tensors, window, shift, key_window, dilated, mask, heads)
    if serves(WINDOW_ATTENTION, kernels, *tensors):
        fused: Tensor = torch.ops.savl.window_attention(*tensors, *geometry)[0]
        return fused
    return window_attention_reference(
        *tensors,
        window=window,
        shift=shift,
        key_window=key_window,
        dilated=dilated,
        mask=mask,
        heads=heads,
    )


def window_attention_reference(
    qkv: Tensor,
    bias_table: Tensor | None = None,
    severity: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    window: int | Pair,
    shift: int | Pair = 0,
    key_window: int | Pair | None = None,
    dilated: bool = False,
    mask: float = float("-inf"),
    heads: int | None = None,
) -> Tensor:
    """Compute the reference of `window_attention`, with one PyTorch operation per term of the formula."""
    tensors = (qkv, bias_table, severity, k, v, bias, scale)
    return _attend(tensors, _validate(*tensors, window, shift, key_window, dilated, mask, heads))


Geometry = tuple[int, int, int, int, int, int, int, bool, float | None]
"""The arguments of the schema that are not tensors. A mask of −∞ is None, because AOTInductor packages cannot contain
it."""


def _attend(tensors: tuple[Tensor | None, ...], geometry: Geometry) -> Tensor:
    qkv, bias_table, severity, k, v, bias, scale = tensors
    assert qkv is not None
    heads, *sizes, dilated, mask = geometry
    window_height, window_width, key_height, key_width, shift_rows, shift_columns = sizes
    dtype = qkv.dtype
    if k is None or v is None:
        qkv, k, v = qkv.chunk(3, dim=-1)
    q = qkv
    batch, height, width, channels = q.shape
    window, key_window, shift = (window_height, window_width), (key_height, key_width), (shift_rows, shift_columns)
    head_dim = channels // heads
    key_rows, key_columns = k.shape[1:3]
    key_shift = (shift_rows * key_height // window_height, shift_columns * key_width // window_width)
    shifted = shift != (0, 0)
    if shifted:
        q = torch.roll(q, shifts=(-shift_rows, -shift_columns), dims=(1, 2))
        k, v = (torch.roll(each, shifts=(-key_shift[0], -key_shift[1]), dims=(1, 2)) for each in (k, v))

    def split(image: Tensor, size: Pair) -> Tensor:
        windows = partition_windows(image, size, dilated)  # (B, windows, N, C)
        return windows.view(*windows.shape[:3], heads, head_dim).transpose(2, 3)

    q, k, v = split(q, window), split(k, key_window), split(v, key_window)  # (B, windows, heads, N, d)
    if scale is not None:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if severity is not None:
        if shifted:
            severity = torch.roll(severity, shifts=(-shift_rows, -shift_columns), dims=(1, 2))
        s = partition_windows(severity.to(dtype).unsqueeze(-1), window, dilated).unsqueeze(2)
        q, k = s * q, s * k  # s is (B, windows, 1, N, 1)

    logits = (q * head_dim**-0.5 if scale is None else q) @ k.transpose(-2, -1)  # (B, windows, heads, N, N')
    if scale is not None:
        logits = logits * scale.to(dtype)[:, None, None]
    if bias_table is not None:
        logits = logits + gather_bias(bias_table.to(dtype), window, window)
    if bias is not None:
        logits = logits + bias.to(dtype)
    if shifted:
        sides = shift_regions(height, width, window, shift, q.device)
        key_sides = shift_regions(key_rows, key_columns, key_window, key_shift, q.device)
        logits = logits + shift_mask(sides, key_sides, float("-inf") if mask is None else mask, logits)[:, None]
    attended = logits.softmax(dim=-1) @ v  # (B, windows, heads, N, d)

    attended = attended.transpose(2, 3).flatten(3)
    out = merge_windows(attended, window, height, width, dilated)
    if shifted:
        out = torch.roll(out, shifts=(shift_rows, shift_columns), dims=(1, 2))
    return out.to(dtype)  # under autocast, the products are bfloat16


# Parts of the reference


def partition_windows(image: Tensor, window: int | Pair, dilated: bool = False) -> Tensor:
    """Cut ``(B, H, W, C)`` into ``(B, windows, pixels of a window, C)``, windows in row-major order."""
    batch, height, width, channels = image.shape
    wh, ww = as_pair(window)
    rows, columns = height // wh, width // ww
    if dilated:
        image = image.reshape(batch, wh, rows, ww, columns, channels).permute(0, 2, 4, 1, 3, 5)
    else:
        image = image.reshape(batch, rows, wh, columns, ww, channels).transpose(2, 3)
    return image.reshape(batch, rows * columns, wh * ww, channels)


def merge_windows(windows: Tensor, window: int | Pair, height: int, width: int, dilated: bool = False) -> Tensor:
    """Undo `partition_windows`: ``(B, windows, pixels of a window, C)`` → ``(B, H, W, C)``."""
    batch, _, _, channels = windows.shape
    wh, ww = as_pair(window)
    image = windows.reshape(batch, height // wh, width // ww, wh, ww, channels)
    image = image.permute(0, 3, 1, 4, 2, 5) if dilated else image.transpose(2, 3)
    return image.reshape(batch, height, width, channels)


def shift_regions(height: int, width: int, window: Pair, shift: Pair, device: torch.device | str) -> Tensor:
    """Number the regions of the rolled image within which the pixels of a window may attend to each other.

    Along each axis, the rolled image has three intervals: all windows but the last; the part of the last window that
    did not wrap around; and the part that wrapped around. Two pixels of a window may attend to each other if they lie
    in the same interval along both axes.

    Args:
        height: Image height in pixels, a multiple of the window's.
        width: Image width in pixels, a multiple of the window's.
        window: Size of the window in pixels.
        shift: Cyclic shift in pixels; 0 along an axis leaves one interval.
        device: Device of the result.

    Returns:
        ``(windows, pixels of a window)`` int64: number of the region of each pixel. Two pixels of a window may attend
        to each other if their numbers are equal.
    """

    def intervals(length: int, side: int, by: int) -> Tensor:
        position = torch.arange(length, device=device)
        return ((position >= length - side).long() + (position >= length - by).long()) * (by > 0)

    region = 3 * intervals(height, window[0], shift[0])[:, None] + intervals(width, window[1], shift[1])[None, :]
    return partition_windows(region[None, :, :, None], window)[0, :, :, 0]


def shift_mask(sides: Tensor, key_sides: Tensor, mask: float, like: Tensor) -> Tensor:
    """Return what is added to the logits between the regions of a window (see `shift_regions`).

    Args:
        sides: ``(windows, queries)``: regions of the queries.
        key_sides: ``(windows, keys)``: regions of the keys.
        mask: Value between different regions.
        like: Tensor that has the dtype and device of the result.

    Returns:
        ``(windows, queries, keys)``: 0 within a region, ``mask`` elsewhere.
    """
    forbidden = sides[:, :, None] != key_sides[:, None, :]
    return torch.zeros_like(forbidden, dtype=like.dtype).masked_fill_(forbidden, mask)


def as_pair(size: int | Pair) -> Pair:
    """Return a size along both axes."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _check_size(name: str, size: object, least: int | None) -> Pair:
    """Return a size, in pixels along both axes, after checking its type and its lower bound, if there is one."""
    numbers = size if isinstance(size, tuple | list) else (size, size)
    if len(numbers) != 2:
        raise ValueError(f"{OP}: {name} must be an int or a pair of ints, got {size!r}")
    for number in numbers:
        check_int(OP, name, number)
        if least is not None and number < least:
            raise ValueError(f"{OP}: {name} must be at least {least} pixel, got {size!r}")
    return numbers[0], numbers[1]


def _validate(
    qkv: Tensor,
    bias_table: Tensor | None,
    severity: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    window: int | Pair,
    shift: int | Pair,
    key_window: int | Pair | None,
    dilated: bool,
    mask: float,
    heads: int | None,
) -> Geometry:
    """Check the arguments and return those of the schema that are not tensors."""
    if (k is None) != (v is None):
        raise ValueError(f"{OP}: k and v must be given together, got only {'v' if k is None else 'k'}")
    packed = k is None
    check_tensor(OP, "qkv", qkv, "(B, H, W, 3C)" if packed else "(B, H, W, C)")
    batch, height, width, channels = qkv.shape
    if channels == 0 or (packed and channels % 3 != 0):
        expected = "3C (q, k and v side by side)" if packed else "C, at least 1"
        raise ValueError(f"{OP}: the last dimension of qkv must be {expected}, got {channels}")
    channels = channels // 3 if packed else channels

    wh, ww = _check_size("window", window, 1)
    if 0 in (height, width) or height % wh != 0 or width % ww != 0:
        raise ValueError(
            f"{OP}: height and width must be positive multiples of window={window}, got {height}x{width}; pad the "
            f"image first, for example with savl.network.reflect_pad_to_multiple"
        )
    kh, kw = (wh, ww) if key_window is None else _check_size("key_window", key_window, 1)
    sy, sx = _check_size("shift", shift, None)
    if not (0 <= sy < wh and 0 <= sx < ww):
        raise ValueError(f"{OP}: shift must satisfy 0 <= shift < window={window} pixels, got {shift}")
    if not isinstance(dilated, bool):
        raise TypeError(f"{OP}: dilated must be a bool, got {type(dilated).__name__}")
    if dilated and (sy, sx) != (0, 0):
        raise ValueError(f"{OP}: dilated windows are not shifted, got shift={shift}")
    if (sy * kh) % wh != 0 or (sx * kw) % ww != 0:
        raise ValueError(f"{OP}: shift={shift} is not a whole number of keys for key_window={key_window}")
    if isinstance(mask, bool) or not isinstance(mask, int | float):
        raise TypeError(f"{OP}: mask must be a number, got {type(mask).__name__} {mask!r}")
    lowest = torch.finfo(qkv.dtype).min
    if not (mask == float("-inf") or lowest <= mask <= 0):
        raise ValueError(f"{OP}: mask must be -inf or a number from {lowest:g} to 0 for {qkv.dtype}, got {mask!r}")

    if k is not None and v is not None:
        shape = (batch, height // wh * kh, width // ww * kw, channels)
        for name, value in (("k", k), ("v", v)):
            check_tensor(OP, name, value, "(B, H', W', C)")
            check_shape(OP, name, value, shape, "a key window for every window of the queries")
        check_same_dtype(OP, "qkv", qkv, k=k, v=v)
    elif (kh, kw) != (wh, ww):
        raise ValueError(f"{OP}: key_window differs from window, so k and v must be given apart from qkv")

    if bias_table is not None and bias is not None:
        raise ValueError(f"{OP}: bias_table and bias exclude each other, got both")
    shown: list[tuple[str, int]] = [] if heads is None else [("heads", heads)]
    if heads is not None:
        check_int(OP, "heads", heads)
    if bias_table is not None:
        check_tensor(OP, "bias_table", bias_table, "((2h − 1)·(2w − 1), heads)")
        if (kh, kw) != (wh, ww):
            raise ValueError(
                f"{OP}: bias_table needs key windows like the windows, use bias for key_window={key_window}"
            )
        rows = (2 * wh - 1) * (2 * ww - 1)
        if bias_table.shape[0] != rows:
            raise ValueError(
                f"{OP}: bias_table must have {rows} rows (relative positions in windows of {wh}x{ww} pixels), got "
                f"{bias_table.shape[0]} with shape {tuple(bias_table.shape)}"
            )
        shown.append(("columns of bias_table", bias_table.shape[1]))
    if bias is not None:
        check_tensor(OP, "bias", bias, "(heads, queries, keys)")
        check_shape(OP, "bias", bias, (bias.shape[0], wh * ww, kh * kw), "one value for each query and key of a window")
        shown.append(("planes of bias", bias.shape[0]))
    if scale is not None:
        check_tensor(OP, "scale", scale, "(heads)")
        shown.append(("elements of scale", scale.shape[0]))
    if not shown:
        raise ValueError(f"{OP}: heads must be given, as no bias and no scale show their number")
    count = shown[0][1]
    for name, number in shown:
        if number != count:
            raise ValueError(f"{OP}: {name} must be {count}, the number of {shown[0][0]}, got {number}")
    if count < 1 or channels % count != 0:
        raise ValueError(
            f"{OP}: the {channels} channels must divide evenly among the heads, got {count} heads (the number of "
            f"{shown[0][0]})"
        )

    if severity is not None:
        if (kh, kw) != (wh, ww):
            raise ValueError(f"{OP}: severity needs keys of the same pixels, not key_window={key_window}")
        check_tensor(OP, "severity", severity, "(B, H, W)")
        check_shape(OP, "severity", severity, (batch, height, width), "one value per pixel of qkv")
    others = {"bias_table": bias_table, "severity": severity, "bias": bias, "scale": scale}
    check_same_dtype_or_float32(OP, "qkv", qkv, **others)
    check_same_device(OP, "qkv", qkv, k=k, v=v, **others)
    return count, wh, ww, kh, kw, sy, sx, dilated, None if mask == float("-inf") else float(mask)


# The op that fused kernels implement. Its second result is the log-sum-exp that the Triton backward pass needs.


def empty_log_sum_exp(q: Tensor, heads: int) -> Tensor:
    """Return an uninitialised log-sum-exp: ``(B, heads, H, W)`` if Triton computes the op, else an empty tensor."""
    if q.device.type != FUSED[TRITON].device:
        return q.new_empty(0, dtype=torch.float32)
    from savl.kernels.log_sum_exp import lse_dtype

    return q.new_empty(q.shape[0], heads, q.shape[1], q.shape[2], dtype=lse_dtype(q.dtype))


def kept_outputs(ctx: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Return the outputs that the backward pass needs: both of them, or None twice if there is no log-sum-exp."""
    out, lse = output
    ctx.mark_non_differentiable(lse)
    return (out, lse) if lse.dim() == 4 else (None, None)


def _decomposition(*args: Any) -> tuple[Tensor, Tensor]:
    return _attend(args[:7], args[7:]), empty_log_sum_exp(args[0], args[7])


def _fake(qkv: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    packed, heads = args[2] is None, args[6]
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3 if packed else qkv.shape[3])
    return out, empty_log_sum_exp(qkv, heads)


def _fake_backward(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Return the gradients of the seven tensors; those of absent ones are empty."""
    qkv = args[0]
    return tuple(qkv.new_empty(0) if each is None else each.new_empty(each.shape) for each in args[:7])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[7:]
    ctx.save_for_backward(*inputs[:7], *kept_outputs(ctx, output))


def _backward(ctx: Any, grad_out: Tensor, grad_lse: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: under non-reentrant checkpointing, saved tensors can be unpacked only once
    gradients = torch.ops.savl.window_attention_backward(grad_out, *saved, *ctx.options)
    pairs = zip(saved, gradients, strict=False)
    return *(None if tensor is None else gradient for tensor, gradient in pairs), *(None for _ in ctx.options)


# Cases for tests and benchmarks


def window_attention_case(
    dtype: torch.dtype,
    *,
    batch: int = 1,
    rows: int = 2,
    columns: int = 2,
    window: int | Pair = 8,
    shift: int | Pair = 0,
    key_window: int | Pair | None = None,
    dilated: bool = False,
    mask: float = float("-inf"),
    heads: int = 2,
    head_dim: int = 24,
    severity: bool = True,
    bias: str = "table",
    cosine: bool = False,
    views: bool = False,
    seed: int = 0,
) -> Case:
    """Return a case with an image of ``rows`` × ``columns`` windows.

    Args:
        dtype: Dtype of all tensors.
        batch: Number of images.
        rows: Windows along the height.
        columns: Windows along the width.
        window: As in the op, like ``shift``, ``key_window``, ``dilated``, ``mask`` and ``heads``.
        shift: See ``window``.
        key_window: See ``window``. If it is not None, k and v are tensors of their own.
        dilated: See ``window``.
        mask: See ``window``.
        heads: See ``window``.
        head_dim: Channels of a head.
        severity: Whether there is a severity.
        bias: "table", "dense" or "none".
        cosine: Whether the similarity is the cosine, with a scale per head.
        views: Whether q, k and v are apart, and views of which no dimension is contiguous except the channels.
        seed: Seed of the numbers.
    """
    (wh, ww), (kh, kw) = as_pair(window), as_pair(window if key_window is None else key_window)
    draw, height, width = Draw(dtype, seed), rows * wh, columns * ww
    channels = heads * head_dim

    def image(count: int, ph: int, pw: int) -> Tensor:
        if not views:
            return draw.normal(batch, rows * ph, columns * pw, count * channels)
        wider = draw.normal(columns * pw, batch, rows * ph, (count + 1) * channels)
        return wider.permute(1, 2, 0, 3)[..., channels:]

    apart = views or key_window is not None
    arguments = {
        "qkv": image(1 if apart else 3, wh, ww),
        "bias_table": draw.normal((2 * wh - 1) * (2 * ww - 1), heads) if bias == "table" else None,
        "severity": draw.severity(batch, height, width) if severity else None,
        "k": image(1, kh, kw) if apart else None,
        "v": image(1, kh, kw) if apart else None,
        "bias": draw.normal(heads, wh * ww, kh * kw) if bias == "dense" else None,
        "scale": draw.normal(heads).abs() * 4 + 1 if cosine else None,
    }
    terms = batch * rows * columns * wh * ww + head_dim  # the bias gradient is the longest sum
    if cosine:
        terms *= wh * ww  # the gradient of the scale sums over all pairs
    options: dict[str, Any] = {
        "window": window, "shift": shift, "key_window": key_window, "dilated": dilated, "mask": mask,
    }  # fmt: skip
    if bias == "none" and not cosine:
        options["heads"] = heads
    changed = {
        "key window": key_window, "dilated": dilated, "mask": mask if mask > float("-inf") else None, "cosine": cosine,
        "views": views, "severity": severity,
    }  # fmt: skip
    traits = [f"{name} {value}" if value is not True else name for name, value in changed.items() if value]
    label = ", ".join([f"window {window}, shift {shift}, head dim {head_dim}", *traits])
    return Case(OP, arguments, options, terms, label if bias == "table" else f"{label}, bias {bias}")


def attention_benchmark(
    arguments: dict[str, Tensor | None], options: dict[str, Any], pairs: int, channels: int, side: int
) -> BenchmarkProblem:
    """Return a benchmark of an attention op, with the bytes and floating-point operations that the op requires.

    The forward pass needs two products per pair of pixels: q·k, and p·v with the attention weight p. The backward pass
    computes q·k again, and the gradients of p, q, k and v. Products that a kernel recomputes beyond these are not
    counted, so they do not raise its FLOP/s.

    Args:
        arguments: Tensors of the op.
        options: Keyword arguments of the op: its window sizes and, if it has one, its shift.
        pairs: Number of pairs of a query and a key that attend to each other.
        channels: Number of channels C, summed over all heads.
        side: Side of the image, in pixels.
    """
    first = next(value for value in arguments.values() if value is not None)
    size, product = float(first.element_size() * channels * side**2), 2.0 * pairs * channels
    return BenchmarkProblem(arguments, options, 4 * size, 8 * size, 2 * product, 5 * product, bandwidth_bound=False)


def _benchmark(draw: Draw, side: int) -> BenchmarkProblem:
    """Return window attention as in savl-base: 16×16 windows, shift 8, 6 heads of 24 channels, with severity."""
    window, shift, heads, channels = 16, 8, 6, 144
    arguments: dict[str, Tensor | None] = {
        "qkv": draw.normal(1, side, side, 3 * channels),
        "bias_table": draw.normal((2 * window - 1) ** 2, heads),
        "severity": draw.severity(1, side, side),
    }
    # Along each axis, the shift divides the last window into two intervals, which do not attend to each other.
    intervals = [window] * (side // window - 1) + [shift, window - shift]
    pairs = sum(length**2 for length in intervals) ** 2
    return attention_benchmark(arguments, {"window": window, "shift": shift}, pairs, channels, side)


_TENSORS = "Tensor qkv, Tensor? bias_table, Tensor? severity, Tensor? k, Tensor? v, Tensor? bias, Tensor? scale"
_OPTIONS = (
    "int heads, int window_height, int window_width, int key_height, int key_width, int shift_rows, int shift_columns, "
    "bool dilated, float? mask"
)

# Each trait beyond those of savl-base at least once, and those that meet in published networks together.
_TRAITS: tuple[dict[str, Any], ...] = (
    {
        "window": (4, 16),
        "shift": (2, 8),
        "rows": 3,
        "head_dim": 15,
        "severity": False,
        "views": True,
    },  # DAT, RGT, CRAFT
    {"window": (8, 2), "shift": (4, 0), "bias": "dense"},
    {"window": 4, "shift": 2, "mask": -2.0, "columns": 3},
    {"window": 7, "shift": 3, "mask": -1.0, "bias": "dense", "severity": False},
    {"window": 4, "dilated": True, "columns": 3, "head_dim": 16, "severity": False},  # OmniSR
    {"window": 8, "shift": 4, "cosine": True, "head_dim": 10, "severity": False},  # Swin2SR
    {"window": (3, 4), "cosine": True, "bias": "none", "views": True, "batch": 2},
    {"window": 8, "shift": 4, "key_window": 4, "bias": "dense", "severity": False},  # SRFormer
    {"window": (2, 4), "shift": (0, 2), "key_window": (4, 2), "bias": "none", "severity": False, "mask": -1.0},
    {"window": (1, 32), "rows": 4, "columns": 1, "heads": 1, "head_dim": 40, "bias": "none", "severity": False},
)

WINDOW_ATTENTION = register(
    Op(
        name=OP,
        function=window_attention,
        reference=window_attention_reference,
        backends={TRITON: None, CPP: None},
        schema=f"window_attention({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
        backward_schema=f"window_attention_backward(Tensor grad_out, {_TENSORS}, Tensor? out, Tensor? lse, {_OPTIONS}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        fake=_fake,
        fake_backward=_fake_backward,
        decomposition=_decomposition,
        setup_context=_setup_context,
        backward=_backward,
        case=window_attention_case,
        full_cases=(
            {"window": 16, "shift": 8, "heads": 3},
            {"window": 16, "heads": 3, "head_dim": 30, "severity": False},
            {"window": 8, "shift": 4},
            {"window": 5, "shift": 2, "rows": 1, "columns": 3, "head_dim": 7},
            *_TRAITS,
        ),
        quick_cases=(
            {"window": 16, "shift": 8, "rows": 1, "heads": 1},
            {"window": 16, "rows": 1, "columns": 1, "head_dim": 30, "severity": False},
            {"window": 8, "shift": 4},
            {"window": 5, "shift": 2, "rows": 1, "columns": 3, "head_dim": 7},
            *_TRAITS,
        ),
        small_cases=(
            {"batch": 2, "window": 4, "head_dim": 5, "columns": 3},
            {"batch": 2, "window": 5, "shift": 2, "head_dim": 8},
            {"window": 4, "shift": 1, "head_dim": 9, "severity": False},
            {"window": (2, 6), "shift": (1, 3), "mask": -2.0, "bias": "dense", "head_dim": 8, "views": True},
            {"window": (4, 3), "dilated": True, "bias": "none", "severity": False, "head_dim": 5},
            {"window": 3, "shift": (0, 1), "cosine": True, "severity": False, "head_dim": 6},
            {"window": 4, "shift": 2, "key_window": 2, "bias": "dense", "severity": False, "head_dim": 7},
        ),
        tiny_cases=(
            {"window": 2, "head_dim": 2, "rows": 2, "columns": 1},
            {"window": 2, "shift": 1, "head_dim": 2, "rows": 2, "columns": 1},
            {"window": 2, "shift": 1, "head_dim": 3, "rows": 1, "columns": 1, "severity": False},
            {"window": (1, 2), "shift": (0, 1), "head_dim": 2, "mask": -1.0, "bias": "dense", "cosine": True},
            {"window": 2, "key_window": (1, 2), "head_dim": 2, "severity": False, "bias": "none", "views": True},
        ),
        interpreter_cases=(
            {"window": 8, "shift": 4, "heads": 1},
            {"window": 4, "rows": 1, "columns": 1, "head_dim": 30, "severity": False},
            *_TRAITS,
        ),
        title="window attention",
        benchmark=_benchmark,
    )
)
