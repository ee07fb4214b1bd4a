"""The four ops of SAVL, one file each: its mathematics, the public function, and the eager reference.

The public functions validate their arguments and then compute; the ``*_reference`` functions are the definition
of the truth that any faster implementation is held against.
"""

from savl.ops.channel_modulation import channel_modulation, channel_modulation_reference
from savl.ops.gaussian_posterior import (
    GaussianPosterior,
    gaussian_posterior,
    gaussian_posterior_reference,
    normalise_severity,
    variance_statistics,
)
from savl.ops.overlapping_window_attention import (
    overlapping_window_attention,
    overlapping_window_attention_reference,
)
from savl.ops.window_attention import window_attention, window_attention_reference

__all__ = [
    "GaussianPosterior",
    "channel_modulation",
    "channel_modulation_reference",
    "gaussian_posterior",
    "gaussian_posterior_reference",
    "normalise_severity",
    "overlapping_window_attention",
    "overlapping_window_attention_reference",
    "variance_statistics",
    "window_attention",
    "window_attention_reference",
]
