"""Figures of networks by name, and their mean and range over several trainings of one configuration."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from savl.analysis.controlled_results import DegradationResult
from savl.analysis.run import ModelResult
from savl.evaluation.geometry import ClassMeanGeometry
from savl.evaluation.probe import ProbeResult


@dataclass(frozen=True)
class Spread:
    """One figure of several networks. The field names are keys of the JSON report."""

    values: tuple[float | None, ...]
    """One value per network; None if it was not measured."""
    mean: float
    lowest: float
    highest: float


def type_figures(
    geometry: ClassMeanGeometry, kind: ProbeResult, variations: Sequence[DegradationResult]
) -> dict[str, float]:
    """Return the figures of types, levels and scenes by name; accuracies are between 0 and 1."""
    figures = {"participation_ratio": geometry.participation_ratio}
    figures |= {f"cosine_{pair}": cosine for pair, cosine in geometry.cosines.items()}
    figures |= {f"component_{number + 1}": share for number, share in enumerate(geometry.explained)}
    figures["kind"] = kind.accuracy.value
    figures |= {f"{each.name}_level": each.level.accuracy.value for each in variations}
    figures |= {f"scene_{each.name}": each.scene.accuracy.value for each in variations}
    figures |= {f"severity_{each.name}": each.severity.value for each in variations if each.severity is not None}
    return figures


def figures_of(result: ModelResult) -> dict[str, float]:
    """Return the most important figures of one network by name; figures that were not measured are missing.

    Figures of a table are named by table, factor and quantity, such as ``shots.csv/iso/severity``.
    """
    figures: dict[str, float] = {}
    found = result.factorial
    if found is not None:
        figures |= type_figures(found.geometry, found.kind, found.variations)
        figures |= {"content_mine": found.content.mine.value, "content_hsic": found.content.hsic.normalised}
        if found.content.club is not None:
            figures["content_club"] = found.content.club.value
        figures |= {
            "degradation_mine": found.degradation.mine.value,
            "degradation_hsic": found.degradation.hsic.normalised,
        }
        if found.agreement is not None:
            figures["mask_agreement"] = found.agreement.mean
        figures["psnr_y"] = found.restoration.model.psnr_y
    for table in result.tables:
        for factor in table.factors:
            if factor.probe is not None:
                figures[f"{table.name}/{factor.name}/accuracy"] = factor.probe.accuracy.value
            if factor.severity is not None:
                figures[f"{table.name}/{factor.name}/severity"] = factor.severity.value
    return figures


def summarise(figures: Sequence[dict[str, float]]) -> dict[str, Spread]:
    """Return mean and range of every figure over networks.

    Args:
        figures: Figures by name of at least one network. A figure that some networks lack is summarised over the
            others.
    """
    summary = {}
    for name in dict.fromkeys(name for each in figures for name in each):
        known = [each[name] for each in figures if name in each]
        values = tuple(each.get(name) for each in figures)
        summary[name] = Spread(values, statistics.fmean(known), min(known), max(known))
    return summary
