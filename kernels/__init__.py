"""Triton kernels, imported as ``savl.kernels``.

`attention` and `attention_backward` have the kernels, which are made of what is in `tiles`, and `launch` their
launches; one file per op, named like its twin in ``savl/ops``, is what the dispatcher calls. `configs` has the block
sizes, `tune` and `measure` search for them, `ahead` compiles without a GPU. This package, `configs`, `log_sum_exp`
and `tune` import without Triton.
"""
