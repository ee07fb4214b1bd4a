"""Degradations: from a high-resolution image to the low-resolution one a camera and a codec would have left."""

from savl.degradation.config import DegradationConfig
from savl.degradation.content import bicubic_downsample
from savl.degradation.pipeline import Degradation, DegradationUnavailable, Degraded

__all__ = ["Degradation", "DegradationConfig", "DegradationUnavailable", "Degraded", "bicubic_downsample"]
