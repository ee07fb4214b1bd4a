"""Triton kernels, imported as ``savl.kernels``.

One file per op, named like its twin in ``savl/ops``. This package itself imports without Triton: a kernel's
module is loaded when its backend is asked for, and only where Triton is.
"""
