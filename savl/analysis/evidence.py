"""What the features of one network say of factorial data: probes, information and correlations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from savl.analysis.channels import ChannelResponse
from savl.analysis.collect import FactorialFeatures, VariedFeatures
from savl.analysis.restoration import Restoration
from savl.evaluation.club import club
from savl.evaluation.held_out import FEWEST_GROUPS
from savl.evaluation.hsic import HSICResult, hsic
from savl.evaluation.intervals import Correlation, Interval, spearman
from savl.evaluation.mine import mine
from savl.evaluation.probe import ProbeResult, linear_probe


@dataclass(frozen=True)
class VariationEvidence:
    """One degradation alone, at all its levels."""

    name: str
    title: str
    unit: str
    levels: tuple[str, ...]
    level: ProbeResult
    """Which level an image has; scenes are held out."""
    scene: ProbeResult
    """Which photograph an image shows; every photograph and crop is in both splits, at other levels."""
    severity: Correlation | None
    """Of the images' severity with the amount; None for a deterministic code."""
    severity_by_level: tuple[float, ...] | None
    kl_by_level: tuple[float, ...] | None
    """Nats per pixel."""


@dataclass(frozen=True)
class Information:
    """How much the feature knows of something, by three estimators."""

    mine: Interval
    """Nats; a lower bound."""
    club: Interval | None
    """Nats; an upper bound, as far as its Gaussian fits; None for labels, which are none."""
    hsic: HSICResult
    held_out: str
    """scene or crop: what was never both fitted and measured, with all that belongs to it."""


@dataclass(frozen=True)
class Agreement:
    """Severity maps against the truth of images degraded unevenly: Spearman's coefficient over the pixels of each."""

    mean: float
    median: float
    images: dict[str, float]


@dataclass(frozen=True)
class FactorialEvidence:
    """All that photographs say of a network."""

    variations: tuple[VariationEvidence, ...]
    kind: ProbeResult
    """Noise, blur or JPEG, whatever the strength; scenes are held out."""
    content: Information
    """Of what the clean crop looks like."""
    degradation: Information
    """Of the level of the noise."""
    channels: tuple[ChannelResponse, ...]
    agreement: Agreement | None
    """None for a deterministic code."""
    restoration: Restoration


def variation_evidence(varied: VariedFeatures, model: int, *, repeats: int, seed: int) -> VariationEvidence:
    """Probe one degradation for its level and for the scene.

    Args:
        varied: The images.
        model: Which network's features.
        repeats: Of the probes.
        seed: Of probes and bootstrap.
    """
    features = varied.features[model]
    severity = features.severity

    def by_level(values: NDArray[np.float32] | None) -> tuple[float, ...] | None:
        if values is None:
            return None
        levels = range(len(varied.variation.amounts))
        return tuple(float(values[varied.level == level].mean(dtype=np.float64)) for level in levels)

    constant = severity is None or severity.min() == severity.max()
    return VariationEvidence(
        varied.variation.name,
        varied.variation.title,
        varied.variation.unit,
        varied.variation.labels,
        level=linear_probe(features.mean, varied.level, groups=varied.scene, repeats=repeats, seed=seed),
        scene=linear_probe(features.mean, varied.scene, repeats=repeats, seed=seed),
        severity=None
        if severity is None or constant
        else spearman(severity, varied.amounts, groups=varied.scene, seed=seed),
        severity_by_level=by_level(severity),
        kl_by_level=by_level(features.kl),
    )


def probe_kind(varied: Sequence[VariedFeatures], model: int, *, repeats: int, seed: int) -> ProbeResult:
    """Tell the kinds of degradation apart: all images that are degraded at all, scenes held out."""
    degraded = [(each, np.flatnonzero(each.level > 0)) for each in varied]
    features = np.concatenate([each.features[model].mean[rows] for each, rows in degraded])
    kinds = [each.variation.name for each, rows in degraded for _ in rows]
    scenes = np.concatenate([each.scene[rows] for each, rows in degraded])
    return linear_probe(features, kinds, groups=scenes, repeats=repeats, seed=seed)


def known_of_content(data: FactorialFeatures, model: int, *, repeats: int, seed: int) -> Information:
    """How much the features of noisy images know of what the clean crop looks like (`content.describe`)."""
    noisy = data.varied[0]
    features, content = noisy.features[model].mean, data.content.values[noisy.crop]
    name, groups = held_out(noisy)
    return Information(
        mine(features, content, groups=groups, repeats=repeats, seed=seed),
        club(features, content, groups=groups, repeats=repeats, seed=seed),
        hsic(features, content, groups=groups, seed=seed),
        name,
    )


def known_of_noise(data: FactorialFeatures, model: int, *, repeats: int, seed: int) -> Information:
    """How much the features of noisy images know of the level of their noise; the most is log(levels), roughly.

    Every scene comes at every level, so for HSIC it is levels that are exchanged and not scenes.
    """
    noisy = data.varied[0]
    features = noisy.features[model].mean
    name, groups = held_out(noisy)
    found = mine(features, noisy.level, groups=groups, repeats=repeats, seed=seed)
    return Information(found, None, hsic(features, noisy.level, seed=seed), name)


def held_out(varied: VariedFeatures) -> tuple[str, NDArray[np.int64]]:
    """What is held out as a whole, and which of them every image is of.

    Images of one crop have one content, and crops of one scene are alike, so it is scenes; crops where too few scenes
    have as many crops.
    """
    images = Counter(varied.scene.tolist())
    if max(Counter(images.values()).values()) >= FEWEST_GROUPS:
        return "scene", varied.scene
    return "crop", varied.crop
