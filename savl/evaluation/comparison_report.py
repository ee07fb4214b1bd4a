"""Write a comparison as JSON, CSV, Markdown, and one HTML page with its pictures inside (`comparison.html.jinja`)."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from savl.evaluation.comparison import OPTIONAL, ORIGINAL, Comparison, Picture
from savl.evaluation.perceptual import MetricUnavailable
from savl.version import version

if TYPE_CHECKING:
    from jinja2 import Template


@dataclass(frozen=True)
class Column:
    """A score of the tables."""

    name: str
    """Field of `Fidelity`."""
    title: str
    digits: int
    higher_is_better: bool

    @property
    def arrow(self) -> str:
        """An arrow in the direction of better values."""
        return "↑" if self.higher_is_better else "↓"

    def text(self, value: float | None) -> str:
        """Return a score as text; a dash if there is none."""
        return "-" if value is None else f"{value:.{self.digits}f}"


COLUMNS = (
    Column("psnr_y", "PSNR Y", 2, True),
    Column("ssim_y", "SSIM Y", 4, True),
    Column("psnr_rgb", "PSNR RGB", 2, True),
    Column("ssim_rgb", "SSIM RGB", 4, True),
    Column("lpips", "LPIPS", 4, False),
    Column("dists", "DISTS", 4, False),
    Column("niqe", "NIQE", 2, False),
    Column("brisque", "BRISQUE", 1, False),
)


@dataclass(frozen=True)
class Row:
    """A line of the table of means: the text of its cells, and whether each is the best of its column."""

    label: str
    cells: tuple[str, ...]
    best: tuple[bool, ...]


def measured(comparison: Comparison) -> list[Column]:
    """Return the columns of the scores that have a mean."""
    return [column for column in COLUMNS if comparison.missing.get(column.name) is None]


def rows(comparison: Comparison) -> list[Row]:
    """Return the table of means: a row per method, and one for the originals if they have scores of their own."""
    columns = measured(comparison)
    means = {label: asdict(mean) for label, mean in comparison.means.items()}
    table = []
    for label, mean in means.items():
        best = [
            mean[column.name]
            == (max if column.higher_is_better else min)(other[column.name] for other in means.values())
            for column in columns
        ]
        table.append(Row(label, tuple(column.text(mean[column.name]) for column in columns), tuple(best)))
    if comparison.original:
        cells = tuple(column.text(comparison.original.get(column.name)) for column in columns)
        table.append(Row(ORIGINAL, cells, (False,) * len(columns)))
    return table


def settings(comparison: Comparison) -> list[str]:
    """Return sentences about the settings on which the scores depend."""
    strengths = {method.label: method.strength for method in comparison.methods if method.strength is not None}
    text = {label: each if isinstance(each, str) else f"{each:g}" for label, each in strengths.items()}
    sentences = []
    if len(set(text.values())) == 1:
        sentences.append(f"Restoration strength: {next(iter(text.values()))}.")
    elif text:
        sentences.append(f"Restoration strength: {', '.join(f'{each} ({label})' for label, each in text.items())}.")
    if comparison.reduce_lr:
        sentences.append("Low-resolution images with the size of their originals were reduced.")
    return sentences


def to_json(comparison: Comparison, lr: Path, hr: Path) -> bytes:
    """Return all scores; null stands for the infinite PSNR of identical images and for missing scores.

    ``model`` is the network if there is only one, otherwise null.
    """
    networks = [method for method in comparison.methods if method.column == "model"]

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(part) for name, part in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    originals = {ORIGINAL: plain(comparison.original)} if comparison.original else {}
    report = {
        "model": networks[0].label if networks else None,
        "lr": _short(lr),
        "hr": _short(hr),
        "scale": comparison.scale,
        "reduce_lr": comparison.reduce_lr,
        "methods": [
            {"label": method.label, "column": method.column, "source": method.source, "strength": method.strength}
            for method in comparison.methods
        ],
        **{f"{name}_missing": comparison.missing[name] for name in OPTIONAL},
        "mean": {label: plain(asdict(mean)) for label, mean in comparison.means.items()} | originals,
        "images": [
            {"name": image.name}
            | {method.column: plain(asdict(image.methods[method.label])) for method in comparison.methods}
            | ({ORIGINAL: plain(image.original)} if image.original else {})
            for image in comparison.images
        ],
    }
    return (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()


def to_csv(comparison: Comparison) -> bytes:
    """Return a row per image: `inf` for the PSNR of identical images, empty for missing scores."""
    table = [
        {"name": image.name}
        | {
            f"{method.column}_{name}": value
            for method in comparison.methods
            for name, value in asdict(image.methods[method.label]).items()
        }
        | {f"{ORIGINAL}_{name}": value for name, value in image.original.items()}
        for image in comparison.images
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, table[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    # Bytes of a file name that are not UTF-8 are written unchanged.
    return text.getvalue().encode(errors="surrogateescape")


def to_markdown(comparison: Comparison) -> bytes:
    """Return the table of means; the best value of a column is bold."""
    columns = measured(comparison)
    lines = [
        f"| {len(comparison.images)} images | "
        + " | ".join(f"{column.title} {column.arrow}" for column in columns)
        + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for row in rows(comparison):
        cells = [f"**{cell}**" if best else cell for cell, best in zip(row.cells, row.best, strict=True)]
        lines.append(f"| {_escaped(row.label)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        *(_escaped(sentence) for sentence in settings(comparison)),
        *(f"No {OPTIONAL[name]}: {_escaped(reason)}." for name, reason in comparison.missing.items() if reason),
    ]
    return ("\n".join(lines).rstrip() + "\n").encode(errors="backslashreplace")


def to_html(comparison: Comparison, lr: Path, hr: Path, template: Template | None = None) -> bytes:
    """Return the page as UTF-8; it needs no other file and no network access.

    Args:
        comparison: The scores and crops.
        lr: Folder of the low-resolution images, of which the last two parts are shown.
        hr: Folder of the originals.
        template: The page; None loads it by `page_template`.
    """
    return (
        (template or page_template()).render(
            version=version(),
            lr=_short(lr),
            hr=_short(hr),
            comparison=comparison,
            columns=measured(comparison),
            rows=rows(comparison),
            settings=settings(comparison),
            missing={OPTIONAL[name]: reason for name, reason in comparison.missing.items() if reason},
            image=_data_url,
        )
        + "\n"
    ).encode(errors="backslashreplace")


def page_template() -> Template:
    """Load the template of the page.

    Raises:
        MetricUnavailable: Jinja is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise MetricUnavailable(
            "--html needs jinja2, which is not installed", "pip install 'savl[evaluate]' brings it"
        ) from error
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(files("savl.evaluation").joinpath("comparison.html.jinja").read_text("utf-8"))


def _short(folder: Path) -> str:
    """Return the last two parts of a path, so that reports do not contain the paths of a machine."""
    return "/".join(folder.resolve().parts[-2:])


def _escaped(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return " ".join("".join(f"\\{character}" if character in "\\`*_[]<>|" else character for character in text).split())


def _data_url(picture: Picture) -> str:
    """Return a picture as the source of an ``img`` element: a WebP without loss."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="webp", lossless=True)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
