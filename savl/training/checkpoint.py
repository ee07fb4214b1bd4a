"""Checkpoints and initial weights: the state with which a run begins or resumes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from savl.atomic_write import write_atomically
from savl.network import SAVL
from savl.training.config import FORMER_NAMES, TrainingConfig
from savl.training.objective_config import ObjectiveConfig
from savl.weights import load_savl

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain types) atomically, so that a killed process leaves a complete file.

    Raises:
        OSError: The disk is full or the folder cannot be written; an existing checkpoint is untouched.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``, which does not execute pickled code.

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


def identity_settings(config: TrainingConfig, processes: int) -> dict[str, Any]:
    """Return the settings that a resumed run must share with the original one.

    These are all settings except those of length, logging, validation, file locations and execution.

    Args:
        config: The run.
        processes: Number of processes that train it.

    Returns:
        Values by the full names of settings, such as ``optimizer.betas``, ``processes``, and whether there are ``real
        pairs``.
    """
    free = {"run.steps", "run.log_every", "run.checkpoint_every", "run.images_every", "run.output", "run.device"}
    free |= {"run.minutes", "run.fused", "run.compile", "run.graph"}
    free |= {"data.hr", "data.include_results", "data.cache", "data.workers", "pairs.lr", "pairs.hr"}
    flat = {name: value for name, value in _flat(config.to_dict()) if not name.startswith("validation.")}
    kept = {name: value for name, value in flat.items() if name not in free}
    return {"processes": processes, "real pairs": bool(config.pairs.lr), **kept}


def check_settings(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Check that a run is the one of a checkpoint.

    Args:
        path: The checkpoint.
        saved: `identity_settings` of the run that wrote it, possibly under former names. Settings that an older version
            did not have count as their defaults.
        current: `identity_settings` of the run that would resume from it.

    Raises:
        ValueError: They differ; the message names the settings that do.
    """
    saved = {FORMER_NAMES.get(name, name): value for name, value in saved.items()}
    saved = {**identity_settings(TrainingConfig(), 1), **saved}
    changed = [name for name in current if current[name] != saved.get(name)]
    if changed:
        what = ", ".join(f"{name} was {saved.get(name)!r} and is {current[name]!r}" for name in changed)
        raise ValueError(f"{path} belongs to another run: {what}; choose another run.output, or set them back")


def _flat(tables: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        pair
        for name, value in tables.items()
        for pair in (_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)])
    ]


def initial_network(config: TrainingConfig) -> SAVL:
    """Return the network with which a run begins.

    It has random weights, or those of ``run.initial_weights`` except for the parts in ``run.reinitialize``.

    Raises:
        ValueError: The weights cannot be read or belong to another network, the network has no such part, or a part
            that is frozen would stay random.
    """
    if not config.run.initial_weights:
        return SAVL(config.model)
    try:
        start = load_savl(config.run.initial_weights)
    except (OSError, ValueError) as error:
        raise ValueError(f"run.initial_weights: {error}") from error
    parts = config.run.reinitialize
    theirs, ours = start.config.to_dict(), config.model.to_dict()
    may_differ = _settings_that_may_differ(parts)
    differing = [name for name in ours if theirs[name] != ours[name] and name not in may_differ]
    if differing:
        what = ", ".join(f"{name} is {theirs[name]!r} there" for name in differing)
        raise ValueError(
            f"run.initial_weights: {config.run.initial_weights} holds another network than [model] describes: {what}"
        )
    model = SAVL(config.model)
    old, new = start.state_dict(), model.state_dict()
    for part in parts:
        if not any(is_in(name, (part,)) for name in (*old, *new)):
            raise ValueError(f"run.reinitialize: the network has no weight in a part {part!r}")
    random = [name for name in new if is_in(name, parts)]
    for setting, is_trained in _trained_parts(config.objective):
        if frozen := next((name for name in random if not is_trained(name)), None):
            raise ValueError(
                f"run.reinitialize = {list(parts)}: {frozen} would begin at random and stay so, because {setting} does "
                f"not train it; reinitialize only parts that are trained"
            )
    model.load_state_dict(new | {name: tensor for name, tensor in old.items() if not is_in(name, parts)})
    return model


def _trained_parts(objective: ObjectiveConfig) -> Iterator[tuple[str, Callable[[str], bool]]]:
    """Yield settings that freeze weights, each with a function that returns whether it trains a weight of a name."""
    if objective.train_only:
        yield f"objective.train_only = {list(objective.train_only)}", lambda name: is_in(name, objective.train_only)
    if objective.freeze_estimator:
        yield "objective.freeze_estimator", lambda name: not name.startswith("estimator.")
    if objective.freeze_network:
        yield "objective.freeze_network", lambda name: name.startswith("estimator.")


def is_in(name: str, parts: Sequence[str]) -> bool:
    """Return whether a weight lies in one of the parts, each a sequence of module names anywhere in its path."""
    return any(f".{part}" in f".{name}" for part in parts)


def _settings_that_may_differ(reinitialize: Sequence[str]) -> set[str]:
    """Return the settings of the network in which initial weights may differ.

    These are the settings that no weight of the network depends on, and those of parts that are reinitialized.
    """
    settings = {"cab_neighbourhood", "drop_path", "spatial_modulation", "decoder_width", "decoder_depth"}
    estimator, guidance = (any(part.startswith(name) for part in reinitialize) for name in ("estimator.", "guidance."))
    if estimator:
        settings |= {"degradation_code", "estimator_width", "estimator_dilations", "estimator_high_pass"}
    if guidance:
        settings |= {"channel_modulation", "modulation_shift"}
    if any(part.startswith("strength.") for part in reinitialize):
        settings |= {"restoration_strength"}
    return settings | ({"latent"} if estimator and guidance else set())
