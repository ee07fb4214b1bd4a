"""Loss of a run: SR fidelity, the conditional ELBO of SAVL, and further terms that constrain the degradation field."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from savl.network import SAVL, DegradationField, LikelihoodDecoder
from savl.training.checkpoint import is_in
from savl.training.data import Batch
from savl.training.objective_config import Fidelity, ObjectiveConfig

CALIBRATED_RANGE = 0.3
"""Difference between the prior's variance of 1 and the target for the field where an image is degraded most. In 64
channels it costs 1.8 nats of KL per pixel; the prior would oppose a target nearer to 0."""
ROUNDING = 1.0 / (12.0 * 255.0**2)
"""Mean squared error of rounding to 8 bits, for values in [0, 1]."""
DISTORTION = 0.06
"""Root mean square of y − z at which a pixel counts as degraded by 1 − 1/e; about that of the published pipeline."""
AXIS_SCALES = (1.5, 2.0 / 30.0, 3.2 / 70.0)
"""Length of the mean mu for a blur of one LR pixel, for noise of one 8-bit unit, and for one unit of JPEG quality."""


@dataclass(frozen=True)
class Losses:
    """Terms of the loss of one step, scalars: the weighted sum `total`, and unweighted terms, None where not used."""

    total: Tensor
    sr: Tensor | None = None
    """`fidelity_loss` of the SR image; negative for ``psnr``."""
    reconstruction: Tensor | None = None
    """L_rec: mean over pixels and channels of |y − ŷ| (Laplacian) or (y − ŷ)² (Gaussian); with a learned scale the
    negative log-likelihood, nats per pixel."""
    kl: Tensor | None = None
    """KL(q(r|y) ‖ p(r)), nats per pixel."""
    calibration: Tensor | None = None
    """Mean over pixels of |v − (1 − 0.3 · m)| with m from `visible_degradation`."""
    contrast: Tensor | None = None
    """1 + correlation of v with the degradation mask, mean over the images whose mask varies."""
    content: Tensor | None = None
    """`content_share` of mu."""
    dimensions: Tensor | None = None
    """`concentration` of mu."""
    axes: Tensor | None = None
    """Squared distance of the mean mu from `axis_targets`, mean over the images with a single operation."""
    club: Tensor | None = None
    """CLUB upper bound on I(r; z), nats per pixel."""

    def terms(self) -> dict[str, Tensor]:
        """Return the terms that are used, by name, without gradient."""
        return {name: value.detach() for name, value in vars(self).items() if value is not None}

    def to_log(self) -> dict[str, float]:
        """Return the terms as plain numbers; waits for a GPU."""
        return {name: float(value) for name, value in self.terms().items()}


@dataclass(frozen=True)
class Outcome:
    """Result of one forward pass."""

    losses: Losses
    sr: Tensor | None
    """``(B, 3, H, W)``, not clamped; None if the estimator is trained alone."""
    severity: Tensor | None
    """``(B, h, w)``, or None for a network without a variance."""


class Objective(nn.Module):
    """The loss of SAVL, with the network and the networks that only training needs.

    total = fidelity(sr, x) + alpha · L_rec + beta · (1 + lambda) · KL + weighted calibration, contrast, content and
    CLUB. L_rec and KL are the negative conditional ELBO of SAVL-LM; lambda adds the bound of SAVL-MIS.
    """

    def __init__(self, model: SAVL, config: ObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        self.model = model
        code = model.config.degradation_code
        learned = config.likelihood_scale == "learned"
        self.decoder = LikelihoodDecoder(model.config, learned) if code != "none" and config.alpha > 0 else None
        self.critic = ContentCritic(model.config.latent) if config.club > 0 else None
        if config.train_only:
            trained = [p for name, p in model.named_parameters() if is_in(name, config.train_only)]
            if not trained:
                raise ValueError(f"objective.train_only: the network has no weight in {', '.join(config.train_only)}")
            model.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
        elif config.freeze_network:
            model.requires_grad_(False)
            assert model.estimator is not None
            model.estimator.requires_grad_(True)
        elif model.estimator is not None and (config.freeze_estimator or not self._reads_field(model)):
            model.estimator.requires_grad_(False)

    def _reads_field(self, model: SAVL) -> bool:
        """Return whether any loss depends on the field; DistributedDataParallel does not accept unused parameters."""
        settings = model.config
        variational = settings.degradation_code == "variational"
        guided = settings.channel_modulation or (settings.spatial_modulation and variational)
        calibrated = variational and (self.config.calibration > 0 or self.config.contrast > 0)
        content = self.config.content > 0
        return guided or calibrated or content or self.decoder is not None or self.critic is not None

    def forward(self, batch: Batch, seed: int, step: int) -> Outcome:
        """Compute the loss of one batch.

        Args:
            batch: Images of the step.
            seed: Seed of the reparameterized sample.
            step: Steps done before this one, on which the weight of KL may depend.
        """
        field = self.model.estimate(batch.y, seed=seed)
        if self.config.freeze_network:
            assert field is not None
            total, terms = self.field_losses(field, batch, step)
            return Outcome(Losses(total, **terms), None, field.severity)
        image = self.model.reconstruct(batch.y, field).float()
        sr = fidelity_loss(image, batch.x, self.config.fidelity)
        if field is None:
            return Outcome(Losses(sr, sr), image, None)
        more, terms = self.field_losses(field, batch, step)
        return Outcome(Losses(sr + more, sr, **terms), image, field.severity)

    def field_losses(self, field: DegradationField, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the losses of the degradation field: the conditional ELBO and the further terms of the settings.

        The degradation of real pairs is not known. Calibration, contrast, content, dimensions and axes leave them out,
        and train nothing with a batch of real pairs alone.

        Args:
            field: Field of ``batch.y``, with a sample.
            batch: Images of the step.
            step: Steps done before this one.

        Returns:
            The weighted sum, and its terms unweighted, by the names of `Losses`.

        Raises:
            ValueError: Calibration or contrast is used and the batch has no degradation mask, or content is used and no
                two images share a recipe.
        """
        config = self.config
        total = field.mu.new_zeros((), dtype=torch.float32)
        terms: dict[str, Tensor] = {}
        if self.decoder is not None:
            assert field.sample is not None
            terms["reconstruction"] = self._reconstruction(self.decoder, batch, field.sample)
            total = total + config.alpha * terms["reconstruction"]
            if field.kl is not None:
                terms["kl"] = field.kl.float().mean()
                total = total + prior_weight(config, step) * terms["kl"].clamp(min=config.free_bits)
        if field.variance is not None and (config.calibration > 0 or config.contrast > 0):
            if batch.degradation_mask is None:
                raise ValueError("objective.calibration and contrast need batches with a degradation_mask, got None")
            wanted = 1.0 - CALIBRATED_RANGE * visible_degradation(batch.y, batch.z, batch.degradation_mask)
            distance = (field.variance.float() - wanted).abs().mean(dim=(1, 2))
            terms["calibration"] = _mean_without(distance, batch.real)
            terms["contrast"] = 1.0 + correlation_within(field.variance.float(), batch.degradation_mask)
            total = total + config.calibration * terms["calibration"] + config.contrast * terms["contrast"]
        if config.content > 0 or config.dimensions > 0:
            # Real pairs are left out: the patches of a pair share their scene as well as their degradation, so that
            # the term would reward a field that encodes content.
            mu = field.mu if batch.real is None else field.mu[~batch.real]
            comparable = batch.real is None or mu.shape[0] > batch.images_per_recipe
            nothing = 0.0 * field.mu.float().sum()
            if config.content > 0:
                terms["content"] = content_share(mu, batch.images_per_recipe) if comparable else nothing
                total = total + config.content * terms["content"]
            if config.dimensions > 0:
                terms["dimensions"] = concentration(mu, batch.images_per_recipe) if comparable else nothing
                total = total + config.dimensions * terms["dimensions"]
        if config.axes > 0:
            if batch.amounts is None or batch.degradation_mask is None:
                raise ValueError("objective.axes needs batches with amounts and a degradation_mask, got None")
            known = ~batch.amounts.isnan().any(dim=1, keepdim=True)
            targets = axis_targets(batch.amounts, batch.degradation_mask, field.mu.shape[1])
            distance = torch.where(known, field.mu.float().mean(dim=(2, 3)) - targets, 0.0)
            terms["axes"] = distance.square().sum() / known.sum().clamp(min=1)
            total = total + config.axes * terms["axes"]
        if self.critic is not None:
            terms["club"] = self.critic.bound(field.mu, batch.z)
            # The same backward pass trains the critic q(z | r) on a detached code; the bound does not train it.
            learning = self.critic.log_likelihood(field.mu.detach(), batch.z)
            total = total + config.club * terms["club"] - learning
        return total, terms

    def _reconstruction(self, decoder: LikelihoodDecoder, batch: Batch, sample: Tensor) -> Tensor:
        location, log_scale = decoder(batch.z, sample)
        error: Tensor = batch.y - location.float()
        laplacian = self.config.likelihood == "laplacian"
        if log_scale is None:
            return error.abs().mean() if laplacian else error.square().mean()
        log_scale = log_scale.float()
        if laplacian:
            nats: Tensor = error.abs() * torch.exp(-log_scale) + log_scale + math.log(2.0)
        else:
            nats = 0.5 * error.square() * torch.exp(-2.0 * log_scale) + log_scale + 0.5 * math.log(2.0 * math.pi)
        return nats.sum(dim=1).mean()


def _mean_without(values: Tensor, real: Tensor | None) -> Tensor:
    """Return the mean of ``(B,)`` values over the images that are not real pairs; 0 if all are."""
    if real is None:
        return values.mean()
    mean: Tensor = torch.where(real, 0.0, values).sum() / (~real).sum().clamp(min=1)
    return mean


def prior_weight(settings: ObjectiveConfig, step: int) -> float:
    """Return the weight of KL at a step: beta · (1 + lambda), 0 before ``kl_start``, and less during the warm-up."""
    since = step - settings.kl_start
    if since < 0:
        return 0.0
    warm = min(1.0, since / settings.kl_warmup) if settings.kl_warmup else 1.0
    return warm * settings.beta * (1.0 + settings.suppression)


def fidelity_loss(sr: Tensor, x: Tensor, kind: Fidelity) -> Tensor:
    """Compute the distance of images from their originals.

    Args:
        sr: ``(B, 3, H, W)`` float32, not clamped.
        x: ``(B, 3, H, W)`` in [0, 1].
        kind: ``l1``: mean absolute error. ``l2``: mean squared error. ``psnr``: minus the PSNR divided by 100 dB, mean
            over images, in which errors below that of rounding to 8 bits (59 dB) count little.

    Returns:
        A scalar.
    """
    if kind == "l1":
        return F.l1_loss(sr, x)
    error = (sr - x).square().mean(dim=(1, 2, 3))
    return error.mean() if kind == "l2" else 0.1 * (error + ROUNDING).log10().mean()


def visible_degradation(y: Tensor, z: Tensor, degradation_mask: Tensor) -> Tensor:
    """Return how strongly each pixel was visibly degraded.

    The degradation mask says how much of an image's own recipe reached each pixel. A weak recipe at full strength looks
    like a strong recipe at a tenth, and a field trained to distinguish them learns little. So the mask is scaled by the
    distance of y from z: 1 − exp(−d · mask / 0.06), where d is the root mean square of y − z divided by that of the
    mask, one number per image.

    Args:
        y: ``(B, 3, h, w)`` degraded images.
        z: ``(B, 3, h, w)`` clean images.
        degradation_mask: ``(B, h, w)`` in [0, 1].

    Returns:
        ``(B, h, w)`` in [0, 1), monotonic in the mask within each image.
    """
    error = (y - z).square().mean(dim=(1, 2, 3))
    share = degradation_mask.square().mean(dim=(1, 2)).clamp(min=1e-3)
    distortion = (error / share).sqrt()[:, None, None]
    return 1.0 - torch.exp(-distortion * degradation_mask / DISTORTION)


def content_share(mu: Tensor, images_per_recipe: int) -> Tensor:
    """Return the share of the variation between images that is not explained by their recipes.

    The feature of an image is the spatial mean of mu. With S_t the covariance of the features of all images, S_w that
    within recipes, and n recipes, the share is 1 − tr[(S_t + ε·I)⁻¹ (S_t − S_w)] / (n − 1), where ε is a tenth of the
    mean variance of a channel. (For n > R, R stands in place of n − 1.) The inverse gives every direction of the
    feature space the same weight, so that a field that encodes the recipe in one direction only has a large share. It
    is 0 if the recipe determines the feature in as many directions as there are recipes less one, apart from ε, and
    near 1 if it does not affect it. Images of one recipe differ in content, and in the noise drawn, which hardly
    affects a mean over many pixels.

    Args:
        mu: ``(B, R, h, w)``.
        images_per_recipe: Number of consecutive images that share a recipe; a divisor of B, smaller than B.

    Returns:
        A scalar.

    Raises:
        ValueError: No two images share a recipe, or all do.
    """
    by_recipe = _features_by_recipe("content", mu, images_per_recipe)
    recipes = by_recipe.shape[0]
    within = by_recipe - by_recipe.mean(dim=1, keepdim=True)
    total = by_recipe - by_recipe.mean(dim=(0, 1))
    s_w = torch.einsum("rni,rnj->ij", within, within) / (recipes * (images_per_recipe - 1))
    s_t = torch.einsum("rni,rnj->ij", total, total) / (recipes * images_per_recipe - 1)
    ridge = 0.1 * s_t.diagonal().mean() + 1e-6
    identity = torch.eye(s_t.shape[0], device=s_t.device, dtype=s_t.dtype)
    explained = torch.linalg.solve(s_t + ridge * identity, s_t - s_w).diagonal().sum()
    share: Tensor = 1.0 - explained / min(recipes - 1, s_t.shape[0])
    return share


def concentration(mu: Tensor, images_per_recipe: int) -> Tensor:
    """Return 1 / the participation ratio of the recipes' features: ‖C‖² / tr(C)².

    C is the covariance between recipes of the spatial mean of mu. It is estimated without the contribution of content,
    as the symmetrised cross-covariance of the averages over two halves of each recipe's images.

    Args:
        mu: ``(B, R, h, w)``.
        images_per_recipe: Number of consecutive images that share a recipe; even, a divisor of B, smaller than B.

    Returns:
        A scalar: 1 if the recipes differ in one direction only, 1/n if they differ equally in n orthogonal directions.

    Raises:
        ValueError: No two images share a recipe, or all do, or ``images_per_recipe`` is odd.
    """
    if images_per_recipe % 2:
        raise ValueError(f"objective.dimensions needs an even images_per_recipe, got {images_per_recipe!r}")
    by_recipe = _features_by_recipe("dimensions", mu, images_per_recipe)
    first, second = (half.mean(dim=1) for half in by_recipe.chunk(2, dim=1))
    cross = (first - first.mean(dim=0)).T @ (second - second.mean(dim=0)) / (by_recipe.shape[0] - 1)
    covariance = 0.5 * (cross + cross.T)
    ratio: Tensor = covariance.square().sum() / covariance.diagonal().sum().square().clamp(min=1e-6)
    return ratio


def axis_targets(amounts: Tensor, degradation_mask: Tensor, latent: int) -> Tensor:
    """Return the targets of the mean mu in `ObjectiveConfig.axes` for images with a single operation.

    The channels form three groups, one for each of blur, noise and JPEG; a group's unit vector has the same value in
    all of its channels. The target lies on the axis of the operation, at a distance that grows with its amount.

    Args:
        amounts: ``(B, 3)``: blur in LR pixels, noise in 8-bit units and 100 minus the JPEG quality.
        degradation_mask: ``(B, h, w)`` in [0, 1]; its mean scales the amounts.
        latent: Number of channels R, at least 3.

    Returns:
        ``(B, R)`` float32.
    """
    distance = amounts * amounts.new_tensor(AXIS_SCALES) * degradation_mask.mean(dim=(1, 2))[:, None]
    group = torch.arange(latent, device=amounts.device) * 3 // latent
    size = torch.bincount(group, minlength=3).to(distance.dtype)
    targets: Tensor = (distance / size.sqrt())[:, group]
    return targets


def _features_by_recipe(term: str, mu: Tensor, images_per_recipe: int) -> Tensor:
    """Return the spatial means of mu as ``(recipes, images_per_recipe, R)`` float32."""
    if not 2 <= images_per_recipe < mu.shape[0] or mu.shape[0] % images_per_recipe:
        raise ValueError(
            f"objective.{term} needs batches in which several recipes have several images each, got {mu.shape[0]} "
            f"images, images_per_recipe={images_per_recipe!r}"
        )
    features: Tensor = mu.float().mean(dim=(2, 3)).unflatten(0, (-1, images_per_recipe))
    return features


def correlation_within(v: Tensor, degradation_mask: Tensor) -> Tensor:
    """Return the Pearson correlation of two maps within an image, mean over the images whose mask varies.

    Args:
        v: ``(B, h, w)`` floating.
        degradation_mask: ``(B, h, w)`` in [0, 1]; it varies if its standard deviation is above 0.01.

    Returns:
        A scalar in [-1, 1]; 0 if no mask varies.
    """
    a, b = (each.flatten(1) - each.flatten(1).mean(dim=1, keepdim=True) for each in (v, degradation_mask))
    varies = (b.square().mean(dim=1) > 1e-4).to(a.dtype)
    cosine = F.cosine_similarity(a, b, dim=1, eps=1e-6)
    return (cosine * varies).sum() / varies.sum().clamp(min=1.0)


class ContentCritic(nn.Module):
    """q(z | r) of CLUB (Cheng et al., 2020): a Gaussian over the content code of a pixel given r at that pixel."""

    def __init__(self, latent: int, hidden: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(latent, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, hidden, 1), nn.ReLU())
        self.mean = nn.Conv2d(hidden, 3, 1)
        self.logvar = nn.Conv2d(hidden, 3, 1)

    def log_likelihood(self, r: Tensor, z: Tensor) -> Tensor:
        """Return the mean of log q(z | r) over pixels in nats, up to a constant.

        Args:
            r: ``(B, R, h, w)``.
            z: ``(B, 3, h, w)``.
        """
        mean, logvar = self._gaussian(r)
        return (-0.5 * (z - mean).square() / logvar.exp() - 0.5 * logvar).sum(dim=1).mean()

    def bound(self, r: Tensor, z: Tensor) -> Tensor:
        """Return the upper bound on I(r; z) in nats per pixel, with gradients for r only.

        It compares matched pairs with pairs that are shifted by one image of the batch.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            mean, logvar = self._gaussian(r)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
        other = z.roll(1, dims=0) if z.shape[0] > 1 else z.flip(-1)
        matched = (z - mean).square()
        shuffled = (other - mean).square()
        return (0.5 * (shuffled - matched) / logvar.exp()).sum(dim=1).mean()

    def _gaussian(self, r: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(r)
        return self.mean(hidden).float(), torch.tanh(self.logvar(hidden).float())
