"""The ops of SAVL, one file each: its mathematics, the public function, the eager reference, and the registration.

The public functions validate their arguments and hand them to the kernel that `savl.ops.switch` chooses; the
``*_reference`` functions are the definition of the truth that every kernel is held against (`savl.ops.equivalence`).
"""

from savl.ops.channel_modulation import channel_modulation, channel_modulation_reference
from savl.ops.gaussian_posterior import (
    GaussianPosterior,
    gaussian_posterior,
    gaussian_posterior_reference,
    normalise_severity,
    variance_statistics,
)
from savl.ops.layer_norm import layer_norm, layer_norm_reference
from savl.ops.overlapping_window_attention import (
    overlapping_window_attention,
    overlapping_window_attention_reference,
)
from savl.ops.report import KernelReport, kernel_report
from savl.ops.switch import KernelSettings, KernelUnavailable, use_fused_kernels
from savl.ops.window_attention import window_attention, window_attention_reference

__all__ = [
    "GaussianPosterior",
    "KernelReport",
    "KernelSettings",
    "KernelUnavailable",
    "channel_modulation",
    "channel_modulation_reference",
    "gaussian_posterior",
    "gaussian_posterior_reference",
    "kernel_report",
    "layer_norm",
    "layer_norm_reference",
    "normalise_severity",
    "overlapping_window_attention",
    "overlapping_window_attention_reference",
    "use_fused_kernels",
    "variance_statistics",
    "window_attention",
    "window_attention_reference",
]
