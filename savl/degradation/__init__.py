"""Degradation of high-resolution images to the low-resolution images that cameras and codecs produce."""

from savl.bicubic import bicubic_downsample
from savl.degradation.config import DegradationConfig
from savl.degradation.pipeline import Degradation, DegradationUnavailable, Degraded

__all__ = ["Degradation", "DegradationConfig", "DegradationUnavailable", "Degraded", "bicubic_downsample"]
