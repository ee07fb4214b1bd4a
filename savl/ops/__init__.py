"""The ops of SAVL, one file each: its mathematics, the public function, the eager reference, and its record.

The public functions validate their arguments and call the kernel that `savl.ops.switch` chooses. The ``*_reference``
functions define the correct result, which `savl.ops.equivalence` compares every kernel with. The record
(`savl.ops.op.Op`) holds everything that makes it an op.
"""

# In the order of reports, not of the alphabet.
# isort: off
from savl.ops.window_attention import window_attention, window_attention_reference
from savl.ops.overlapping_window_attention import (
    overlapping_window_attention,
    overlapping_window_attention_reference,
)
from savl.ops.gaussian_posterior import (
    GaussianPosterior,
    gaussian_posterior,
    gaussian_posterior_reference,
    normalise_severity,
    variance_statistics,
)
from savl.ops.channel_modulation import channel_modulation, channel_modulation_reference
from savl.ops.layer_norm import layer_norm, layer_norm_reference
from savl.ops.convolution import convolution, convolution_reference, fuses_convolution
from savl.ops.guided_projection import guided_projection, guided_projection_reference
from savl.ops.projection_mlp import projection_mlp, projection_mlp_reference
from savl.ops.channel_gate import channel_gate, channel_gate_reference

# isort: on

from savl.ops.report import KernelReport, kernel_report
from savl.ops.scopes import read_environment
from savl.ops.settings import KernelSettings
from savl.ops.switch import KernelUnavailable, use_fused_kernels

read_environment()

__all__ = [
    "GaussianPosterior",
    "KernelReport",
    "KernelSettings",
    "KernelUnavailable",
    "channel_gate",
    "channel_gate_reference",
    "channel_modulation",
    "channel_modulation_reference",
    "convolution",
    "convolution_reference",
    "fuses_convolution",
    "gaussian_posterior",
    "gaussian_posterior_reference",
    "guided_projection",
    "guided_projection_reference",
    "kernel_report",
    "layer_norm",
    "layer_norm_reference",
    "normalise_severity",
    "overlapping_window_attention",
    "overlapping_window_attention_reference",
    "projection_mlp",
    "projection_mlp_reference",
    "use_fused_kernels",
    "variance_statistics",
    "window_attention",
    "window_attention_reference",
]
