"""What Triton's interpreter runs: the kernels of both attentions and of layer
normalisation, forward and backward through autograd, on the CPU.

`CASES` holds functions by name; each raises AssertionError with a message that says what is wrong. They want
TRITON_INTERPRET=1 in the environment before savl is imported: worker.py runs them, test_interpreted.py starts that.
Images are of a few windows, since the interpreter takes milliseconds for what a GPU does in none.
"""

from __future__ import annotations

from importlib import import_module

from case_tools import CASES

for name in (
    "cases_right",
    "cases_memory",
    "cases_extremes",
    "cases_ops",
    "cases_layer_norm",
):  # the first ones take longest
    import_module(name)  # enters its cases

__all__ = ["CASES"]
