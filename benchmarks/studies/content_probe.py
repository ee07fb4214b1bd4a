"""Measure how much information the fields of several networks carry about content, on many scenes.

    python -m benchmarks.studies.content_probe --hr FOLDER [--scenes 100] [--crops 3] [--json FILE] WEIGHTS ...

The measurement is that of `savl analyze` on noisy images (docs/analysis.md). Information about content is measured on
held-out scenes, so the number of scenes matters and not that of crops: two dozen scenes are too few to fit estimators.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import savl
from savl.analysis.controlled import NOISE, ControlledFeatures, collect_controlled
from savl.analysis.controlled_results import content_information, degradation_result, noise_information
from savl.analysis.photographs import distinct_names
from savl.analysis.report import json_value
from savl.analysis.run import AnalysisConfig
from savl.images.folder import find_images


def measure(data: ControlledFeatures, model: int, repeats: int) -> dict[str, Any]:
    """Return probes and information of one network, as JSON has them.

    Args:
        data: Features of the images.
        model: Position of the network in the features.
        repeats: Repeats of probes and estimators.
    """
    probes = degradation_result(data.degraded[0], model, repeats=repeats, seed=0)
    return {
        "scene": json_value(probes.scene),
        "noise": json_value(probes.level),
        "content": json_value(content_information(data, model, repeats=repeats, seed=0)),
        "degradation": json_value(noise_information(data, model, repeats=repeats, seed=0)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the results and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+", metavar="WEIGHTS", help="shipped weights, or files")
    parser.add_argument("--hr", required=True, metavar="FOLDER", help="photographs that no network was trained on")
    parser.add_argument("--scenes", type=int, default=100, metavar="N", help="largest number of photographs")
    parser.add_argument("--crops", type=int, default=3, metavar="N", help="largest number of crops per photograph")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="repeats of probes and estimators")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    models = [savl.load(name).eval() for name in options.weights]
    for model in models:
        savl.use_fused_kernels(model=model)
    settings = AnalysisConfig()
    data = collect_controlled(
        models,
        find_images([options.hr], argument="--hr"),
        scenes=options.scenes,
        crops=options.crops,
        side=settings.side,
        components=settings.components,
        seed=0,
        on_progress=lambda what, done, total: None,
        degradations=(NOISE,),
    )
    names = distinct_names([Path(name) for name in options.weights], folder=True)
    found = {name: measure(data, place, options.repeats) for place, name in enumerate(names)}
    print(f"{len(data.paths)} scenes, {len(data.degraded[0].level)} images")
    for name, each in found.items():
        content = each["content"]
        print(
            f"{name}: scene {100 * each['scene']['accuracy']['value']:.1f} %, "
            f"noise {100 * each['noise']['accuracy']['value']:.1f} %, content MINE {content['mine']['value']:.2f} "
            f"[{content['mine']['low']:.2f}, {content['mine']['high']:.2f}], CLUB {content['club']['value']:.2f}, "
            f"HSIC {content['hsic']['normalised']:.3f}, degradation MINE {each['degradation']['mine']['value']:.2f}"
        )
    if options.json is not None:
        report = {"scenes": len(data.paths), "images": len(data.degraded[0].level), "networks": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
