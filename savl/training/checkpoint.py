"""Checkpoints: everything a run needs to go on, written so that a kill at any moment leaves a whole one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from savl.atomic_write import write_atomically

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain types) atomically.

    Raises:
        OSError: The disk is full or the folder cannot be written; an existing checkpoint is untouched.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without unpickling code.

    Raises:
        ValueError: The file is not a checkpoint of this format; the message names it.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a savl training checkpoint of format {FORMAT}")
    return state
