"""What the degradation field of a network knows of degradations whose truth is known.

    python -m benchmarks.field --hr FOLDER [--model savl-tiny] [--json FILE]

Images are degraded through random masks by the published pipeline (docs/degradation.md, strength 1, seed 0), and the
severity map of each is compared with the true one by Spearman's rank correlation: positive where the map is high where
the image is degraded more.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import savl
from savl.evaluation.severity import severity_agreement
from savl.inference.image_folder import find_images


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hr", required=True, metavar="FOLDER", help="high-resolution images")
    parser.add_argument("--model", default="savl-tiny", help="shipped weights, or a file")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    images = find_images([options.hr], argument="--hr")
    found = [asdict(each) for each in severity_agreement(savl.load(options.model).eval(), images)]
    summary = {
        name: {"mean": statistics.fmean(each[name] for each in found),
               "median": statistics.median(each[name] for each in found)}
        for name in ("correlation", "smoothed")
    }  # fmt: skip
    report = {"hr": "/".join(Path(options.hr).resolve().parts[-2:]), "seed": 0, **summary, "images": found}
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, values in summary.items():
        print(f"{name}: mean {values['mean']:.3f}, median {values['median']:.3f} over {len(found)} images")


if __name__ == "__main__":
    main()
