"""Compare two results of the suites, taking noise into account.

    pytest benchmarks/ --benchmark-only --benchmark-json=before.json
    pytest benchmarks/ --benchmark-only --benchmark-json=after.json
    python -m benchmarks.reporting.compare before.json after.json            # what changed; --all: everything
    python -m benchmarks.reporting.compare before.json after.json --against eager

A time has changed if the ranges between the quartiles do not overlap and the medians differ by more than the margin. On
a machine with other load, the times of two runs differ for other reasons. ``--against`` therefore compares ratios to
another variant of the same entry, which took turns with it in the same run. A change of such a ratio is a change of the
kernel, not of the machine.

The exit code is 1 if a benchmark became slower, and 2 if the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARGIN = 0.05


@dataclass(frozen=True)
class Time:
    """Time of one benchmark in seconds, or its ratio to the time of another."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    @property
    def noise(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        return (self.high - self.low) / 2 / self.median

    def over(self, other: Time) -> Time:
        """Return the ratio to another time, with the widest range that both ranges of quartiles allow."""
        return Time(self.median / other.median, self.low / other.high, self.high / other.low)


@dataclass(frozen=True)
class Change:
    """One benchmark in both files."""

    name: str
    before: Time
    after: Time

    @property
    def ratio(self) -> float:
        """Median time after the change divided by the median time before."""
        return self.after.median / self.before.median

    def verdict(self, margin: float) -> str:
        """Return ``"slower"``, ``"faster"`` or ``"same"``."""
        if self.ratio > 1 + margin and self.after.low > self.before.high:
            return "slower"
        if self.ratio < 1 / (1 + margin) and self.after.high < self.before.low:
            return "faster"
        return "same"


def times(content: Mapping[str, Any], against: str | None = None) -> dict[str, Time]:
    """Return the times of a pytest-benchmark file by the name of the benchmark.

    Args:
        content: Content of the file.
        against: Divide by the time of this variant of the same entry; benchmarks of entries without it are left out.
    """
    known = {}
    for each in content["benchmarks"]:
        stats = each["stats"]
        known[each["name"]] = (each["group"], Time(stats["median"], stats["q1"], stats["q3"]))
    if against is None:
        return {name: time for name, (_, time) in known.items()}
    peers = {group: time for name, (group, time) in known.items() if name.endswith(f"-{against}]")}
    return {
        name: time.over(peers[group])
        for name, (group, time) in known.items()
        if group in peers and not name.endswith(f"-{against}]")
    }


def changes(before: Mapping[str, Time], after: Mapping[str, Time]) -> list[Change]:
    """Return the changes of the entries that both have, the largest slowdown first."""
    both = [Change(name, before[name], after[name]) for name in before if name in after]
    return sorted(both, key=lambda change: -change.ratio)


def load(path: Path) -> dict[str, Any]:
    """Read a file of pytest-benchmark.

    Raises:
        ValueError: The file cannot be read or is not one of pytest-benchmark; the message gives the reason.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for each in content["benchmarks"]:
            _ = each["name"], each["group"], each["stats"]["median"], each["stats"]["q1"], each["stats"]["q3"]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a file of --benchmark-json ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a file of --benchmark-json")
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two files and print the changes; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--against", metavar="VARIANT", help="compare ratios to this variant of the same entry")
    parser.add_argument(
        "--margin", type=float, default=MARGIN, help=f"smallest relative change that counts (default: {MARGIN:g})"
    )
    parser.add_argument("--all", action="store_true", help="also print benchmarks that have not changed")
    given = parser.parse_args(arguments)
    try:
        contents = [load(given.before), load(given.after)]
        both = changes(*(times(content, given.against) for content in contents))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not both:
        print("the files have no benchmark in common", file=sys.stderr)
        return 2
    devices = [content.get("machine_info", {}).get("device") for content in contents]
    if devices[0] != devices[1]:
        print(f"the files were measured on different devices: {devices[0]} and {devices[1]}", file=sys.stderr)
    unit, scale = ("", 1.0) if given.against else (" ms", 1000.0)
    verdicts = [change.verdict(given.margin) for change in both]
    shown = [
        (change, verdict) for change, verdict in zip(both, verdicts, strict=True) if given.all or verdict != "same"
    ]
    if shown:
        print("| benchmark | before | after | ratio | |\n|---|---:|---:|---:|---|")
    for change, verdict in shown:
        before, after = (
            f"{scale * time.median:.4g}{unit} ± {time.noise:.0%}" for time in (change.before, change.after)
        )
        print(f"| {change.name} | {before} | {after} | {change.ratio:.2f} | {verdict} |")
    names = [{each["name"] for each in content["benchmarks"]} for content in contents]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("slower", "faster", "same"))
    print(f"{len(both)} compared: {counts}; {len(names[0] - names[1])} gone, {len(names[1] - names[0])} new")
    return 1 if "slower" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
