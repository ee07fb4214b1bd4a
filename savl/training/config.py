"""Settings of a training run: one TOML file, one frozen dataclass per table.

Those of the images are in `savl.training.data_config`, those of the loss in `savl.training.objective_config`.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from savl.degradation.config import DegradationConfig
from savl.network import CONFIGS, SAVLConfig
from savl.settings import check_at_least, check_types, checked_table, current_names, from_table, renamed
from savl.training.data_config import DataConfig, Device, PairsConfig, ValidationConfig
from savl.training.objective_config import GanConfig, ObjectiveConfig, OptimizerConfig


@renamed("run", start="initial_weights", fresh="reinitialize")
@dataclass(frozen=True)
class RunConfig:
    """Length, initial weights, output and execution of a run."""

    steps: int = 10_000
    """Optimizer steps."""
    minutes: float = 0.0
    """Time limit: above 0 the run ends after this many minutes of training or after ``steps``, whichever comes first.
    The learning rate then follows the expected length of the run, estimated from the time per step so far; the warm-up
    is still counted in steps. Validation, checkpoints, logs and the time before a resumption count; decoding,
    compilation, filling the pool and the final export do not. Such a run is not reproducible bit for bit."""
    seed: int = 0
    """Seed of all random numbers, together with the step and the rank of the process."""
    initial_weights: str = ""
    """Weights to begin with: a shipped name or a file, of the network in ``[model]``; random weights if empty. Settings
    may differ that no weight depends on (``cab_neighbourhood``, ``drop_path``, ``spatial_modulation``, those of the
    decoder), and settings of parts in ``reinitialize``."""
    reinitialize: tuple[str, ...] = ()
    """Parts of the network that begin with random weights although there are ``initial_weights``. Each is the name of a
    module or the beginning of one: ``["estimator."]``, ``["guidance."]`` for the projections by which every DSCA reads
    the field, or ``["strength."]``, also if the initial weights have no restoration strength."""
    checkpoint_every: int = 250
    """Steps between checkpoints, and so the number of steps that a killed run can lose."""
    log_every: int = 25
    """Steps between lines of the log."""
    images_every: int = 500
    """Steps between images in TensorBoard."""
    output: str = "runs/savl"
    """Folder for checkpoint, logs and exported weights."""
    device: Device = "auto"
    """``auto``: a GPU if there is one, otherwise the CPU."""
    bfloat16: bool = False
    """Compute in bfloat16 under autocast; weights stay float32."""
    fused: bool = False
    """Use the fused kernels where they can serve."""
    compile: bool = False
    """Compile the network with torch.compile."""
    graph: bool = False
    """On a GPU, record the forward and backward passes of the network once and replay them as CUDA graphs, because the
    CPU launches the many small kernels of a small network more slowly than the GPU runs them. Single process only.
    Can be combined with ``compile``."""

    def __post_init__(self) -> None:
        check_types(self, "run.")
        check_at_least(1, "run", self, "steps", "checkpoint_every", "log_every", "images_every")
        if not 0 <= self.minutes < math.inf:
            raise ValueError(f"run.minutes must be at least 0 and finite, got {self.minutes!r}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"run.seed must satisfy 0 <= seed < 2**31, got {self.seed!r}")


@dataclass(frozen=True)
class TrainingConfig:
    """All settings of a run."""

    model: SAVLConfig = CONFIGS["savl-tiny"]
    data: DataConfig = field(default_factory=DataConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    degradation: DegradationConfig = field(default_factory=DegradationConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    gan: GanConfig = field(default_factory=GanConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        self._check_degradation_code()
        self._check_freezing()
        for name in ("content", "dimensions"):
            if getattr(self.objective, name) > 0 and not 2 <= self.data.images_per_recipe < self.data.batch:
                raise ValueError(
                    f"objective.{name} compares images of different recipes: data.images_per_recipe must be at least 2 "
                    f"and below data.batch={self.data.batch}, got {self.data.images_per_recipe!r}"
                )
        if self.objective.dimensions > 0 and self.data.images_per_recipe % 2:
            raise ValueError(
                f"objective.dimensions compares two halves of the images of each recipe: data.images_per_recipe must "
                f"be even, got {self.data.images_per_recipe!r}"
            )
        if self.objective.axes > 0 and self.degradation.single_operation == 0:
            raise ValueError("objective.axes needs images with one operation: degradation.single_operation is 0")
        if self.run.reinitialize and not self.run.initial_weights:
            raise ValueError("run.reinitialize requires run.initial_weights: without them all parts begin at random")
        if self.run.minutes > 0 and self.optimizer.schedule != "cosine":
            raise ValueError(
                f"run.minutes requires optimizer.schedule = 'cosine', got {self.optimizer.schedule!r}: milestones are "
                f"steps, and the number of steps is not known"
            )
        side = self.data.patch * self.model.scale
        smallest = 16 if self.gan.perceptual_features == "vgg19" else 23
        if self.gan.perceptual > 0 and side < smallest:
            raise ValueError(f"gan.perceptual needs HR patches of at least {smallest} pixels, got {side}")
        if self.gan.weight > 0 and self.gan.discriminator == "unet" and side % 8:
            raise ValueError(
                f"gan: the discriminator needs HR patches with sides that are multiples of 8 pixels, got "
                f"data.patch={self.data.patch} at scale {self.model.scale}; gan.discriminator = 'patch' takes any side "
                f"of at least 8"
            )
        if self.gan.weight > 0 and side < 8:
            raise ValueError(f"gan: the discriminator needs HR patches of at least 8 pixels, got {side}")

    def _check_degradation_code(self) -> None:
        objective, code = self.objective, self.model.degradation_code
        if objective.club > 0 and code != "deterministic":
            raise ValueError(f"objective.club regularises a deterministic code; model.degradation_code is {code!r}")
        for name in ("freeze_estimator", "freeze_network", "content", "dimensions", "axes"):
            if getattr(objective, name) and code == "none":
                raise ValueError(f"objective.{name}: the model has no estimator (degradation_code is 'none')")
        weights = set(objective.estimator_weights())
        if objective.freeze_network and code == "deterministic" and weights <= {"calibration", "contrast"}:
            raise ValueError(
                "objective.freeze_network: a deterministic code has no variance that calibration or contrast could "
                "train; set objective.alpha, club, content, dimensions or axes"
            )

    def _check_freezing(self) -> None:
        objective, run = self.objective, self.run
        random = any(part.startswith("estimator") or "estimator.".startswith(part) for part in run.reinitialize)
        if objective.freeze_estimator and (not run.initial_weights or random):
            raise ValueError(
                "objective.freeze_estimator requires run.initial_weights, and an estimator that is not in "
                "run.reinitialize: a random estimator would stay random"
            )
        if objective.train_only and not run.initial_weights:
            raise ValueError("objective.train_only requires run.initial_weights: random weights would stay random")
        if objective.freeze_network and not run.initial_weights:
            raise ValueError(
                "objective.freeze_network requires run.initial_weights: a random network would stay random"
            )
        known = {"calibration", "contrast", "content", "dimensions", "axes"}
        if (
            objective.freeze_network
            and self.pairs.lr
            and self.pairs.share == 1
            and set(objective.estimator_weights()) <= known
        ):
            raise ValueError(
                f"objective.freeze_network with real pairs alone needs objective.alpha or club: "
                f"{', '.join(sorted(known))} need images whose degradation is known; set pairs.share below 1"
            )
        if objective.freeze_network and self.optimizer.method == "muon":
            raise ValueError(
                "objective.freeze_network freezes the matrices that optimizer.method = 'muon' is for: set it to 'adam'"
            )
        if objective.freeze_network and max(self.gan.weight, self.gan.perceptual, self.gan.grid) > 0:
            raise ValueError("objective.freeze_network computes no SR image, which the losses in [gan] need")

    def to_dict(self) -> dict[str, Any]:
        """Return nested tables of plain types."""
        return asdict(self)


TABLES: dict[str, type[Any]] = {
    "data": DataConfig,
    "pairs": PairsConfig,
    "degradation": DegradationConfig,
    "objective": ObjectiveConfig,
    "gan": GanConfig,
    "optimizer": OptimizerConfig,
    "validation": ValidationConfig,
    "run": RunConfig,
}
FORMER_NAMES = {
    f"{table}.{old}": f"{table}.{new}"
    for table, settings in TABLES.items()
    for old, new in getattr(settings, "FORMER_NAMES", {}).items()
}
"""Current names of renamed settings by their former ones, such as ``"data.alike"``."""


def parse_config(tables: dict[str, Any]) -> TrainingConfig:
    """Build a `TrainingConfig` from nested tables, as TOML gives them.

    ``[model]`` may name a configuration (``name = "savl-tiny"``) and override settings of it.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A table or setting is unknown, or a value is out of range.
    """
    tables = dict(tables)
    model = checked_table("model", tables.pop("model", {}))
    name = model.pop("name", "savl-tiny")
    if name not in CONFIGS:
        raise ValueError(f"model.name must be one of {sorted(CONFIGS)}, got {name!r}")
    parts: dict[str, Any] = {"model": SAVLConfig.from_dict({**CONFIGS[name].to_dict(), **model})}
    for table, values in tables.items():
        if table not in TABLES:
            raise ValueError(f"unknown table [{table}]; a training configuration has {['model', *TABLES]}")
        parts[table] = from_table(TABLES[table], table, values)
    return TrainingConfig(**parts)


def load_config(path: str | Path, changes: Sequence[str] = ()) -> TrainingConfig:
    """Read a TOML file.

    A file may begin with ``base = "OTHER.toml"``, a path relative to its own folder. It then holds the settings that
    differ from those of that file. Former names of settings are accepted, each with a FutureWarning.

    Args:
        path: The file.
        changes: Settings that replace those of the file, each as ``"table.name=value"`` with the value as in TOML.

    Raises:
        FileNotFoundError: The file or its base does not exist.
        ValueError: The file is not TOML, is based on itself, or `parse_config` refuses it; the message begins with the
            path. Or a change cannot be parsed.
    """
    parsed = [_parse_change(change) for change in changes]
    try:
        tables = _read(Path(path))
        for change in parsed:
            _merge(tables, _with_current_names(change))
        return parse_config(tables)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {_missing_file(Path(path), error)}") from error
    except (ValueError, TypeError) as error:  # TOMLDecodeError is a ValueError
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path, derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the tables of a file merged into those of its base; ``derived`` are the files that are based on it."""
    if path.resolve() in derived:
        raise ValueError(f"base: {path} is based on itself")
    with open(path, "rb") as file:
        tables = _with_current_names(tomllib.load(file))
    if "base" not in tables:
        return tables
    base = tables.pop("base")
    if not isinstance(base, str):
        raise TypeError(f"base must be the name of a file, got {base!r}")
    merged = _read(path.parent / base, (*derived, path.resolve()))
    _merge(merged, tables)
    return merged


def _with_current_names(tables: dict[str, Any]) -> dict[str, Any]:
    """Convert the tables of one file before they are merged with those of another, which may use other names."""
    return {
        table: current_names(TABLES[table], table, values) if table in TABLES and isinstance(values, dict) else values
        for table, values in tables.items()
    }


def _missing_file(path: Path, error: FileNotFoundError) -> str:
    named = Path(str(error.filename))
    return "no such file" if named == path else f"base: {named}: no such file"


def _parse_change(text: str) -> dict[str, Any]:
    name, _, value = text.partition("=")
    try:
        change = tomllib.loads(f"{name} = {value}")
    except ValueError:
        try:
            change = tomllib.loads(f"{name} = {json.dumps(value, ensure_ascii=False)}")  # a shell removes quotes
        except ValueError:
            change = {}
    if not change or not all(isinstance(table, dict) for table in change.values()):
        raise ValueError(f"a change must be TABLE.NAME=VALUE with a value as in TOML, got {text!r}")
    return change


def _merge(tables: dict[str, Any], change: dict[str, Any]) -> None:
    for name, value in change.items():
        if isinstance(value, dict) and isinstance(tables.get(name), dict):
            _merge(tables[name], value)
        else:
            tables[name] = value
