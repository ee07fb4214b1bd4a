"""Whole analyses of small networks: their results, the JSON and the page."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from savl.analysis import controlled_results
from savl.analysis.factor_table import FactorTable
from savl.analysis.report import json_value, render_page, report_json, types_svg
from savl.analysis.run import Analysis, AnalysisConfig, analyze
from savl.evaluation.intervals import AnalysisUnavailable
from savl.network import SAVL

Make = Callable[..., SAVL]
Write = Callable[..., list[Path]]

SMALL = AnalysisConfig(scenes=4, crops=1, side=16, repeats=2, information_repeats=1, components=2, images=2, pictures=1)
SECTIONS = [
    "summary",
    "probes",
    "types",
    "severity",
    "truth",
    "tables",
    "tsne",
    "channels",
    "photographs",
    "conditions",
]

pytestmark = pytest.mark.usefixtures("short_estimators")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, write_photographs: Write) -> FactorTable:
    """Return a table of twelve images with two cameras, increasing ISO and one lens."""
    paths = write_photographs(tmp_path_factory.mktemp("shots"), 12, height=20, width=24)
    return FactorTable(
        "shots.csv",
        tuple(paths),
        {
            "camera": tuple(("Nikon", "<b>Canon</b>")[row % 2] for row in range(12)),
            "iso": tuple(str(100 * 2 ** (row // 2)) for row in range(12)),
            "lens": ("one",) * 12,
        },
    )


@pytest.fixture(scope="module")
def models(network: Make) -> dict[str, SAVL]:
    """Return a variational and a deterministic network."""
    return {"<i>mine</i>": network(), "baseline": network(degradation_code="deterministic")}


@pytest.fixture(scope="module")
def hr(tmp_path_factory: pytest.TempPathFactory, write_photographs: Write) -> list[Path]:
    """Return five photographs; with the settings of these tests, four of them are degraded."""
    return write_photographs(tmp_path_factory.mktemp("hr"), 5)


@dataclass
class Report:
    """An analysis, its page and its JSON, and the last progress of every task."""

    found: Analysis
    html: bytes
    json: bytes
    progress: dict[str, tuple[int, int]]


@pytest.fixture(scope="module")
def report(short_estimators: None, models: dict[str, SAVL], hr: list[Path], table: FactorTable) -> Report:
    """Analyse both networks once for all tests of this module."""
    progress: dict[str, tuple[int, int]] = {}

    def on_progress(what: str, done: int, total: int) -> None:
        progress[what] = (done, total)

    found = analyze(models, hr=hr, tables=[table], real=hr[:1], config=SMALL, on_progress=on_progress)
    return Report(found, render_page(found, on_progress), report_json(found), progress)


class Page(HTMLParser):
    """Parse a page: sections with their text, and the address of everything that a browser would load."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.images: dict[str, int] = {}
        self._section: str | None = None
        self.feed(page.decode())
        self.sections = {name: " ".join(text.split()) for name, text in self.sections.items()}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag == "section":
            self._section = given["id"] or ""
            self.sections[self._section] = ""
        if tag == "img" and self._section:
            assert given["alt"]
            self.images[self._section] = self.images.get(self._section, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        if self._section is not None:
            self.sections[self._section] += data


def test_the_page_shows_all_results(report: Report) -> None:
    page, found = Page(report.html), report.found
    assert all(done == total for done, total in report.progress.values()), report.progress
    assert report.progress["photographs"] == (4, 4), "of five, four are taken"
    assert {"upscaling", "shots.csv", "figures", "probes and information: baseline"} <= set(report.progress)

    first, second = found.models
    assert (first.code, second.code, first.latent) == ("variational", "deterministic", 5)
    assert first.factorial is not None
    assert second.factorial is not None
    assert first.factorial.agreement is not None
    assert second.factorial.agreement is None
    assert first.factorial.restoration.images == 2
    assert found.photographs is not None
    for place, model in enumerate(found.models):
        assert model.factorial is not None
        for result, estimate in (
            (model.factorial.content, controlled_results.content_information),
            (model.factorial.degradation, controlled_results.noise_information),
        ):
            assert result == estimate(found.photographs, place, repeats=1, seed=0), "each of its own features"
    assert first.factorial.degradation != second.factorial.degradation
    assert [factor.name for factor in first.tables[0].factors] == ["camera", "iso", "lens"]
    assert first.tables[0].factors[0].probe is not None
    assert first.tables[0].factors[1].severity is not None
    assert second.tables[0].factors[1].not_correlated == "a deterministic code has no severity"

    assert list(page.sections) == SECTIONS
    assert page.images == {
        "types": 1, "severity": 1, "truth": 1, "tables": 1, "tsne": 4, "channels": 1, "photographs": 1,
    }  # fmt: skip
    images = ("data:image/png;base64,", "data:image/svg+xml;base64,")
    assert all(address.startswith((*images, "#")) for address in page.addresses), "self-contained"
    assert "i" not in page.tags
    assert "b" not in page.tags
    summary = page.sections["summary"]
    for expected in ("<i>mine</i>", "baseline", "49.97", "94.80", "0.1507", "1.0254", "36.44", "0.2700", "1.609"):
        assert expected in summary, expected
    accuracy = first.factorial.variations[0].level.accuracy.value
    assert f"{100 * accuracy:.1f}" in page.sections["probes"]
    geometry = first.factorial.geometry
    assert f"Participation ratio ↑ {geometry.participation_ratio:.2f}" in page.sections["types"]
    assert f"Cosine of blur and JPEG {geometry.cosines['blur_jpeg']:+.2f}" in page.sections["types"]
    assert "has one class only: one" in page.sections["tables"]
    assert "a deterministic code has no severity" in page.sections["truth"]
    assert "4 scenes are too few for conclusions" in summary


def test_the_json_holds_all_results_and_their_conditions(report: Report, hr: list[Path]) -> None:
    read = json.loads(report.json, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(read) == {"version", "savl", "config", "conditions", "published", "models", "summary"}
    assert read["config"]["scenes"] == 4
    assert read["conditions"]["photographs"] == [hr[place].name for place in (0, 1, 3, 4)], "evenly spaced"
    assert read["conditions"]["tables"] == [{"name": "shots.csv", "images": 12}]
    assert read["conditions"]["levels"]["noise"] == [0, 5, 10, 20, 30]
    assert read["published"][0] == {"name": "SAVL", "scene": 0.4997, "noise_level": 0.948, "content_mine": 0.1507}
    model, _ = read["models"]
    factorial = model["factorial"]
    assert set(factorial) == {
        "variations", "kind", "geometry", "content", "degradation", "channels", "agreement", "restoration",
    }  # fmt: skip
    level = factorial["variations"][0]["level"]
    assert set(level["accuracy"]) == {"value", "low", "high", "repeats"}
    assert level["chance"] == 0.2
    assert factorial["content"]["mine"]["low"] is None, "one repeat has no interval"
    assert factorial["degradation"]["club"] is None
    assert len(factorial["channels"][0]["sweep"]) == 5
    assert list(factorial["agreement"]["images"]) == ["scene0", "scene4"]
    assert factorial["restoration"]["model"]["psnr_y"] > 0
    assert model["tables"][0]["factors"][0]["classes"] == {"<b>Canon</b>": 6, "Nikon": 6}


def test_trainings_of_one_configuration_are_summarised_by_mean_and_range(report: Report) -> None:
    one = json.loads(report.json)["summary"]
    assert one["models"] == ["<i>mine</i>"], "weights that are compared are not averaged"
    found = replace(report.found, trainings=2)
    both = json.loads(report_json(found))["summary"]
    assert both["models"] == ["<i>mine</i>", "baseline"]
    figures = both["figures"]
    for name, values in (
        (
            "participation_ratio",
            [each.factorial.geometry.participation_ratio for each in found.models if each.factorial],
        ),
        ("kind", [each.factorial.kind.accuracy.value for each in found.models if each.factorial]),
        ("psnr_y", [each.factorial.restoration.model.psnr_y for each in found.models if each.factorial]),
    ):
        assert figures[name]["values"] == values
        assert figures[name]["mean"] == pytest.approx(sum(values) / 2)
        assert (figures[name]["lowest"], figures[name]["highest"]) == (min(values), max(values))
    agreement = figures["mask_agreement"]
    assert agreement["values"] == [agreement["mean"], None], "a deterministic code has no severity"
    assert set(figures) >= {
        "cosine_noise_blur", "component_3", "noise_level", "scene_jpeg", "content_mine", "degradation_hsic",
        "severity_blur", "shots.csv/camera/accuracy", "shots.csv/iso/severity",
    }  # fmt: skip
    page = Page(render_page(found)).sections
    assert list(page) == ["summary", "trainings", *SECTIONS[1:]]
    assert f"mask_agreement {agreement['mean']:.3f} – {agreement['mean']:.3f}" in page["trainings"]


def test_the_agreement_with_masks_is_the_mean_over_the_images(report: Report) -> None:
    found = report.found
    assert found.models[0].factorial is not None
    agreement = found.models[0].factorial.agreement
    assert agreement is not None
    assert agreement.mean == pytest.approx(sum(agreement.images.values()) / 2)
    assert found.masked[0].correlation == agreement.images["scene0"]
    assert f"mine</i> {agreement.mean:+.2f} {agreement.median:+.2f}" in Page(report.html).sections["truth"]


def test_equal_seeds_give_equal_bytes_and_other_seeds_give_others(
    report: Report, models: dict[str, SAVL], hr: list[Path], table: FactorTable
) -> None:
    torch.manual_seed(6)
    again = analyze(models, hr=hr, tables=[table], real=hr[:1], config=SMALL)
    assert report_json(again) == report.json
    assert render_page(again) == report.html
    other = analyze({"mine": models["<i>mine</i>"]}, hr=hr, config=replace(SMALL, seed=1))
    assert other.models[0].factorial != report.found.models[0].factorial


def test_photographs_and_a_deterministic_code_are_enough_and_the_page_says_what_is_missing(
    models: dict[str, SAVL], hr: list[Path]
) -> None:
    found = analyze({"code": models["baseline"]}, hr=hr, real=hr, config=SMALL)
    assert found.masked == found.real == ()
    page = Page(render_page(found))
    for section in ("severity", "truth", "photographs"):
        assert "Not measured: code has a deterministic code, which has no variance." in page.sections[section]
    assert "Not measured: no table of images was given (--table)." in page.sections["tables"]
    assert set(page.images) == {"types", "tsne", "channels"}


def test_tables_are_enough_and_the_page_says_what_is_missing(network: Make, table: FactorTable) -> None:
    found = analyze({"mine": network()}, tables=[table], config=SMALL)
    page = Page(render_page(found))
    for section in ("summary", "probes", "types", "severity", "truth", "channels"):
        assert "Not measured: no photographs were given (--hr)." in page.sections[section]
    assert "Not measured: no photographs were given (--real)." in page.sections["photographs"]
    assert page.images == {"tables": 1, "tsne": 1}
    assert json.loads(report_json(found))["models"][0]["factorial"] is None
    assert types_svg(found) is None


def test_invalid_models_and_missing_images_are_refused(network: Make, photographs: Write) -> None:
    paths = photographs(2)

    def refused(models: dict[str, SAVL], message: str, **given: Any) -> None:
        with pytest.raises(ValueError, match=message):
            analyze(models, config=SMALL, **given)

    refused({}, "at least one network", hr=paths)
    refused({"mine": network()}, "hr or tables must be given")
    refused({"mine": network(), "hat": network(degradation_code="none")}, "^hat has no degradation field", hr=paths)
    refused(
        {"mine": network()}, "trainings must be between 1 and the number of models, 1, got 2", hr=paths, trainings=2
    )
    refused({"a": network(), "b": network(scale=2)}, "of one scale.* a ×4, b ×2", hr=paths)


def test_a_missing_scikit_learn_is_reported_before_any_image_is_read(
    network: Make, photographs: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    reported: list[str] = []
    with pytest.raises(AnalysisUnavailable, match=r"an analysis needs scikit-learn.*savl\[analyze\]"):
        analyze({"mine": network()}, hr=photographs(4), on_progress=lambda what, done, total: reported.append(what))
    assert reported == []


@pytest.mark.parametrize(("name", "value"), [("scenes", 1), ("side", 7), ("repeats", 0), ("seed", -1), ("crops", 0)])
def test_settings_out_of_range_are_reported(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least {value + 1}, got {value}"):
        AnalysisConfig(**{name: value})
    with pytest.raises(TypeError, match=name):
        AnalysisConfig(**{name: str(value)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be at most 4294967295, got 4294967296"):
        AnalysisConfig(seed=2**32)


def test_a_quick_analysis_keeps_the_seed_and_never_grows() -> None:
    quick = AnalysisConfig(seed=3, scenes=5).quick()
    assert (quick.seed, quick.scenes) == (3, 5)
    assert AnalysisConfig().quick().scenes == 8
    assert quick.repeats < AnalysisConfig().repeats


def test_json_value_leaves_nothing_that_json_cannot_hold() -> None:
    assert json_value({"a": (1.5, float("inf"), float("nan")), 2: [None, True]}) == {
        "a": [1.5, None, None],
        "2": [None, True],
    }
