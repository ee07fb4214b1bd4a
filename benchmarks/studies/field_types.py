"""Measure whether the fields of networks distinguish types and levels of degradations.

    python -m benchmarks.studies.field_types --hr FOLDER [--scenes 24] [--crops 2] [--json FILE] WEIGHTS ...

The images and figures are those of `savl analyze` (docs/analysis.md), with fewer crops and repeats, and without the
figures that take minutes. If there are several weights, such as seeds of one configuration, the mean and the range of
every figure are printed too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import savl
from savl.analysis.controlled import ControlledFeatures, collect_controlled
from savl.analysis.controlled_results import degradation_geometry, degradation_result, probe_kind
from savl.analysis.photographs import distinct_names
from savl.analysis.report import json_value
from savl.analysis.run import AnalysisConfig
from savl.analysis.summary import summarise, type_figures
from savl.images.folder import find_images
from savl.network import SAVL


def collect(models: Sequence[SAVL], hr: Sequence[Path], *, scenes: int, crops: int) -> ControlledFeatures:
    """Degrade crops of photographs and measure the fields of networks; the crops are those of `savl analyze`."""
    settings = AnalysisConfig()
    return collect_controlled(
        models,
        hr,
        scenes=scenes,
        crops=crops,
        side=settings.side,
        components=settings.components,
        seed=0,
        on_progress=lambda what, done, total: None,
    )


def measure(data: ControlledFeatures, model: int, repeats: int) -> dict[str, float]:
    """Return the figures of one network by name; accuracies are between 0 and 1.

    Args:
        data: Features of the images.
        model: Position of the network in the features.
        repeats: Repeats of the probes.
    """
    kind = probe_kind(data.degraded, model, repeats=repeats, seed=0)
    variations = [degradation_result(each, model, repeats=repeats, seed=0) for each in data.degraded]
    return type_figures(degradation_geometry(data.degraded, model), kind, variations)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the results and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+", metavar="WEIGHTS", help="shipped weights, or files")
    parser.add_argument("--hr", required=True, metavar="FOLDER", help="photographs that no network was trained on")
    parser.add_argument("--scenes", type=int, default=24, metavar="N", help="largest number of photographs")
    parser.add_argument("--crops", type=int, default=2, metavar="N", help="largest number of crops per photograph")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="repeats of the probes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    models = [savl.load(name).eval() for name in options.weights]
    for model in models:
        savl.use_fused_kernels(model=model)
    hr = find_images([options.hr], argument="--hr")
    data = collect(models, hr, scenes=options.scenes, crops=options.crops)
    names = distinct_names([Path(name) for name in options.weights], folder=True)
    found = {name: measure(data, place, options.repeats) for place, name in enumerate(names)}
    print(f"{len(data.paths)} scenes, {len(data.degraded[0].level)} images per degradation")
    summary = summarise(list(found.values()))
    for name, spread in summary.items():
        line = f"{name:20}" + "".join("       –" if value is None else f"{value:8.3f}" for value in spread.values)
        if len(found) > 1:
            line += f"   mean {spread.mean:.3f}, from {spread.lowest:.3f} to {spread.highest:.3f}"
        print(line)
    if options.json is not None:
        report = {
            "scenes": len(data.paths),
            "images": len(data.degraded[0].level),
            "networks": [*found],
            "figures": json_value(summary),
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
