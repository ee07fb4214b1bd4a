"""Checkpoints: everything a run needs to go on, written so that a kill at any moment leaves a whole one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from savl.atomic_write import write_atomically
from savl.training.config import FORMER_NAMES, TrainingConfig

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


def settings_that_count(config: TrainingConfig, processes: int) -> dict[str, Any]:
    """What a resumed run must share with the one it resumes: all but its length, its rhythm and where files lie.

    Args:
        config: The run.
        processes: How many train it together.

    Returns:
        Values by the names of the settings, ``optimizer.betas`` for one; and the ``processes``.
    """
    free = {"run.steps", "run.log_every", "run.checkpoint_every", "run.images_every", "run.output", "run.device"}
    free |= {"run.minutes", "run.fused", "run.compile", "run.graph", "data.hr", "data.cache", "data.workers"}
    flat = {name: value for name, value in _flat(config.to_dict()) if not name.startswith("validation.")}
    return {"processes": processes, **{name: value for name, value in flat.items() if name not in free}}


def check_settings(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """See to it that a run is the one its checkpoint is of.

    Args:
        path: The checkpoint.
        then: `settings_that_count` when it was written. What an older version did not speak of was as it is by default.
        now: Those of the run that would go on from it.

    Raises:
        ValueError: They differ; the message names those that do.
    """
    then = {FORMER_NAMES.get(name, name): value for name, value in then.items()}
    then = {**settings_that_count(TrainingConfig(), 1), **then}
    changed = [name for name in now if now[name] != then.get(name)]
    if changed:
        what = ", ".join(f"{name} was {then.get(name)!r} and is {now[name]!r}" for name in changed)
        raise ValueError(f"{path} belongs to another run: {what}; choose another run.output, or set them back")


def _flat(tables: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        pair
        for name, value in tables.items()
        for pair in (_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)])
    ]
