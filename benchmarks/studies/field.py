"""Compare the severity maps of a network with the masks that images were degraded through.

    python -m benchmarks.studies.field --hr FOLDER [--model savl-tiny] [--json FILE]

Images are degraded through random masks by the published pipeline (docs/degradation.md, strength 1, seed 0), and by
single operations of it: noise, blur or JPEG. Severity map and mask are compared by Spearman's rank correlation, which
is positive if the map is high where the image is degraded more.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import savl
from savl.degradation import DegradationConfig
from savl.degradation.config import OPERATIONS, SingleConfig
from savl.evaluation.severity import severity_agreement
from savl.images.folder import find_images
from savl.network import SAVL

PUBLISHED = DegradationConfig()
DEGRADATIONS = {"all": PUBLISHED} | {
    name: DegradationConfig(single_operation=1.0, single=SingleConfig(operations=(name,))) for name in OPERATIONS
}
"""Degradations by name: the whole pipeline, and single operations at the low-resolution size."""


def measure(model: SAVL, images: Sequence[Path]) -> dict[str, Any]:
    """Return mean and median correlations by degradation, and those of every image for the whole pipeline."""
    report: dict[str, Any] = {}
    for name, config in DEGRADATIONS.items():
        found = [asdict(each) for each in severity_agreement(model, images, config)]
        report[name] = {
            kind: {"mean": statistics.fmean(each[kind] for each in found),
                   "median": statistics.median(each[kind] for each in found)}
            for kind in ("correlation", "smoothed")
        }  # fmt: skip
        if name == "all":
            report[name]["images"] = found
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the results and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hr", required=True, metavar="FOLDER", help="high-resolution images")
    parser.add_argument("--model", default="savl-tiny", help="shipped weights, or a file")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    images = find_images([options.hr], argument="--hr")
    found = measure(savl.load(options.model).eval(), images)
    if options.json is not None:
        report = {"hr": "/".join(Path(options.hr).resolve().parts[-2:]), "seed": 0, "degradations": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, by_kind in found.items():
        map_, smoothed = by_kind["correlation"], by_kind["smoothed"]
        print(
            f"{name}: mean {map_['mean']:.3f}, median {map_['median']:.3f}; "
            f"smoothed {smoothed['mean']:.3f}, {smoothed['median']:.3f}; {len(images)} images"
        )


if __name__ == "__main__":
    main()
