"""What a run begins with."""

from __future__ import annotations

from collections.abc import Sequence

from savl.network import SAVL
from savl.training.config import TrainingConfig
from savl.weights import load


def initial_network(config: TrainingConfig) -> SAVL:
    """Return the network that a run begins with.

    It has random weights, or those of ``run.initial_weights`` except for the parts in ``run.reinitialize``.

    Raises:
        ValueError: The weights cannot be read or are of another network, or it has no part of such a name.
    """
    if not config.run.initial_weights:
        return SAVL(config.model)
    try:
        start = load(config.run.initial_weights)
    except (OSError, ValueError) as error:
        raise ValueError(f"run.initial_weights: {error}") from error
    theirs, ours = start.config.to_dict(), config.model.to_dict()
    free = _may_differ(config.run.reinitialize)
    differing = [name for name in ours if theirs[name] != ours[name] and name not in free]
    if differing:
        what = ", ".join(f"{name} is {theirs[name]!r} there" for name in differing)
        raise ValueError(
            f"run.initial_weights: {config.run.initial_weights} holds another network than [model] describes: {what}"
        )
    model = SAVL(config.model)
    old, new = start.state_dict(), model.state_dict()
    for part in config.run.reinitialize:
        if not any(_begins_anew(name, (part,)) for name in (*old, *new)):
            raise ValueError(f"run.reinitialize: the network has no weight in a part {part!r}")
    for setting, of_estimator in (("freeze_estimator", True), ("freeze_network", False)):
        frozen = [name for name in new if name.startswith("estimator.") == of_estimator]
        random = next((name for name in frozen if _begins_anew(name, config.run.reinitialize)), None)
        if getattr(config.objective, setting) and random is not None:
            raise ValueError(f"run.reinitialize: {random} would begin at random and stay so (objective.{setting})")
    model.load_state_dict(
        new | {name: tensor for name, tensor in old.items() if not _begins_anew(name, config.run.reinitialize)}
    )
    return model


def _begins_anew(name: str, parts: Sequence[str]) -> bool:
    """Whether a weight lies in one of the parts, which are named from the outermost module or from any inside it."""
    return any(f".{part}" in f".{name}" for part in parts)


def _may_differ(fresh: Sequence[str]) -> set[str]:
    """The settings of the network that weights to start from may have otherwise.

    Those that no weight of the network depends on, and those whose weights all begin anew.
    """
    settings = {"cab_neighbourhood", "drop_path", "spatial_modulation", "decoder_width", "decoder_depth"}
    estimator, guidance = (any(part.startswith(begin) for begin in fresh) for part in ("estimator.", "guidance."))
    if estimator:
        settings |= {"degradation_code", "estimator_width", "estimator_dilations", "estimator_high_pass"}
    if guidance:
        settings |= {"channel_modulation", "modulation_shift"}
    return settings | ({"latent"} if estimator and guidance else set())
