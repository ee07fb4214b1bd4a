"""Tables of a profile and of a roofline for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from savl.profile.measure import Profile, Time
    from savl.profile.roofline import Roofline


def amount(number: float) -> str:
    """Format a positive number with three or more digits, without an exponent if it is large."""
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def operations_table(profile: Profile, top: int, on_gpu: bool) -> Table:
    """Return a table of the operations that take longest.

    Args:
        profile: The profile.
        top: Number of operations.
        on_gpu: Whether the operations are kernels of a GPU.
    """
    kind = "kernel" if on_gpu else "operation"
    rows = profile.operations[:top]
    title = f"{len(rows)} of {len(profile.operations)} {kind}s, by their own time in a step"
    return _times_table(title, (kind, "self ms", "share", "calls"), rows)


def ranges_table(profile: Profile, on_gpu: bool) -> Table:
    """Return a table of the annotated ranges.

    Args:
        profile: The profile.
        on_gpu: Whether times are those of the kernels in the ranges.
    """
    what = "of the kernels in them" if on_gpu else "from start to end"
    title = f"ranges, by time {what} in a step; they are nested, so that shares add up to more than 100 %"
    return _times_table(title, ("range", "total ms", "of step", "calls"), profile.ranges)


def roofline_table(roofline: Roofline) -> Table:
    """Return a table of the points of a roofline, with the share of the roof that each reaches."""
    ceilings = roofline.ceilings
    peak, copy = amount(ceilings.gflops), amount(ceilings.gigabytes)
    title = f"roofline of {roofline.device}, {roofline.dtype}: {peak} GFLOP/s (matrix product), {copy} GB/s (copy)"
    table = _table(title, ("op", "backend", "MFLOP", "MB", "FLOP/byte", "ms", "GFLOP/s", "share of roof"), left=2)
    for point in roofline.points:
        table.add_row(
            point.op,
            point.backend,
            amount(point.flops / 1e6),
            amount(point.bytes / 1e6),
            amount(point.intensity),
            amount(1000 * point.seconds),
            amount(point.gflops),
            f"{point.gflops / ceilings.roof(point.intensity):.1%}",
        )
    return table


def _times_table(title: str, columns: tuple[str, ...], rows: tuple[Time, ...]) -> Table:
    table = _table(title, columns, left=1)
    for row in rows:
        table.add_row(escape(row.name), f"{1000 * row.seconds:.3f}", f"{row.share:.1%}", f"{row.calls:.4g}")
    return table


def _table(title: str, columns: tuple[str, ...], left: int) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return table
