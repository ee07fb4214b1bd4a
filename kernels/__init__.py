"""Triton kernels, imported as ``savl.kernels``.

`attention` and ``attention_backward*`` contain the attention kernels, `tiles` the functions that they are made of, and
`launch` the launches. The dispatcher calls one file per op, which has the name of the file in ``savl/ops``. `configs`
looks up block sizes, `tune` and `gpu_timing` search for them, and `compile_ahead_of_time` compiles kernels without a
GPU. This package, `configs`, `log_sum_exp` and `tune` can be imported without Triton.
"""
