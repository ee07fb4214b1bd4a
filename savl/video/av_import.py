"""Import of PyAV, which is optional, and its errors in short."""

from __future__ import annotations

import os
from typing import Any


class VideoUnavailable(ImportError):
    """PyAV cannot be imported."""


def import_av() -> Any:
    """Return the module ``av``.

    Raises:
        VideoUnavailable: It cannot be imported, or is too old; the message names the command that installs it.
    """
    # SVT-AV1 has no other way to print errors only. The user's own value is kept.
    os.environ.setdefault("SVT_LOG", "1")
    try:
        import av
    except ImportError as error:
        raise VideoUnavailable(
            f"videos need PyAV, which cannot be imported ({error}); pip install 'savl[video]' brings it"
        ) from error
    if not hasattr(av.video.stream.VideoStream, "set_display_matrix"):
        raise VideoUnavailable(f"videos need PyAV 18 or newer, not {av.__version__}; pip install 'savl[video]'")
    return av


def av_reason(error: Exception) -> str:
    """Return the reason of an error of PyAV in lower case, such as "invalid data found when processing input"."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split()).rstrip(".").lower()
