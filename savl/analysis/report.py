"""Reports of an analysis: one HTML page with its figures inside (`page.html.jinja`), and JSON."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib import import_module
from importlib.resources import files
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import savl
from savl.analysis import figures
from savl.analysis.channels import ChannelResponse, direction_cosine
from savl.analysis.controlled import SINGLE_DEGRADATIONS
from savl.analysis.figures import GENERATOR, NAMES, Colouring
from savl.analysis.full_pipeline import SHOWN_SIDE, SeverityPicture
from savl.analysis.photographs import OnProgress, distinct_names
from savl.analysis.run import Analysis
from savl.analysis.summary import Spread, figures_of, summarise
from savl.analysis.table_results import TableFeatures, known_numbers
from savl.evaluation.geometry import STRAIGHT_RAYS
from savl.evaluation.intervals import AnalysisUnavailable
from savl.images.severity_map import draw_severity

if TYPE_CHECKING:
    from jinja2 import Template

VERSION = 2
"""Version of the JSON layout; it increases when a key is removed or changes its meaning."""
MARGIN = 12
"""Pixels around a drawn severity map (`savl.images.severity_map.draw_severity`)."""
MOST_FIELDS = 4
"""Largest number of networks in the figure of the types."""
FEWEST_EMBEDDED = 8
"""Smallest number of images for which a t-SNE embedding is computed."""


@dataclass(frozen=True)
class Published:
    """A row of the paper's table (SAVL, ICLR 2026); None if the paper has no figure.

    The paper does not publish the settings of its probes and estimators, so only orders of magnitude are comparable.
    """

    name: str
    scene: float | None
    """Scene-ID accuracy, lower is better."""
    noise_level: float | None
    """Noise-Level accuracy for five levels, higher is better."""
    content_mine: float
    """MINE of content in nats, lower is better."""


PUBLISHED = (
    Published("SAVL", 0.4997, 0.9480, 0.1507),
    Published("deterministic code", None, None, 1.0254),
    Published("deterministic code + CLUB", 0.3644, 0.2000, 0.2700),
)


def report_json(analysis: Analysis) -> bytes:
    """Return all results and their conditions as JSON; equal numbers give equal bytes."""
    photographs = analysis.photographs
    report = {
        "version": VERSION,
        "savl": savl.__version__,
        "config": asdict(analysis.config),
        "conditions": {
            "photographs": [] if photographs is None else distinct_names(photographs.paths, suffix=True),
            "too_small": [] if photographs is None else distinct_names(photographs.too_small, suffix=True),
            "images_per_degradation": 0 if photographs is None else len(photographs.degraded[0].level),
            "levels": {degradation.name: list(degradation.amounts) for degradation in SINGLE_DEGRADATIONS},
            "content_explained": None if photographs is None else photographs.content.explained,
            "tables": [{"name": table.table.name, "images": len(table.table.paths)} for table in analysis.tables],
            "real": [picture.name for picture in analysis.real],
        },
        "published": [json_value(row) for row in PUBLISHED],
        "models": [json_value(model) for model in analysis.models],
        "summary": {
            "models": [model.name for model in analysis.models[: analysis.trainings]],
            "figures": json_value(_summary(analysis)),
        },
    }
    return (json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def types_svg(analysis: Analysis) -> bytes | None:
    """Return the figure of the types of degradations as SVG; None if there were no photographs."""
    shown = {model.name: model.factorial.geometry for model in analysis.models if model.factorial is not None}
    return figures.class_mean_rays(dict(list(shown.items())[:MOST_FIELDS])) if shown else None


def _summary(analysis: Analysis) -> dict[str, Spread]:
    return summarise([figures_of(model) for model in analysis.models[: analysis.trainings]])


def json_value(value: Any) -> Any:
    """Convert dataclasses, dictionaries and lists to values that JSON has; numbers that are not finite become None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: json_value(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(name): json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render_page(analysis: Analysis, on_progress: OnProgress = lambda what, done, total: None) -> bytes:
    """Return the page as UTF-8; it needs no other file and no network access.

    Args:
        analysis: The results.
        on_progress: Called with the name of a task, the number of finished steps, and the number of all steps.

    Raises:
        AnalysisUnavailable: scikit-learn, Jinja or matplotlib is not installed.
    """
    template = page_template()
    subject, photographs = analysis.models[0], analysis.photographs
    found = subject.factorial
    deterministic = subject.code == "deterministic"
    drawn = _draw(analysis, on_progress)
    return (
        template.render(
            generator=GENERATOR,
            version=savl.__version__,
            config=analysis.config,
            subject=subject,
            others=[model.name for model in analysis.models[1:]],
            models=analysis.models,
            trainings=analysis.trainings,
            summary=_summary(analysis),
            straight_rays=STRAIGHT_RAYS,
            degradation_pairs=list(combinations((each.name for each in SINGLE_DEGRADATIONS), 2)),
            published=PUBLISHED,
            photographs=photographs,
            too_small=[] if photographs is None else distinct_names(photographs.too_small, suffix=True),
            names=NAMES,
            images=0 if photographs is None else len(photographs.degraded[0].level),
            most_of_levels=0.0 if found is None else math.log(found.variations[0].level.classes),
            no_severity=f"Not measured: {subject.name} has a deterministic code, which has no variance."
            if deterministic
            else "",
            figures=drawn,
            fewest=FEWEST_EMBEDDED,
            channels=[] if found is None else [_channel_row(each, found.channels) for each in found.channels],
            tables=[_table_rows(analysis, place, drawn["scatters"][place]) for place in range(len(analysis.tables))],
            masked=[
                {
                    "image": _data_url(_side_by_side(picture)),
                    "caption": f"{picture.name}: degraded photograph, degradation mask, severity map. "
                    f"Spearman {picture.correlation:+.2f}",
                }
                for picture in analysis.masked
            ],
            real=[
                {"image": _data_url(_side_by_side(picture)), "caption": f"{picture.name}: photograph, severity map."}
                for picture in analysis.real
            ],
        )
        .lstrip()
        .encode(errors="backslashreplace")
    )


def page_template() -> Template:
    """Return the template of the page, and check that its figures can be drawn.

    Raises:
        AnalysisUnavailable: Jinja or matplotlib is not installed.
    """
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise AnalysisUnavailable("drawing the figures of an analysis", "matplotlib", error) from error
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise AnalysisUnavailable("the page of an analysis", "jinja2", error) from error
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(files("savl.analysis").joinpath("page.html.jinja").read_text("utf-8"))


def _draw(analysis: Analysis, on_progress: OnProgress) -> dict[str, Any]:
    """Return the figures as data URLs; ``scatters`` has a list of dictionaries for every table."""
    found, photographs, seed = analysis.models[0].factorial, analysis.photographs, analysis.config.seed
    drawn: dict[str, Any] = {"severity": None, "types": None, "channels": None, "embeddings": [], "scatters": []}
    jobs = (0 if photographs is None else len(photographs.degraded)) + len(analysis.tables)
    done = 0
    on_progress("figures", done, jobs)

    def embed(title: str, features: NDArray[np.float32], colourings: Mapping[str, Colouring]) -> None:
        nonlocal done
        if len(features) >= FEWEST_EMBEDDED and colourings:
            rows, places = figures.embedding(features, seed)
            coloured = {name: colouring.of(rows) for name, colouring in colourings.items()}
            drawn["embeddings"].append(
                {"title": title, "image": _data_url(figures.coloured_embeddings(places, coloured))}
            )
        done += 1
        on_progress("figures", done, jobs)

    if photographs is not None and found is not None:
        if photographs.degraded[0].features[0].severity is not None:
            correlations = [variation.severity for variation in found.variations]
            drawn["severity"] = _data_url(figures.severity_by_level(photographs.degraded, correlations))
        svg = types_svg(analysis)
        assert svg is not None
        drawn["types"] = _data_url(svg, "svg+xml")
        drawn["channels"] = _data_url(figures.channel_heatmaps(found.channels))
        photographed = distinct_names(photographs.paths)
        for degraded in photographs.degraded:
            labels, kind = degraded.degradation.labels, NAMES[degraded.degradation.name]
            levels = Colouring([labels[level] for level in degraded.level], labels)
            scenes = Colouring([photographed[scene] for scene in degraded.scene])
            embed(f"{kind} only", degraded.features[0].mean, {degraded.degradation.unit: levels, "scene": scenes})
    for place, table in enumerate(analysis.tables):
        drawn["scatters"].append(_scatters(analysis, place))
        embed(table.table.name, table.features[0].mean, _coloured_factors(table))
    return drawn


def _scatters(analysis: Analysis, place: int) -> list[dict[str, str]]:
    """Draw the severity of a table's images against every factor that it was correlated with."""
    table = analysis.tables[place]
    severity = table.features[0].severity
    scatters = []
    for factor in analysis.models[0].tables[place].factors:
        if factor.severity is None or severity is None:
            continue
        amounts, rows = known_numbers(factor.name, table.table.factors[factor.name])
        image = figures.severity_by_number(factor.name, amounts, severity[rows], factor.severity)
        scatters.append({"name": factor.name, "image": _data_url(image)})
    return scatters


def _coloured_factors(table: TableFeatures) -> dict[str, Colouring]:
    """Return the factors that group images: not those that are constant or different for every image."""
    coloured: dict[str, Colouring] = {}
    for name, values in table.table.factors.items():
        known = [value for value in values if value is not None]
        amounts, rows = known_numbers(name, values)
        if len(set(known)) < 2:
            continue
        if len(rows):
            by_row = dict(zip(rows.tolist(), amounts.tolist(), strict=True))
            coloured[name] = Colouring([by_row.get(row) for row in range(len(values))])
        elif len(set(known)) <= len(known) / 2:
            coloured[name] = Colouring(values)
    return coloured


def _table_rows(analysis: Analysis, place: int, scatters: list[dict[str, str]]) -> dict[str, Any]:
    """Return the rows of a table: one per factor, with one cell per network."""
    by_model = [model.tables[place] for model in analysis.models]
    rows = [
        {
            "name": cells[0].name,
            "held_out": cells[0].held_out,
            "probe": cells[0].probe,
            "images": sum(cells[0].classes.values()),
            "cells": cells,
        }
        for cells in zip(*(table.factors for table in by_model), strict=True)
    ]
    return {"name": by_model[0].name, "images": by_model[0].images, "rows": rows, "scatters": scatters}


def _channel_row(response: ChannelResponse, all_responses: Sequence[ChannelResponse]) -> dict[str, Any]:
    explained = np.asarray(response.r_squared)
    return {
        "name": NAMES[response.name],
        "mean": float(explained.mean()),
        "highest": float(explained.max()),
        "top": int(explained.argmax()),
        "above": int((explained > 0.5).sum()),
        "cosines": [direction_cosine(response, other) for other in all_responses],
    }


def _side_by_side(picture: SeverityPicture) -> bytes:
    """Draw the photograph, the degradation mask if it is known, and the severity map side by side."""
    height, width = picture.severity.shape
    # The same enlargement and margin as in `draw_severity`.
    factor = max(1, round(SHOWN_SIDE / max(height, width)))
    maps = [draw_severity(picture.severity)]
    if picture.mask is not None:
        maps.insert(0, draw_severity(picture.mask, limits=(0.0, 1.0), label="degradation mask"))
    photo = picture.photo.repeat(factor, axis=0).repeat(factor, axis=1)
    left = np.full((maps[0].shape[0], photo.shape[1] + MARGIN, 3), 255, dtype=np.uint8)
    left[MARGIN : MARGIN + photo.shape[0], : photo.shape[1]] = photo
    return _png(np.hstack([left, *maps]))


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


def _data_url(image: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(image).decode("ascii")
