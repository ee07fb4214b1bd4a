"""Run the analysis of one or several networks: its settings, its steps and its results."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from savl.analysis.channels import channel_response, deviations
from savl.analysis.controlled import ControlledFeatures, collect_controlled
from savl.analysis.controlled_results import (
    ControlledResults,
    content_information,
    degradation_geometry,
    degradation_result,
    noise_information,
    probe_kind,
)
from savl.analysis.factor_table import FactorTable
from savl.analysis.features import check_has_field
from savl.analysis.full_pipeline import (
    MaskAgreement,
    Restoration,
    SeverityPicture,
    mask_agreements,
    photograph_severities,
    restore,
)
from savl.analysis.photographs import OnProgress, evenly_spaced
from savl.analysis.table_results import TableFeatures, TableResult, collect_table, table_result
from savl.evaluation.intervals import AnalysisUnavailable
from savl.network import SAVL
from savl.settings import check_types

LARGEST_SEED = 2**32 - 1
"""Largest seed that scikit-learn accepts."""


@dataclass(frozen=True)
class AnalysisConfig:
    """Settings of an analysis. The paper does not publish its settings; these are chosen by this project.

    Raises:
        TypeError, ValueError: A setting is not accepted; the message names it.
    """

    seed: int = 0
    """Seed of crops, noise, splits, the estimators' networks, bootstrap and t-SNE."""
    scenes: int = 24
    """Largest number of photographs that are degraded at known levels, evenly spaced in their list."""
    crops: int = 12
    """Largest number of crops per photograph."""
    side: int = 64
    """Side of a crop in low-resolution pixels."""
    repeats: int = 10
    """Repeats of every probe."""
    information_repeats: int = 5
    """Repeats of MINE and CLUB."""
    components: int = 16
    """Principal components that describe the content of a crop."""
    images: int = 12
    """Largest number of photographs that are degraded by the whole pipeline, for severity maps and for upscaling."""
    pictures: int = 4
    """Largest number of severity maps that are shown, of degraded photographs and of real ones."""

    def __post_init__(self) -> None:
        check_types(self)
        for field in fields(self):
            smallest = {"seed": 0, "scenes": 2, "side": 8}.get(field.name, 1)
            if getattr(self, field.name) < smallest:
                raise ValueError(f"{field.name} must be at least {smallest}, got {getattr(self, field.name)}")
        if self.seed > LARGEST_SEED:
            raise ValueError(f"seed must be at most {LARGEST_SEED}, got {self.seed}")

    def quick(self) -> AnalysisConfig:
        """Return settings for a first impression; intervals from so few images and repeats are wide."""
        scenes = min(self.scenes, 8)
        return replace(self, scenes=scenes, crops=2, repeats=2, information_repeats=1, images=2, pictures=2)


@dataclass(frozen=True)
class ModelResult:
    """Results of one network. The field names are the keys of the JSON report."""

    name: str
    code: str
    """``variational`` or ``deterministic``."""
    parameters: int
    latent: int
    factorial: ControlledResults | None
    """Results on photographs that were degraded at known levels; None if there were no photographs."""
    tables: tuple[TableResult, ...]


@dataclass(frozen=True, eq=False)
class Analysis:
    """Results of all networks, and the data that the figures show."""

    config: AnalysisConfig
    models: tuple[ModelResult, ...]
    """The figures show the first one."""
    trainings: int
    """Number of networks, from the first, that are trainings of one configuration."""
    photographs: ControlledFeatures | None
    tables: tuple[TableFeatures, ...]
    masked: tuple[SeverityPicture, ...]
    """Images that were degraded through a mask; none for a deterministic code."""
    real: tuple[SeverityPicture, ...]
    """Unmodified photographs; none for a deterministic code."""


def analyze(
    models: dict[str, SAVL],
    *,
    hr: Sequence[Path] = (),
    tables: Sequence[FactorTable] = (),
    real: Sequence[Path] = (),
    trainings: int = 1,
    config: AnalysisConfig | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Analysis:
    """Measure how much the degradation fields of networks encode about degradations and about content.

    Args:
        models: Networks by name, in evaluation mode and of one scale. The figures show the first one.
        hr: High-resolution photographs, which are degraded in known ways.
        tables: Images with known factors.
        real: Photographs whose severity maps are shown.
        trainings: Number of networks, from the first, that are trainings of one configuration with different seeds. The
            report has the mean and the range of their figures.
        config: Settings of the analysis.
        on_progress: Called with the name of a task, the number of finished steps, and the number of all steps.

    Raises:
        ValueError: There is no network, one has no field, scales differ, there are neither photographs nor tables, the
            photographs are too small, or there are fewer networks than trainings.
        ImageFileError: An image cannot be read.
        AnalysisUnavailable: scikit-learn is not installed.
        DegradationUnavailable: kornia is not installed and there are photographs.
    """
    config = config or AnalysisConfig()
    _check(models, hr, tables)
    if not 1 <= trainings <= len(models):
        raise ValueError(f"trainings must be between 1 and the number of models, {len(models)}, got {trainings}")
    networks = list(models.values())
    photographs = None
    if hr:
        photographs = collect_controlled(
            networks,
            hr,
            scenes=config.scenes,
            crops=config.crops,
            side=config.side,
            components=config.components,
            seed=config.seed,
            on_progress=on_progress,
        )
    collected = tuple(collect_table(networks, table, on_progress) for table in tables)
    agreements: list[MaskAgreement | None] = [None] * len(networks)
    restorations: list[Restoration] = []
    masked: tuple[SeverityPicture, ...] = ()
    if photographs is not None:
        degraded = evenly_spaced(photographs.paths, config.images)
        agreements, masked = mask_agreements(
            networks, degraded, pictures=config.pictures, seed=config.seed, on_progress=on_progress
        )
        restorations = restore(networks, degraded, seed=config.seed, on_progress=on_progress)
    results = []
    for place, (name, network) in enumerate(models.items()):
        controlled = None
        if photographs is not None:
            controlled = _controlled_results(
                name, network, place, photographs, agreements[place], restorations[place], config, on_progress
            )
        of_tables = []
        for done, table in enumerate(collected):
            of_tables.append(table_result(table, place, repeats=config.repeats, seed=config.seed))
            on_progress(f"probes of tables: {name}", done + 1, len(collected))
        code = network.config.degradation_code
        parameters = sum(parameter.numel() for parameter in network.parameters())
        results.append(ModelResult(name, code, parameters, network.config.latent, controlled, tuple(of_tables)))
    shown = photograph_severities(networks[0], real, config.pictures, on_progress)
    return Analysis(config, tuple(results), trainings, photographs, collected, masked, shown)


def _check(models: dict[str, SAVL], hr: Sequence[Path], tables: Sequence[FactorTable]) -> None:
    try:  # the probes need it after minutes of other work, so its absence is reported first
        import sklearn  # noqa: F401
    except ImportError as error:
        raise AnalysisUnavailable("an analysis", "scikit-learn", error) from error
    if not models:
        raise ValueError("models must be at least one network, got none")
    for name, network in models.items():
        check_has_field(network, name)
    scales = {name: network.config.scale for name, network in models.items()}
    if len(set(scales.values())) > 1:
        different = ", ".join(f"{name} ×{scale}" for name, scale in scales.items())
        raise ValueError(f"models must be of one scale, since all are shown the same images; got {different}")
    if not hr and not tables:
        raise ValueError("hr or tables must be given: photographs to degrade, or images whose factors are known")


def _controlled_results(
    name: str,
    network: SAVL,
    place: int,
    data: ControlledFeatures,
    agreement: MaskAgreement | None,
    restoration: Restoration,
    config: AnalysisConfig,
    on_progress: OnProgress,
) -> ControlledResults:
    task, total = f"probes and information: {name}", len(data.degraded) + 4
    finished = itertools.count()

    def advance() -> None:
        on_progress(task, next(finished), total)

    seed, repeats, information_repeats = config.seed, config.repeats, config.information_repeats
    advance()
    by_degradation = []
    for degraded in data.degraded:
        by_degradation.append(degradation_result(degraded, place, repeats=repeats, seed=seed))
        advance()
    kind = probe_kind(data.degraded, place, repeats=repeats, seed=seed)
    advance()
    content = content_information(data, place, repeats=information_repeats, seed=seed)
    advance()
    noise = noise_information(data, place, repeats=information_repeats, seed=seed)
    advance()
    unit = deviations([degraded.features[place] for degraded in data.degraded])
    channels = tuple(
        channel_response(network, data.first_scene, degraded, place, unit, (seed, which))
        for which, degraded in enumerate(data.degraded)
    )
    advance()
    geometry = degradation_geometry(data.degraded, place)
    return ControlledResults(tuple(by_degradation), kind, geometry, content, noise, channels, agreement, restoration)
