"""An analysis as one HTML page: `page.html.jinja` filled in, its figures inside."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import savl
from savl.analysis import figures
from savl.analysis.channels import ChannelResponse, direction_cosine
from savl.analysis.collect import OnProgress, TableFeatures
from savl.analysis.factor_evidence import known_numbers
from savl.analysis.figures import Colouring
from savl.analysis.names import distinct_names
from savl.analysis.report_json import PUBLISHED
from savl.analysis.severity_pictures import LONGEST, SeverityPicture
from savl.analysis.whole import Analysis
from savl.evaluation.intervals import AnalysisUnavailable
from savl.images.severity_map import draw_severity

if TYPE_CHECKING:
    from jinja2 import Template

NAMES = {"noise": "noise", "blur": "blur", "jpeg": "JPEG"}
GENERATOR = "savl analyze"
"""What the page says it was made by, and is known by when another is to take its place."""
MARGIN = 12
"""Pixels around a drawn severity map (`savl.images.severity_map.draw_severity`)."""
FEWEST_EMBEDDED = 8
"""Images below which nothing is embedded."""


def render_page(analysis: Analysis, on_progress: OnProgress = lambda what, done, total: None) -> bytes:
    """The page, UTF-8; needs no other file and no network.

    Args:
        analysis: What was found.
        on_progress: Called with what is done, how much of it is finished, and how much there is in all.

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
            published=PUBLISHED,
            photographs=photographs,
            too_small=[] if photographs is None else distinct_names(photographs.too_small, suffix=True),
            names=NAMES,
            images=0 if photographs is None else len(photographs.varied[0].level),
            most_of_levels=0.0 if found is None else math.log(found.variations[0].level.classes),
            no_severity=f"{subject.name} has none: a deterministic code has no variance." if deterministic else "",
            figures=drawn,
            fewest=FEWEST_EMBEDDED,
            channels=[] if found is None else [_channel_row(each, found.channels) for each in found.channels],
            tables=[_table(analysis, place, drawn["scatters"][place]) for place in range(len(analysis.tables))],
            uneven=[
                {"image": _data(_strip(picture)), "caption": f"{picture.name}: Spearman {picture.correlation:+.2f}"}
                for picture in analysis.uneven
            ],
            real=[{"image": _data(_strip(picture)), "caption": picture.name} for picture in analysis.real],
        )
        .lstrip()
        .encode(errors="backslashreplace")
    )


def page_template() -> Template:
    """Return the page to be filled in, and check that its figures can be drawn.

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
    """Figures as data addresses, those of a table in a list of dictionaries, by the table's place."""
    found, photographs, seed = analysis.models[0].factorial, analysis.photographs, analysis.config.seed
    drawn: dict[str, Any] = {"severity": None, "channels": None, "embeddings": [], "scatters": []}
    jobs = (0 if photographs is None else len(photographs.varied)) + len(analysis.tables)
    done = 0
    on_progress("figures", done, jobs)

    def embed(title: str, features: NDArray[np.float32], colourings: Mapping[str, Colouring]) -> None:
        nonlocal done
        if len(features) >= FEWEST_EMBEDDED and colourings:
            rows, places = figures.embedding(features, seed)
            coloured = {name: colouring.of(rows) for name, colouring in colourings.items()}
            drawn["embeddings"].append({"title": title, "image": _data(figures.coloured_embeddings(places, coloured))})
        done += 1
        on_progress("figures", done, jobs)

    if photographs is not None and found is not None:
        if photographs.varied[0].features[0].severity is not None:
            correlations = [variation.severity for variation in found.variations]
            drawn["severity"] = _data(figures.severity_by_level(photographs.varied, correlations))
        drawn["channels"] = _data(figures.channel_heatmaps(found.channels))
        photographed = distinct_names(photographs.paths)
        for varied in photographs.varied:
            labels, kind = varied.variation.labels, NAMES[varied.variation.name]
            levels = Colouring([labels[level] for level in varied.level], labels)
            scenes = Colouring([photographed[scene] for scene in varied.scene])
            embed(f"{kind} alone", varied.features[0].mean, {varied.variation.unit: levels, "scene": scenes})
    for place, table in enumerate(analysis.tables):
        drawn["scatters"].append(_scatters(analysis, place))
        embed(table.table.name, table.features[0].mean, _coloured_factors(table))
    return drawn


def _scatters(analysis: Analysis, place: int) -> list[dict[str, str]]:
    """The severity of a table's images against every factor it was correlated with."""
    table = analysis.tables[place]
    severity = table.features[0].severity
    scatters = []
    for factor in analysis.models[0].tables[place].factors:
        if factor.severity is None or severity is None:
            continue
        amounts, rows = known_numbers(factor.name, table.table.factors[factor.name])
        image = figures.severity_by_number(factor.name, amounts, severity[rows], factor.severity)
        scatters.append({"name": factor.name, "image": _data(image)})
    return scatters


def _coloured_factors(table: TableFeatures) -> dict[str, Colouring]:
    """Factors that group images: not those that are constant, and no classes of single images."""
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


def _table(analysis: Analysis, place: int, scatters: list[dict[str, str]]) -> dict[str, Any]:
    """A table's rows: a factor each, a cell for every network."""
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


def _strip(picture: SeverityPicture) -> bytes:
    """Photograph, truth if there is one, and severity map side by side, pixel by pixel."""
    height, width = picture.severity.shape
    # As `draw_severity` places and enlarges its maps.
    factor = max(1, round(LONGEST / max(height, width)))
    maps = [draw_severity(picture.severity)]
    if picture.truth is not None:
        maps.insert(0, draw_severity(picture.truth, limits=(0.0, 1.0), label="true severity"))
    photo = picture.photo.repeat(factor, axis=0).repeat(factor, axis=1)
    left = np.full((maps[0].shape[0], photo.shape[1] + MARGIN, 3), 255, dtype=np.uint8)
    left[MARGIN : MARGIN + photo.shape[0], : photo.shape[1]] = photo
    return _png(np.hstack([left, *maps]))


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
