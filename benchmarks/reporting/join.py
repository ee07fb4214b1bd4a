"""Join the results of several runs, each of a part of the suites, into one file.

    python -m benchmarks.reporting.join PART.json ... -o benchmarks/results/MACHINE/suite.json

A complete run with ``--full`` takes more than an hour on two cores; ``-k`` and the names of files divide it into parts.
All parts must come from the same machine and commit. Variants that are compared must be in the same part. The highest
ceiling of all parts is used for all of them, and the shares of the ceilings are computed again. The date is that of the
first part.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import shares


def join(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the results of all parts as one.

    Raises:
        ValueError: The parts come from different machines, versions or commits, or hold the same benchmark.
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
            raise ValueError(f"the parts cannot be joined: they differ in {', '.join(sorted(differing))}")
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
    """Join the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", type=Path, metavar="PART")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        whole = join([json.loads(part.read_text(encoding="utf-8")) for part in options.parts])
    except (OSError, ValueError, KeyError) as error:
        parser.error(
            str(error)
            if not isinstance(error, KeyError)
            else f"a part is not a result of the suites: {error} is missing"
        )
    options.output.write_text(json.dumps(whole, indent=4) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
