"""The number formats the network may compute in."""

from __future__ import annotations

PRECISIONS = ("float32", "bfloat16")

_FLOAT16_REASON = (
    "float16 overflows in transformers of this kind and gives black or NaN pictures; "
    "use bfloat16 for the same speed and memory, or float32"
)


def check_precision(name: str) -> str:
    """Returns `name` when it is a precision the networks can compute in.

    Args:
        name: "float32" or "bfloat16", with or without a leading "torch.".

    Raises:
        ValueError: for anything else; for float16 it says why that is refused.
    """
    bare = name.removeprefix("torch.")
    if bare in PRECISIONS:
        return bare
    if bare in ("float16", "half", "fp16"):
        raise ValueError(_FLOAT16_REASON)
    raise ValueError(f"dtype {name!r} is not one of {', '.join(PRECISIONS)}")
