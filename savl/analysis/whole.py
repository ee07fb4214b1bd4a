"""The whole analysis of one or several networks: what is measured, in which order, and how much of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from savl.analysis.channels import ChannelResponse, channel_response, deviations
from savl.analysis.collect import (
    FactorialFeatures,
    OnProgress,
    TableFeatures,
    collect_factorial,
    collect_table,
)
from savl.analysis.evidence import (
    Agreement,
    FactorialEvidence,
    known_of_content,
    known_of_noise,
    probe_kind,
    variation_evidence,
)
from savl.analysis.factor_evidence import TableEvidence, table_evidence
from savl.analysis.factorial import spread
from savl.analysis.factors import FactorTable
from savl.analysis.features import check_has_field
from savl.analysis.names import distinct_names
from savl.analysis.restoration import Restoration, restore
from savl.analysis.severity_pictures import SeverityPicture, photograph_severity, uneven_severity
from savl.evaluation.intervals import AnalysisUnavailable
from savl.network import SAVL
from savl.settings import check_types

T = TypeVar("T")

LARGEST_SEED = 2**32 - 1
"""What scikit-learn takes."""


@dataclass(frozen=True)
class AnalysisConfig:
    """How much is measured. The paper does not publish its settings; these are ours.

    Raises:
        TypeError, ValueError: A setting is not accepted; the message names it.
    """

    seed: int = 0
    """Of crops, noise, splits, the estimators' networks, bootstrap and t-SNE."""
    scenes: int = 24
    """Photographs that factorial data is made of, at most, evenly spaced in their list."""
    crops: int = 12
    """Of every photograph, at most."""
    side: int = 64
    """Of a crop, low-resolution pixels."""
    repeats: int = 10
    """Of every probe."""
    information_repeats: int = 5
    """Of MINE and CLUB."""
    components: int = 16
    """Principal components that describe the content of a crop."""
    images: int = 12
    """Photographs degraded by the whole pipeline, for severity maps against the truth and for upscaling, at most."""
    pictures: int = 4
    """Severity maps shown of those, and of real photographs, at most."""

    def __post_init__(self) -> None:
        check_types(self)
        for field in fields(self):
            smallest = {"seed": 0, "scenes": 2, "side": 8}.get(field.name, 1)
            if getattr(self, field.name) < smallest:
                raise ValueError(f"{field.name} must be at least {smallest}, got {getattr(self, field.name)}")
        if self.seed > LARGEST_SEED:
            raise ValueError(f"seed must be at most {LARGEST_SEED}, got {self.seed}")

    def quick(self) -> AnalysisConfig:
        """For a first look: intervals from so little are wide."""
        scenes = min(self.scenes, 8)
        return replace(self, scenes=scenes, crops=2, repeats=2, information_repeats=1, images=2, pictures=2)


@dataclass(frozen=True)
class ModelEvidence:
    """What was found about one network."""

    name: str
    code: str
    """variational or deterministic."""
    parameters: int
    latent: int
    factorial: FactorialEvidence | None
    """None where no photographs were given."""
    tables: tuple[TableEvidence, ...]


@dataclass(frozen=True, eq=False)
class Analysis:
    """What was found, and what the figures are drawn from."""

    config: AnalysisConfig
    models: tuple[ModelEvidence, ...]
    """Figures are of the first."""
    photographs: FactorialFeatures | None
    tables: tuple[TableFeatures, ...]
    uneven: tuple[SeverityPicture, ...]
    """Images degraded unevenly, with the truth; none for a deterministic code."""
    real: tuple[SeverityPicture, ...]
    """Photographs as they are; likewise."""


def analyze(
    models: dict[str, SAVL],
    *,
    hr: Sequence[Path] = (),
    tables: Sequence[FactorTable] = (),
    real: Sequence[Path] = (),
    config: AnalysisConfig | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Analysis:
    """Test what the degradation fields of networks know.

    Args:
        models: By name, in evaluation mode, of one scale; the first is the one that figures are drawn of.
        hr: High-resolution photographs, for everything whose truth is known because it is made here.
        tables: Images with known factors.
        real: Photographs whose severity maps are to be seen.
        config: How much is measured.
        on_progress: Called with what is done, how much of it is finished, and how much there is in all.

    Raises:
        ValueError: No network, one without a field, different scales, neither photographs nor tables, or photographs
            that are too small.
        ImageFileError: An image cannot be read.
        AnalysisUnavailable: scikit-learn is not installed.
        DegradationUnavailable: kornia is not installed, and there are photographs.
    """
    config = config or AnalysisConfig()
    _check(models, hr, tables)
    networks = list(models.values())
    photographs = None
    if hr:
        photographs = collect_factorial(
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
    agreements: list[Agreement | None] = [None] * len(networks)
    restorations: list[Restoration] = []
    uneven: tuple[SeverityPicture, ...] = ()
    if photographs is not None:
        agreements, uneven = _agreements(networks, photographs, config, on_progress)
        degraded = spread(photographs.paths, config.images)
        on_progress("upscaling", 0, len(degraded))
        restorations = restore(
            networks,
            degraded,
            seed=config.seed,
            on_image=lambda done: on_progress("upscaling", done, len(degraded)),
        )
    found = []
    for place, (name, network) in enumerate(models.items()):

        def on_step(done: int, total: int, name: str = name) -> None:
            on_progress(f"probes and information: {name}", done, total)

        factorial = None
        if photographs is not None:
            factorial = _factorial_evidence(
                network, place, photographs, agreements[place], restorations[place], config, on_step
            )
        of_tables = []
        for done, table in enumerate(collected):
            of_tables.append(table_evidence(table, place, repeats=config.repeats, seed=config.seed))
            on_progress(f"probes of tables: {name}", done + 1, len(collected))
        code = network.config.degradation_code
        parameters = sum(parameter.numel() for parameter in network.parameters())
        found.append(ModelEvidence(name, code, parameters, network.config.latent, factorial, tuple(of_tables)))
    shown = _real(networks[0], real, config, on_progress)
    return Analysis(config, tuple(found), photographs, collected, uneven, shown)


def _check(models: dict[str, SAVL], hr: Sequence[Path], tables: Sequence[FactorTable]) -> None:
    try:  # it is needed after minutes, and had better be missed now
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


def _agreements(
    networks: Sequence[SAVL], photographs: FactorialFeatures, config: AnalysisConfig, on_progress: OnProgress
) -> tuple[list[Agreement | None], tuple[SeverityPicture, ...]]:
    """Severity maps against the truth: the figures of every network, and the pictures of the first."""
    variational = [network for network in networks if network.config.degradation_code == "variational"]
    if not variational:
        return [None] * len(networks), ()
    paths = spread(photographs.paths, config.images)
    names = distinct_names(paths)
    found: list[dict[str, float]] = [{} for _ in variational]
    shown: list[SeverityPicture] = []
    on_progress("severity maps against the truth", 0, len(paths))
    for place, path in enumerate(paths):
        pictures = uneven_severity(variational, path, (config.seed, place))
        for each, correlations in zip(pictures, found, strict=True):
            assert each.correlation is not None
            correlations[names[place]] = each.correlation
        if variational[0] is networks[0] and place < config.pictures:
            shown.append(replace(pictures[0], name=names[place]))
        on_progress("severity maps against the truth", place + 1, len(paths))
    agreements = iter(
        Agreement(statistics.fmean(each.values()), statistics.median(each.values()), each) for each in found
    )
    return [next(agreements) if network in variational else None for network in networks], tuple(shown)


def _factorial_evidence(
    network: SAVL,
    place: int,
    data: FactorialFeatures,
    agreement: Agreement | None,
    restoration: Restoration,
    config: AnalysisConfig,
    on_step: Callable[[int, int], None],
) -> FactorialEvidence:
    total, done = len(data.varied) + 4, 0
    on_step(done, total)

    def told(result: T) -> T:
        nonlocal done
        done += 1
        on_step(done, total)
        return result

    seed, repeats, information_repeats = config.seed, config.repeats, config.information_repeats
    return FactorialEvidence(
        tuple(told(variation_evidence(varied, place, repeats=repeats, seed=seed)) for varied in data.varied),
        told(probe_kind(data.varied, place, repeats=repeats, seed=seed)),
        told(known_of_content(data, place, repeats=information_repeats, seed=seed)),
        told(known_of_noise(data, place, repeats=information_repeats, seed=seed)),
        told(_channels(network, place, data, seed)),
        agreement,
        restoration,
    )


def _channels(network: SAVL, place: int, data: FactorialFeatures, seed: int) -> tuple[ChannelResponse, ...]:
    unit = deviations([varied.features[place] for varied in data.varied])
    return tuple(
        channel_response(
            network, data.swept, varied.variation, varied.features[place], varied.amounts, unit, (seed, which)
        )
        for which, varied in enumerate(data.varied)
    )


def _real(
    network: SAVL, paths: Sequence[Path], config: AnalysisConfig, on_progress: OnProgress
) -> tuple[SeverityPicture, ...]:
    if network.config.degradation_code != "variational" or not paths:
        return ()
    chosen, pictures = spread(paths, config.pictures), []
    on_progress("severity maps of photographs", 0, len(chosen))
    for place, (path, name) in enumerate(zip(chosen, distinct_names(chosen), strict=True)):
        pictures.append(replace(photograph_severity(network, path), name=name))
        on_progress("severity maps of photographs", place + 1, len(chosen))
    return tuple(pictures)
