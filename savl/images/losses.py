"""Names of what a picture loses that more than one reader gives."""

from __future__ import annotations

GAIN_MAP = "the HDR gain map"
DEPTH_MAP = "the depth map"
FILM = "the film of a motion photo"
MULTI_PICTURE = "the further pictures in the file (MPF)"
COLOUR_PROFILE = "the colour profile, which is damaged"
_BEHIND = "behind the first"


def pictures_behind(count: int) -> str:
    """Return the name of further pictures, one or more, of which nothing else is known."""
    return f"a further picture {_BEHIND}" if count == 1 else f"{count} further pictures {_BEHIND}"


def bytes_behind(count: int) -> str:
    """Return the name of data behind the end of a picture."""
    return "1 byte behind the picture" if count == 1 else f"{count} bytes behind the picture"


def without_repetitions(lost: list[str]) -> list[str]:
    """Return the names, each once, less general ones of what another names more exactly.

    Gain maps and depth maps are further pictures in the file.
    """
    names = list(dict.fromkeys(lost))
    if GAIN_MAP in names or DEPTH_MAP in names:
        names = [name for name in names if name != MULTI_PICTURE and not name.endswith(_BEHIND)]
    if MULTI_PICTURE in names:
        names = [name for name in names if not name.endswith(_BEHIND)]
    return names
