"""Settings of a training run: one TOML file, one frozen dataclass a table."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from savl.degradation.config import DegradationConfig
from savl.network import CONFIGS, SAVLConfig
from savl.settings import check_types, checked_table, from_table
from savl.training.adversarial import AdversarialLoss

Likelihood = Literal["laplacian", "gaussian"]
LikelihoodScale = Literal["fixed", "learned"]
Method = Literal["adam", "muon"]
Fidelity = Literal["l1", "l2", "psnr"]
Schedule = Literal["cosine", "multistep"]
Place = Literal["auto", "cpu"]


def _at_least(low: float, table: str, settings: object, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) >= low:
            raise ValueError(f"{table}.{name} must be at least {low:g}, got {getattr(settings, name)!r}")


def _positive(table: str, settings: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"{table}.{name} must be above 0 and finite, got {getattr(settings, name)!r}")


def _one_of(table: str, settings: object, name: str, accepted: object) -> None:
    if getattr(settings, name) not in get_args(accepted):
        raise ValueError(f"{table}.{name} must be one of {get_args(accepted)}, got {getattr(settings, name)!r}")


@dataclass(frozen=True)
class DataConfig:
    """What to learn from."""

    hr: tuple[str, ...] = ()
    """Folders of high-resolution images, searched recursively."""
    cache: str = ""
    """Folder that keeps these images decoded, 3 bytes a pixel, for all processes of a machine to share and for the next
    run to begin at once. If left out, each process keeps a copy in its memory."""
    patch: int = 32
    """Side of the LR patches in pixels; HR patches are ``scale`` times that."""
    batch: int = 16
    """Patches per step and process."""
    margin: int = 4
    """LR pixels that are degraded around a patch and cut off again, at a place drawn anew for every patch: borders of
    filters stay outside, and the grid of JPEG blocks starts anywhere."""
    pool: int = 180
    """Degraded pairs kept to draw batches from. Images degraded together share their resizes; a pool mixes them."""
    fresh: int = 4
    """Pairs degraded for every step, which replace the oldest in the pool: with ``batch`` patches a step, each pair is
    learned from about batch / fresh times, turned and mirrored differently."""
    alike: int = 1
    """So many images share one recipe and one mask, and come in a batch together: ``objective.content`` compares them.
    ``batch`` and ``fresh`` are multiples of it."""
    workers: int = 0
    """Processes, of each process that trains, that degrade images ahead of time. 0: a thread of its own does. A small
    network on a GPU learns faster than one thread can degrade. Needs ``cache``, whose images they share. They
    import a script that trains anew, which must do so under ``if __name__ == "__main__":`` alone."""
    degrade_on: Place = "auto"
    """``auto``: where the network is trained; ``cpu``: beside it. The same recipes, but other noise on a GPU."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        _at_least(1, "data", self, "patch", "batch", "fresh", "alike")
        _at_least(0, "data", self, "margin", "workers")
        _one_of("data", self, "degrade_on", Place)
        if self.workers and not self.cache:
            raise ValueError("data.workers needs data.cache: without it each of them would decode all images")
        if self.pool < max(self.batch, self.fresh):
            raise ValueError(
                f"data.pool must hold at least a batch of {self.batch} and the {self.fresh} fresh pairs of a step, "
                f"got {self.pool!r}"
            )
        if self.batch % self.alike or self.fresh % self.alike:
            raise ValueError(f"data.alike must divide batch={self.batch} and fresh={self.fresh}, got {self.alike!r}")


@dataclass(frozen=True)
class ValidationConfig:
    """What the averaged weights are scored on while they are trained; nothing by default."""

    hr: str = ""
    """Folder of high-resolution images; none for no validation."""
    lr: str = ""
    """Folder of their low-resolution counterparts, by name; if left out, they are made by the run's degradation."""
    every: int = 1000
    """Steps between validations."""
    images: int = 10
    """At most so many images, the first by name."""
    side: int = 512
    """Larger images are cut to so many HR pixels around their centre."""

    def __post_init__(self) -> None:
        check_types(self, "validation.")
        _at_least(1, "validation", self, "every", "images")
        if self.lr and not self.hr:
            raise ValueError("validation.lr needs validation.hr, the originals to compare with")
        _at_least(32, "validation", self, "side")  # what SSIM needs at the largest scale


@dataclass(frozen=True)
class ObjectiveConfig:
    """SR loss + alpha · L_rec + beta · (1 + suppression) · KL, and what else may be asked of the field."""

    fidelity: Fidelity = "l1"
    """Distance of the SR image from its original. ``l1``: mean absolute error, which trains steadily and is the
    paper's. ``l2``: mean squared error; of all images that an input may have come from it asks for the mean, where
    ``l1`` asks for the median. ``psnr``: minus the PSNR of each image over 100 dB, mean over images: a tenth less error
    counts alike in an easy image and in a hopeless one. Its gradient is as large as that of L1 where an image stands at
    21 dB, and twice as large for every 6 dB more."""
    alpha: float = 1.0
    """Weight of the reconstruction of y by the likelihood decoder (mean over pixels and channels). 0 trains neither
    decoder nor field prior."""
    beta: float = 1e-3
    """Weight of KL(q(r|y) ‖ p(r)), mean over pixels, in nats, that the conditional ELBO asks for."""
    suppression: float = 0.0
    """Lambda of SAVL-MIS: how much more of that divergence the bound on I(r; z) adds."""
    likelihood: Likelihood = "laplacian"
    """``laplacian`` makes L_rec an L1 norm, ``gaussian`` an L2 norm (squared)."""
    scale: LikelihoodScale = "fixed"
    """``fixed``: L_rec is the norm, mean over pixels and channels, its weight standing for the scale of the
    likelihood. ``learned``: the decoder infers the scale of every pixel, and L_rec is the negative log-likelihood in
    nats per pixel, to be weighed like the divergence: alpha = beta is the exact ELBO."""
    kl_start: int = 0
    """Steps at the beginning without the divergence. A prior that weighs in before the decoder has learned to read r
    makes the field collapse to it."""
    kl_warmup: int = 0
    """Steps over which beta then grows from 0."""
    free_bits: float = 0.0
    """Nats per pixel that cost nothing: KL below it has no gradient (Kingma et al., 2016)."""
    calibration: float = 0.0
    """Weight of |v − (1 − 0.3 · m)|, mean over pixels, which ties the variance of the field to what is known of the
    degradation that was applied: the prior's where there is none, 0.7 where there is most. m is the known severity
    scaled by what came of it (`savl.training.objectives.visible_severity`). Not in the paper."""
    contrast: float = 0.0
    """Weight of 1 + correlation of v with the known severity over the pixels of an image, mean over the images within
    which that varies: every mask counts alike, however gentle the recipe it let through. Not in the paper."""
    club: float = 0.0
    """Weight of the CLUB upper bound on I(r; z), for the ablation 'deterministic code + CLUB'."""
    content: float = 0.0
    """Weight of the share of content: the variance of the images' mean mu among images of one recipe over that among
    all, mean over channels (`savl.training.objectives.content_share`). What one recipe leaves in several photographs
    should look alike in the field, and nothing in the ELBO says so. Needs ``data.alike`` of at least 2. Not in the
    paper."""
    freeze_estimator: bool = False
    """Stages 2 and 3: train the network on a field that stays as it is. Needs ``run.start``."""
    freeze_network: bool = False
    """Train the estimator alone, by all that is asked of the field; no SR image is made. Cheap, so that batches may be
    large, and no SR loss asks the field for content. The network is then guided by another field than it has learned
    from, so what a validation says of its images says little. Needs ``run.start``."""

    def __post_init__(self) -> None:
        check_types(self, "objective.")
        _at_least(0, "objective", self, "alpha", "beta", "suppression", "calibration", "contrast", "club", "content")
        _at_least(0, "objective", self, "kl_start", "kl_warmup", "free_bits")
        _one_of("objective", self, "fidelity", Fidelity)
        _one_of("objective", self, "likelihood", Likelihood)
        _one_of("objective", self, "scale", LikelihoodScale)
        if self.freeze_estimator:
            if training := self.asked_of_field():
                given = ", ".join(f"objective.{name} = {getattr(self, name)!r}" for name in training)
                raise ValueError(
                    f"objective.freeze_estimator forbids what trains the estimator: set it to 0, got {given}"
                )
            if self.freeze_network:
                raise ValueError("objective.freeze_estimator and freeze_network together leave nothing to train")
        if self.freeze_network and not self.asked_of_field():
            raise ValueError(
                "objective.freeze_network needs something that trains the estimator: alpha, club, calibration, "
                "contrast and content are all 0"
            )

    def asked_of_field(self) -> list[str]:
        """Names of the weights above 0 by which something is asked of the field, so that the estimator is trained."""
        return [name for name in ("alpha", "club", "calibration", "contrast", "content") if getattr(self, name) > 0]


@dataclass(frozen=True)
class GanConfig:
    """Stage 3: a discriminator and perceptual distance beside L1."""

    weight: float = 0.0
    """Weight of the adversarial loss; 0 trains without a discriminator."""
    loss: AdversarialLoss = "vanilla"
    """``vanilla``, or ``relativistic`` average."""
    features: int = 64
    """Channels of the U-Net discriminator's first layer."""
    learning_rate: float = 1e-4
    """Of the discriminator."""
    perceptual: float = 0.0
    """Weight of the L1 distance of VGG-19 features; needs torchvision and its weights."""

    def __post_init__(self) -> None:
        check_types(self, "gan.")
        _at_least(0, "gan", self, "weight", "perceptual")
        _at_least(1, "gan", self, "features")
        _one_of("gan", self, "loss", AdversarialLoss)
        _positive("gan", self, "learning_rate")


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam or Muon under a warm-up, then half a cosine or steps."""

    method: Method = "adam"
    """``adam``, the paper's; ``muon``: the matrices inside the network move along orthogonalised momentum, all other
    weights as with Adam (`savl.training.muon`)."""
    learning_rate: float = 1e-3
    """Peak learning rate. Muon's updates are as large as Adam's, so that one rate does for both."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's moment decays."""
    momentum: float = 0.95
    """Share of its momentum that Muon keeps at a step."""
    warmup: int = 200
    """Steps of linear warm-up."""
    schedule: Schedule = "cosine"
    """``cosine`` falls to ``final_fraction`` at the last step, ``multistep`` by ``gamma`` at each milestone."""
    final_fraction: float = 0.01
    """Learning rate of the last step as a fraction of the peak, for ``cosine``."""
    milestones: tuple[int, ...] = (5_000, 7_500, 9_000)
    """Steps, for ``multistep``."""
    gamma: float = 0.5
    """Factor at each milestone."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones exported."""

    def __post_init__(self) -> None:
        check_types(self, "optimizer.")
        _at_least(0, "optimizer", self, "warmup", "final_fraction")
        _one_of("optimizer", self, "method", Method)
        _one_of("optimizer", self, "schedule", Schedule)
        _positive("optimizer", self, "learning_rate", "clip", "gamma")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1), got {self.betas!r}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"optimizer.momentum must satisfy 0 <= momentum < 1, got {self.momentum!r}")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"optimizer.ema must satisfy 0 <= ema < 1, got {self.ema!r}")
        if not self.milestones or min(self.milestones) < 1:
            raise ValueError(f"optimizer.milestones must be steps of at least 1, got {self.milestones!r}")


@dataclass(frozen=True)
class RunConfig:
    """How long, from where, and where to."""

    steps: int = 10_000
    """Optimizer steps."""
    minutes: float = 0.0
    """0: ``steps`` alone say when the run ends. Above 0 it ends after so many minutes of training or after ``steps``,
    whichever comes first, and the cosine of the learning rate ends then: where in it a step is follows from the time
    passed and the time that steps have taken; the warm-up is counted in steps all the same. Validation, checkpoints and
    records are part of the time, as are the minutes before a run was resumed; decoding, compiling and filling the pool
    are not, nor is what is written once the time is over. Such a run does not repeat itself bit for bit."""
    seed: int = 0
    """Everything random in a run follows from it, the step number and the rank of the process."""
    start: str = ""
    """Weights to begin from, shipped ones or a file, of the network in ``[model]``. Settings that no weight depends on
    may differ (``cab_neighbourhood``, ``drop_path``, ``spatial_modulation``, the decoder's), and those of parts that
    are ``fresh``. Random weights if left out."""
    fresh: tuple[str, ...] = ()
    """Parts that begin anew all the same, each the name of a module or the beginning of one: ``["estimator."]``, or
    ``["guidance."]`` for what every DSCA reads from the field."""
    checkpoint_every: int = 250
    """Steps between checkpoints: what a kill can cost at most."""
    log_every: int = 25
    """Steps between lines of the log."""
    images_every: int = 500
    """Steps between pictures in TensorBoard."""
    output: str = "runs/savl"
    """Folder for checkpoint, logs and exported weights."""
    device: Place = "auto"
    """``auto``: a GPU where there is one; ``cpu``."""
    bfloat16: bool = False
    """Compute in bfloat16 under autocast (weights stay float32)."""
    fused: bool = False
    """Compute with fused kernels where they serve."""
    compile: bool = False
    """Compile the network with torch.compile."""
    graph: bool = False
    """On a GPU, record the network's passes forward and backward once and replay them as CUDA graphs: the CPU cannot
    launch the many small kernels of a small network as fast as they run. One process alone; with ``compile``, the
    compiled passes are recorded."""

    def __post_init__(self) -> None:
        check_types(self, "run.")
        _at_least(1, "run", self, "steps", "checkpoint_every", "log_every", "images_every")
        if not 0 <= self.minutes < math.inf:
            raise ValueError(f"run.minutes must be at least 0 and finite, got {self.minutes!r}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"run.seed must satisfy 0 <= seed < 2**31, got {self.seed!r}")
        _one_of("run", self, "device", Place)


@dataclass(frozen=True)
class TrainingConfig:
    """A whole run."""

    model: SAVLConfig = CONFIGS["savl-tiny"]
    data: DataConfig = field(default_factory=DataConfig)
    degradation: DegradationConfig = field(default_factory=DegradationConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    gan: GanConfig = field(default_factory=GanConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        code = self.model.degradation_code
        if self.objective.club > 0 and code != "deterministic":
            raise ValueError(f"objective.club regularises a deterministic code; model.degradation_code is {code!r}")
        for name in ("freeze_estimator", "freeze_network", "content"):
            if getattr(self.objective, name) and code == "none":
                raise ValueError(f"objective.{name}: the model has no estimator (degradation_code is 'none')")
        asked = set(self.objective.asked_of_field())
        if self.objective.freeze_network and code == "deterministic" and asked <= {"calibration", "contrast"}:
            raise ValueError(
                "objective.freeze_network: a deterministic code has no variance that calibration or contrast could "
                "train; set objective.alpha, club or content"
            )
        if self.objective.content > 0 and not 2 <= self.data.alike < self.data.batch:
            raise ValueError(
                f"objective.content compares images of one recipe with those of others: data.alike must be at least 2 "
                f"and below data.batch={self.data.batch}, got {self.data.alike!r}"
            )
        if self.run.fresh and not self.run.start:
            raise ValueError("run.fresh needs run.start: without weights to start from everything begins at random")
        anew = any(part.startswith("estimator") or "estimator.".startswith(part) for part in self.run.fresh)
        if self.objective.freeze_estimator and (not self.run.start or anew):
            raise ValueError(
                "objective.freeze_estimator needs run.start, and an estimator that is not in run.fresh: a random one "
                "would stay random"
            )
        if self.objective.freeze_network and not self.run.start:
            raise ValueError("objective.freeze_network needs run.start: a random network would stay random")
        if self.objective.freeze_network and self.optimizer.method == "muon":
            raise ValueError(
                "objective.freeze_network keeps the matrices that optimizer.method = 'muon' is for: set it to 'adam'"
            )
        if self.objective.freeze_network and (self.gan.weight > 0 or self.gan.perceptual > 0):
            raise ValueError("objective.freeze_network makes no SR image that gan.weight or gan.perceptual could judge")
        if self.run.minutes > 0 and self.optimizer.schedule != "cosine":
            raise ValueError(
                f"run.minutes needs optimizer.schedule = 'cosine', got {self.optimizer.schedule!r}: milestones are "
                f"steps, and how many there will be is not known"
            )
        side = self.data.patch * self.model.scale
        if self.gan.perceptual > 0 and side < 16:
            raise ValueError(f"gan.perceptual needs HR patches of at least 16 pixels, got {side}")
        if self.gan.weight > 0 and self.data.patch * self.model.scale % 8:
            raise ValueError(
                f"gan: the discriminator needs HR patches with sides that are multiples of 8 pixels, got "
                f"data.patch={self.data.patch} at scale {self.model.scale}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return asdict(self)


TABLES: dict[str, type[Any]] = {
    "data": DataConfig,
    "degradation": DegradationConfig,
    "objective": ObjectiveConfig,
    "gan": GanConfig,
    "optimizer": OptimizerConfig,
    "validation": ValidationConfig,
    "run": RunConfig,
}


def parse_config(tables: dict[str, Any]) -> TrainingConfig:
    """Build a `TrainingConfig` from nested tables as TOML gives them.

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

    A file may begin with ``base = "OTHER.toml"``, a path from where it lies: it then holds what differs from that one.

    Args:
        path: The file.
        changes: Settings that take the place of its own, each as ``"table.name=value"`` with the value as in TOML.

    Raises:
        FileNotFoundError: There is no such file, or none that it is based on.
        ValueError: It is not TOML, is based on itself, or `parse_config` refuses it; the message begins with the path.
            Or a change cannot be read.
    """
    parsed = [_parse_change(change) for change in changes]
    try:
        tables = _read(Path(path))
        for change in parsed:
            _merge(tables, change)
        return parse_config(tables)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {_missing(Path(path), error)}") from error
    except (ValueError, TypeError) as error:  # TOMLDecodeError is a ValueError
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tables of a file, over those of the file that its ``base`` names."""
    if path.resolve() in above:
        raise ValueError(f"base: {path} is based on itself")
    with open(path, "rb") as file:
        tables = tomllib.load(file)
    if "base" not in tables:
        return tables
    base = tables.pop("base")
    if not isinstance(base, str):
        raise TypeError(f"base must be the name of a file, got {base!r}")
    whole = _read(path.parent / base, (*above, path.resolve()))
    _merge(whole, tables)
    return whole


def _missing(path: Path, error: FileNotFoundError) -> str:
    named = Path(str(error.filename))
    return "no such file" if named == path else f"base: {named}: no such file"


def _parse_change(text: str) -> dict[str, Any]:
    name, _, value = text.partition("=")
    try:
        change = tomllib.loads(f"{name} = {value}")
    except ValueError:
        try:
            change = tomllib.loads(f"{name} = {json.dumps(value, ensure_ascii=False)}")  # what a shell leaves of "text"
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
