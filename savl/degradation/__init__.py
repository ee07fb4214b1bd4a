"""Degradation of high-resolution images to the low-resolution images that cameras and codecs produce."""

from savl.degradation.config import DegradationConfig
from savl.degradation.pipeline import Degradation, DegradationUnavailable, Degraded, bicubic_downsample

__all__ = ["Degradation", "DegradationConfig", "DegradationUnavailable", "Degraded", "bicubic_downsample"]
