"""An analysis as JSON, and what the paper published to stand beside it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import savl
from savl.analysis.factorial import VARIATIONS
from savl.analysis.names import distinct_names
from savl.analysis.whole import Analysis

VERSION = 2
"""Of the layout of the JSON; it grows when a name goes or changes its meaning."""


@dataclass(frozen=True)
class Published:
    """A row of the paper's table (SAVL, ICLR 2026); None where it has no figure.

    The settings of its probes and estimators were not published: orders of magnitude compare, digits do not.
    """

    name: str
    scene: float | None
    """Scene-ID accuracy, lower is better."""
    noise_level: float | None
    """Noise-Level accuracy of five levels, higher is better."""
    content_mine: float
    """Nats, lower is better."""


PUBLISHED = (
    Published("SAVL", 0.4997, 0.9480, 0.1507),
    Published("deterministic code", None, None, 1.0254),
    Published("deterministic code + CLUB", 0.3644, 0.2000, 0.2700),
)


def report_json(analysis: Analysis) -> bytes:
    """Everything that was found, and the conditions it was found under; the same bytes for the same numbers."""
    photographs = analysis.photographs
    report = {
        "version": VERSION,
        "savl": savl.__version__,
        "config": asdict(analysis.config),
        "conditions": {
            "photographs": [] if photographs is None else distinct_names(photographs.paths, suffix=True),
            "too_small": [] if photographs is None else distinct_names(photographs.too_small, suffix=True),
            "images_per_degradation": 0 if photographs is None else len(photographs.varied[0].level),
            "levels": {variation.name: list(variation.amounts) for variation in VARIATIONS},
            "content_explained": None if photographs is None else photographs.content.explained,
            "tables": [{"name": table.table.name, "images": len(table.table.paths)} for table in analysis.tables],
            "real": [picture.name for picture in analysis.real],
        },
        "published": [plain(row) for row in PUBLISHED],
        "models": [plain(model) for model in analysis.models],
    }
    return (json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def plain(value: Any) -> Any:
    """Dataclasses, and what is in them, as JSON has it; numbers that are not finite become null."""
    if hasattr(value, "to_json"):
        return plain(value.to_json())
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
