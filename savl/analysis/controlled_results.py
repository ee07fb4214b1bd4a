"""Results of one network on controlled images: probes, information, correlations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from savl.analysis.channels import ChannelResponse
from savl.analysis.controlled import ControlledFeatures, DegradedFeatures
from savl.analysis.full_pipeline import MaskAgreement, Restoration
from savl.evaluation.club import club
from savl.evaluation.geometry import ClassMeanGeometry, class_mean_geometry
from savl.evaluation.held_out import FEWEST_GROUPS
from savl.evaluation.hsic import HSICResult, hsic
from savl.evaluation.intervals import Correlation, Interval, spearman
from savl.evaluation.mine import mine
from savl.evaluation.probe import ProbeResult, linear_probe


@dataclass(frozen=True)
class DegradationResult:
    """Results for one degradation at all its levels."""

    name: str
    title: str
    unit: str
    levels: tuple[str, ...]
    level: ProbeResult
    """Probe of the level; whole scenes are held out."""
    scene: ProbeResult
    """Probe of the scene; every scene and every crop is in both splits, at different levels."""
    severity: Correlation | None
    """Correlation of the images' severity with the amount; None for a deterministic code or a constant severity."""
    severity_by_level: tuple[float, ...] | None
    """Mean severity at every level; None for a deterministic code."""
    kl_by_level: tuple[float, ...] | None
    """Mean KL divergence at every level, in nats per pixel; None for a deterministic code."""


@dataclass(frozen=True)
class Information:
    """Information of the feature about a variable, by three estimators."""

    mine: Interval
    """Lower bound in nats."""
    club: Interval | None
    """Upper bound in nats, provided that its Gaussian fits; None for labels, for which it does not."""
    hsic: HSICResult
    held_out: str
    """``scene`` or ``crop``: the unit that is either fitted or measured, never both."""


@dataclass(frozen=True)
class ControlledResults:
    """All results that require photographs. The field names are the keys of the JSON report."""

    variations: tuple[DegradationResult, ...]
    kind: ProbeResult
    """Probe of the kind (noise, blur or JPEG) at any level but the clean one; whole scenes are held out."""
    geometry: ClassMeanGeometry
    """Directions in which noise, blur and JPEG move the feature."""
    content: Information
    """Information about the content of the clean crop."""
    degradation: Information
    """Information about the level of the noise."""
    channels: tuple[ChannelResponse, ...]
    agreement: MaskAgreement | None
    """None for a deterministic code."""
    restoration: Restoration


def degradation_result(data: DegradedFeatures, model: int, *, repeats: int, seed: int) -> DegradationResult:
    """Probe the features for the level and for the scene, and correlate the severity with the amount.

    Args:
        data: Features of the images.
        model: Position of the network in the features.
        repeats: Number of repeats of the probes.
        seed: Seed of probes and bootstrap.
    """
    features = data.features[model]
    severity = features.severity

    def by_level(values: NDArray[np.float32] | None) -> tuple[float, ...] | None:
        if values is None:
            return None
        levels = range(len(data.degradation.amounts))
        return tuple(float(values[data.level == level].mean(dtype=np.float64)) for level in levels)

    constant = severity is None or severity.min() == severity.max()
    return DegradationResult(
        data.degradation.name,
        data.degradation.title,
        data.degradation.unit,
        data.degradation.labels,
        level=linear_probe(features.mean, data.level, groups=data.scene, repeats=repeats, seed=seed),
        scene=linear_probe(features.mean, data.scene, repeats=repeats, seed=seed),
        severity=None
        if severity is None or constant
        else spearman(severity, data.amounts, groups=data.scene, seed=seed),
        severity_by_level=by_level(severity),
        kl_by_level=by_level(features.kl),
    )


def probe_kind(data: Sequence[DegradedFeatures], model: int, *, repeats: int, seed: int) -> ProbeResult:
    """Probe the features of all degraded images for the kind of degradation; whole scenes are held out."""
    degraded = [(each, np.flatnonzero(each.level > 0)) for each in data]
    features = np.concatenate([each.features[model].mean[rows] for each, rows in degraded])
    kinds = [each.degradation.name for each, rows in degraded for _ in rows]
    scenes = np.concatenate([each.scene[rows] for each, rows in degraded])
    return linear_probe(features, kinds, groups=scenes, repeats=repeats, seed=seed)


def class_means(data: Sequence[DegradedFeatures], model: int) -> NDArray[np.float64]:
    """Return the mean feature of every degradation and level over all crops of all scenes.

    Args:
        data: Features of the images; all degradations have the same number of levels.
        model: Position of the network in the features.

    Returns:
        ``(K, L, R)`` for K degradations, L levels and R channels.
    """

    def of_levels(each: DegradedFeatures) -> list[NDArray[np.float64]]:
        levels = range(len(each.degradation.amounts))
        return [each.features[model].mean[each.level == level].mean(axis=0, dtype=np.float64) for level in levels]

    return np.asarray([of_levels(each) for each in data])


def degradation_geometry(data: Sequence[DegradedFeatures], model: int) -> ClassMeanGeometry:
    """Compute the geometry of the mean features of all degradations at all their levels."""
    return class_mean_geometry(class_means(data, model), [each.degradation.name for each in data])


def content_information(data: ControlledFeatures, model: int, *, repeats: int, seed: int) -> Information:
    """Estimate the information of noisy images' features about the content of the clean crop (`describe_content`)."""
    noisy = data.degraded[0]
    features, content = noisy.features[model].mean, data.content.values[noisy.crop]
    unit, groups = held_out_unit(noisy)
    return Information(
        mine(features, content, groups=groups, repeats=repeats, seed=seed),
        club(features, content, groups=groups, repeats=repeats, seed=seed),
        hsic(features, content, groups=groups, seed=seed),
        unit,
    )


def noise_information(data: ControlledFeatures, model: int, *, repeats: int, seed: int) -> Information:
    """Estimate the information of noisy images' features about the noise level, at most about log(levels).

    Every scene comes at every level, so HSIC permutes single images and not scenes.
    """
    noisy = data.degraded[0]
    features = noisy.features[model].mean
    unit, groups = held_out_unit(noisy)
    lower_bound = mine(features, noisy.level, groups=groups, repeats=repeats, seed=seed)
    return Information(lower_bound, None, hsic(features, noisy.level, seed=seed), unit)


def held_out_unit(data: DegradedFeatures) -> tuple[str, NDArray[np.int64]]:
    """Return which unit is held out as a whole, ``scene`` or ``crop``, and its number for every image.

    Crops of one scene resemble each other, so scenes are held out. If too few scenes have the same number of crops,
    which HSIC needs to permute them, crops are: images of one crop have the same content.
    """
    images = Counter(data.scene.tolist())
    if max(Counter(images.values()).values()) >= FEWEST_GROUPS:
        return "scene", data.scene
    return "crop", data.crop
