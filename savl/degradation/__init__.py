"""Degradations: from a high-resolution image to the low-resolution one a camera and a codec would have left."""

from savl.degradation.light import LightDegradation, bicubic_downsample

__all__ = ["LightDegradation", "bicubic_downsample"]
