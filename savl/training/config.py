"""Settings of a training run: one TOML file, one frozen dataclass a table."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from savl.degradation import LightDegradation
from savl.network import CONFIGS, SAVLConfig
from savl.settings import check_types

Likelihood = Literal["laplacian", "gaussian"]


@dataclass(frozen=True)
class DataConfig:
    """What to learn from."""

    hr: tuple[str, ...] = ()
    """Folders of high-resolution images, searched recursively."""
    patch: int = 32
    """Side of the LR patches in pixels; HR patches are ``scale`` times that."""
    batch: int = 16
    """Patches per step."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        _at_least(1, "data", self, "patch", "batch")


@dataclass(frozen=True)
class ObjectiveConfig:
    """SR L1 + alpha · L_rec + beta · KL, or + club · CLUB for a deterministic code."""

    alpha: float = 1.0
    """Weight of the reconstruction of y by the likelihood decoder (mean over pixels and channels). 0 trains neither
    decoder nor field prior."""
    beta: float = 1e-3
    """Weight of KL(q(r|y) ‖ p(r)) in nats per pixel; the (1 + λ) of SAVL-MIS is part of it."""
    likelihood: Likelihood = "laplacian"
    """``laplacian`` makes L_rec an L1 norm, ``gaussian`` an L2 norm (squared)."""
    club: float = 0.0
    """Weight of the CLUB upper bound on I(r; z), for the ablation 'deterministic code + CLUB'."""

    def __post_init__(self) -> None:
        check_types(self, "objective.")
        _at_least(0, "objective", self, "alpha", "beta", "club")
        if self.likelihood not in ("laplacian", "gaussian"):
            raise ValueError(f"objective.likelihood must be 'laplacian' or 'gaussian', got {self.likelihood!r}")


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam under a warm-up and half a cosine."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's moment decays."""
    warmup: int = 200
    """Steps of linear warm-up."""
    final_fraction: float = 0.01
    """Learning rate of the last step as a fraction of the peak."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones exported."""

    def __post_init__(self) -> None:
        check_types(self, "optimizer.")
        _at_least(0, "optimizer", self, "warmup", "final_fraction")
        for name in ("learning_rate", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optimizer.{name} must be above 0, got {getattr(self, name)!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1), got {self.betas!r}")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"optimizer.ema must satisfy 0 <= ema < 1, got {self.ema!r}")


@dataclass(frozen=True)
class RunConfig:
    """How long, from which seed, and where to."""

    steps: int = 10_000
    """Optimizer steps."""
    seed: int = 0
    """Everything random in a run follows from it and the step number."""
    checkpoint_every: int = 250
    """Steps between checkpoints: what a kill can cost at most."""
    log_every: int = 25
    """Steps between lines of the log."""
    output: str = "runs/savl"
    """Folder for checkpoint, log and exported weights."""
    bfloat16: bool = False
    """Compute in bfloat16 under autocast (weights stay float32)."""

    def __post_init__(self) -> None:
        check_types(self, "run.")
        _at_least(1, "run", self, "steps", "checkpoint_every", "log_every")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"run.seed must satisfy 0 <= seed < 2**31, got {self.seed!r}")


def _at_least(low: int, table: str, settings: object, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < low:
            raise ValueError(f"{table}.{name} must be at least {low}, got {getattr(settings, name)!r}")


@dataclass(frozen=True)
class TrainingConfig:
    """A whole run."""

    model: SAVLConfig = CONFIGS["savl-tiny"]
    data: DataConfig = field(default_factory=DataConfig)
    degradation: LightDegradation = field(default_factory=LightDegradation)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        code = self.model.degradation_code
        if self.objective.club > 0 and code != "deterministic":
            raise ValueError(f"objective.club regularises a deterministic code; model.degradation_code is {code!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return asdict(self)


T = TypeVar("T")


def _checked_table(name: str, values: object) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"[{name}] must be a table of settings, got {values!r}")
    return dict(values)


def _table(cls: type[T], name: str, values: object) -> T:
    values = _checked_table(name, values)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"[{name}] has unknown settings {unknown}; it accepts {sorted(known)}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def parse_config(tables: dict[str, Any]) -> TrainingConfig:
    """Build a `TrainingConfig` from nested tables as TOML gives them.

    ``[model]`` may name a configuration (``name = "savl-tiny"``) and override settings of it.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A table or setting is unknown, or a value is out of range.
    """
    tables = dict(tables)
    model = _checked_table("model", tables.pop("model", {}))
    name = model.pop("name", "savl-tiny")
    if name not in CONFIGS:
        raise ValueError(f"model.name must be one of {sorted(CONFIGS)}, got {name!r}")
    parts: dict[str, Any] = {"model": SAVLConfig.from_dict({**CONFIGS[name].to_dict(), **model})}
    classes: dict[str, type[Any]] = {
        "data": DataConfig,
        "degradation": LightDegradation,
        "objective": ObjectiveConfig,
        "optimizer": OptimizerConfig,
        "run": RunConfig,
    }
    for table, values in tables.items():
        if table not in classes:
            raise ValueError(f"unknown table [{table}]; a training configuration has {['model', *classes]}")
        parts[table] = _table(classes[table], table, values)
    return TrainingConfig(**parts)


def load_config(path: str | Path) -> TrainingConfig:
    """Read a TOML file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not TOML, or `parse_config` refuses it; the message begins with the path.
    """
    try:
        with open(path, "rb") as file:
            return parse_config(tomllib.load(file))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except (ValueError, TypeError) as error:  # TOMLDecodeError is a ValueError
        raise ValueError(f"{path}: {error}") from error
