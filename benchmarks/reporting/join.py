"""One file of results from several runs of parts of the suites, on one machine at one commit.

    python -m benchmarks.reporting.join PART.json ... -o benchmarks/results/MACHINE/suite.json

A whole run with ``--full`` takes more than an hour on two cores; ``-k`` and the names of files divide it. What was
timed side by side stays in one part. A ceiling is what a machine does at best, so the highest of the parts stands for
all, and shares are counted anew from it. The date is the first part's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import shares


def join(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The parts as one.

    Raises:
        ValueError: They come from different machines, versions or commits, or hold the same benchmark.
    """
    whole = dict(parts[0])
    benchmarks = [{**each, "extra_info": dict(each["extra_info"])} for part in parts for each in part["benchmarks"]]
    for part in parts:
        if part["devices"] != whole["devices"]:
            differing = {
                name
                for device in part["devices"].keys() | whole["devices"].keys()
                for name in part["devices"].get(device, {}).keys() | whole["devices"].get(device, {}).keys()
                if part["devices"].get(device, {}).get(name) != whole["devices"].get(device, {}).get(name)
            }
            raise ValueError(f"parts were not measured alike: they differ in {', '.join(sorted(differing))}")
    names = [each["fullname"] for each in benchmarks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"more than one part has {', '.join(twice)}")
    ceilings = {
        device: {name: max(part["ceilings"][device][name] for part in parts) for name in limits}
        for device, limits in whole["ceilings"].items()
    }
    for each in benchmarks:
        each["extra_info"] |= shares(each["extra_info"], ceilings[each["params"]["of_suite"][1]])
    return {**whole, "benchmarks": benchmarks, "ceilings": ceilings}


def main(arguments: Sequence[str] | None = None) -> None:
    """Join files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", type=Path, metavar="PART")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        whole = join([json.loads(part.read_text(encoding="utf-8")) for part in options.parts])
    except (OSError, ValueError, KeyError) as error:
        parser.error(str(error) if not isinstance(error, KeyError) else f"no results of the suites: {error} is missing")
    options.output.write_text(json.dumps(whole, indent=4) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
