"""`savl kernels`: what serves each op on this machine, and whether it computes the right thing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from savl.ops.equivalence import Verdict

app = typer.Typer(no_args_is_help=True, help="Which kernels serve on this machine, and whether they are right.")


@app.command()
def info(
    eager: Annotated[bool, typer.Option("--eager", help="As `savl upscale --eager` would run.")] = False,
) -> None:
    """Say, per op, which backend serves `savl upscale` and why each other does not.

    SAVL_KERNELS in the environment is heeded; docs/environment.md has all variables.
    """
    from rich.console import Console
    from rich.table import Table

    from savl.cli.fused import fused_unless
    from savl.ops import kernel_report

    with fused_unless(eager):
        report = kernel_report()
    table = Table()
    for column in ("op", "backend", "serves", "why"):
        table.add_column(column, overflow="fold")
    previous = ""
    for status in report.statuses:
        op = status.op if status.op != previous else ""
        style = "bold" if status.serves else "dim"
        table.add_row(op, status.backend, "yes" if status.serves else "no", status.reason, style=style)
        previous = status.op
    console = Console()
    console.print(table)
    console.print(report.describe_machine(), highlight=False, soft_wrap=True)


@app.command()
def verify(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A row for every case.")] = False,
) -> None:
    """Hold every fused kernel that serves here against the float64 reference, forward and backward.

    A kernel may be off by twice the error of the eager path in its own dtype, and by half a unit in the last place.
    Takes less than a minute. Exit code 1 if a kernel is off by more.
    """
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from savl.ops.equivalence import verify as verify_op
    from savl.ops.switch import BACKENDS, OPS, why_unavailable

    console, errors = Console(), Console(stderr=True)
    verdicts: dict[tuple[str, str], list[Verdict]] = {}
    skipped: dict[tuple[str, str], str] = {}
    progress = Progress(console=errors, transient=True) if errors.is_terminal else None
    with progress or nullcontext():
        bar = progress.add_task("verifying", total=sum(len(BACKENDS[op]) for op in OPS)) if progress else None
        for op in OPS:
            for backend in BACKENDS[op]:
                reason = why_unavailable(op, backend)
                if reason is not None:
                    skipped[op, backend] = reason
                else:
                    verdicts[op, backend] = list(verify_op(op, backend))
                if progress is not None and bar is not None:
                    progress.advance(bar)

    failures = 0
    for (op, backend), found in verdicts.items():
        table = Table(title=f"{op} · {backend}", title_justify="left")
        for column in ("dtype", "case" if verbose else "cases", "worst result", "error", "allowed", ""):
            table.add_column(column)
        for rows in _grouped(found, verbose):
            failed = [verdict for verdict in rows if not verdict.worst.kept]
            failures += len(failed)
            shown = failed[0] if failed else max(rows, key=lambda verdict: verdict.worst.used)
            what = shown.case.label if verbose or failed else str(len(rows))
            budget = shown.worst
            dtype = str(shown.dtype).removeprefix("torch.")
            mark = "[red]off[/red]" if failed else "[green]ok[/green]"
            table.add_row(dtype, what, budget.name, f"{budget.error:.1e}", f"{budget.allowed:.1e}", mark)
        console.print(table)
    for (op, backend), reason in skipped.items():
        console.print(f"{op} · {backend}: not here, {reason}", highlight=False)
    cases = sum(len(found) for found in verdicts.values())
    console.print(f"{cases - failures} of {cases} cases within twice the error of the eager path", highlight=False)
    if not verdicts:
        console.print("nothing to verify: only the eager reference serves here", highlight=False)
    raise typer.Exit(1 if failures else 0)


def _grouped(verdicts: list[Verdict], verbose: bool) -> list[list[Verdict]]:
    """One group a case, or one a dtype."""
    if verbose:
        return [[verdict] for verdict in verdicts]
    dtypes = dict.fromkeys(verdict.dtype for verdict in verdicts)
    return [[verdict for verdict in verdicts if verdict.dtype == dtype] for dtype in dtypes]
