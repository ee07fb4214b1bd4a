"""What became of an image file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessedFile:
    """What was done.

    Attributes:
        old_size: width and height of the input, pixels.
        new_size: width and height of the output, pixels.
        notes: what the output could not keep, and what the user may not expect; full sentences, lower case.
    """

    old_size: tuple[int, int]
    new_size: tuple[int, int]
    notes: tuple[str, ...]
