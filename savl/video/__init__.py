"""Upscale videos with PyAV: ``pip install 'savl[video]'``.

`upscale_video` does what ``savl upscale clip.mp4`` does. Neither ``import savl`` nor ``import savl.video`` imports
PyAV.
"""

from __future__ import annotations

from savl.video.upscale import UpscaledVideo, upscale_video

__all__ = ["UpscaledVideo", "upscale_video"]
