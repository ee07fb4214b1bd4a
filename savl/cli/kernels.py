"""`savl kernels`: report which kernels are used on this machine, verify them, and tune them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from savl.cli.tune import DTYPES, config_label, problem_label, tune, tuning_problems
from savl.command_line import CommandLine
from savl.interrupts import raise_on_interrupt

if TYPE_CHECKING:
    from rich.console import Console

    from savl.kernels.targets import Architecture
    from savl.ops import KernelReport
    from savl.ops.equivalence import Verdict

app = CommandLine(no_args_is_help=True, help="Report, verify and tune the fused kernels on this machine.")


@app.command(
    epilog="[bold]Keys of --json[/bold] savl, torch, threads, instruction_set, gpus; extension (compiler, torch) and "
    "cuda_library (compiler, architectures), null where they are missing; ops: for each op serves (the backend for cpu "
    "and for cuda tensors, null without a GPU) and backends (of each its device, dtypes, serves and reason).",
)
def info(
    eager: Annotated[bool, typer.Option("--eager", help="Report the kernels of `savl upscale --eager`.")] = False,
    everything: Annotated[
        bool,
        typer.Option("--all", help="List every backend of every op, and the block sizes of the Triton kernels."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="As --all, with block sizes for all dtypes, not for bfloat16 only.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with the keys below.")] = False,
) -> None:
    """Report which backend `savl upscale` uses for each op on this machine, and why it does not use the others.

    With --all, the report also contains the architectures that the CUDA library was built for, and the block sizes of
    the Triton kernels with their source. They are listed for each attention problem of the named networks and for each
    GPU of this machine; without a GPU, for some architectures.

    The environment variable SAVL_KERNELS applies; docs/environment.md lists all variables.
    """
    from rich.console import Console

    from savl.ops import kernel_report
    from savl.ops.scopes import fused_by_default

    if as_json and (everything or verbose):
        raise typer.BadParameter(
            "it has every backend already; it goes with neither --all nor --verbose", param_hint="--json"
        )
    with fused_by_default(eager=eager):
        report = kernel_report()
    if as_json:
        import json

        typer.echo(json.dumps(_as_json(report), indent=1))
        return
    console = Console()
    if everything or verbose:
        _print_backends(console, report)
        _print_triton_kernels(console, report.gpus, DTYPES if verbose else ("bfloat16",))
        _print_cuda_architectures(console, report.gpus, report.build["cuda_architectures"])
        return
    console.print(_overview(report, max(60, min(console.width, 100))), highlight=False, markup=False, soft_wrap=True)
    for reason in _unfit_gpus(len(report.gpus)):
        console.print(reason, highlight=False, markup=False, soft_wrap=True)
    console.print(
        "--all lists every backend and block size, --json prints the report as JSON", style="dim", highlight=False
    )


def _overview(report: KernelReport, width: int) -> str:
    """Return a table of the serving backends by device, followed by each reason why another does not serve, once.

    Args:
        report: Result of `savl.kernel_report`.
        width: Column at which the reasons are wrapped.
    """
    import textwrap

    from savl.kernels.gpu import DEVICE
    from savl.ops.library import EAGER, FUSED
    from savl.ops.op import OPS, why_unavailable
    from savl.ops.report import aligned

    devices = {"cpu": "on the CPU"} | ({DEVICE: "on a GPU"} if report.gpus else {})
    rows = [("op", *devices.values()), *((op, *(report.serving(op, device) for device in devices)) for op in OPS)]
    serving = {backend for row in rows[1:] for backend in row[1:]}
    notes = [f"{name} takes {', '.join(kernels.dtypes)}" for name, kernels in FUSED.items() if name in serving]
    reasons: dict[tuple[str, str], list[str]] = {}
    for status in report.statuses:
        if status.backend != EAGER and not status.serves:
            reasons.setdefault((status.backend, status.reason), []).append(status.op)
    shared: dict[tuple[str, str], list[str]] = {}  # backends by the ops concerned (empty for all) and the reason
    for (backend, reason), ops in reasons.items():
        everywhere = ops == [name for name, op in OPS.items() if backend in op.backends]
        shared.setdefault(("" if everywhere else f" {', '.join(ops)}", reason), []).append(backend)
    for (concerned, reason), backends in shared.items():
        notes.append(f"{' and '.join(backends)} {'do' if backends[1:] else 'does'} not serve{concerned}: {reason}")
    for status in report.statuses:  # a backend that raises is not replaced by another
        if status.serves and why_unavailable(status.op, status.backend) is not None:
            notes.append(f"{status.backend} for {status.op}: {status.reason}")
    notes += ["eager is the reference: it serves whatever no other backend takes"]
    notes += report.describe_machine().replace("; ", "\n").splitlines()
    wrapped = [
        textwrap.fill(note, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=True)
        for note in notes
    ]
    return "\n".join([*aligned(rows), "", *wrapped])


def _as_json(report: KernelReport) -> dict[str, Any]:
    """Return the report as an object for JSON, with the keys that the help explains."""
    from savl.kernels.gpu import DEVICE
    from savl.ops.library import EAGER, FUSED

    build = report.build
    extension = {"compiler": build["compiler"], "torch": build["built_against_torch"]}
    library = {"compiler": build["cuda_compiler"], "architectures": list(build["cuda_architectures"])}
    ops: dict[str, Any] = {}
    for status in report.statuses:
        serves = {"cpu": report.serving(status.op), DEVICE: report.serving(status.op, DEVICE) if report.gpus else None}
        dtypes = list(FUSED[status.backend].dtypes) if status.backend != EAGER else None
        backend = {"device": status.device, "dtypes": dtypes, "serves": status.serves, "reason": status.reason}
        ops.setdefault(status.op, {"serves": serves, "backends": {}})["backends"][status.backend] = backend
    return {
        "savl": build["version"],
        "torch": build["torch"],
        "threads": report.threads,
        "instruction_set": report.instruction_set,
        "gpus": list(report.gpus),
        "extension": extension if build["extension"] else None,
        "cuda_library": library if build["cuda"] else None,
        "ops": ops,
    }


def _unfit_gpus(count: int) -> list[str]:
    """Return the reasons why usable GPU kernels cannot run on some of the GPUs, each reason once."""
    from savl.ops.gpu import why_unfit
    from savl.ops.library import FUSED

    usable = [name for name, kernels in FUSED.items() if kernels.device != "cpu" and kernels.unavailable is None]
    reasons = dict.fromkeys(why_unfit(name, index) for index in range(count) for name in usable)
    return [reason for reason in reasons if reason is not None]


@app.command()
def verify(
    everything: Annotated[
        bool, typer.Option("--all", help="Test more and larger cases, which takes 20 s of processor time.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print a row for every case.")] = False,
) -> None:
    """Compare every fused kernel that runs on this machine with the float64 reference, forward and backward.

    Every op is tested in every dtype of its kernels and with all its options (with and without severity, shifted or
    not, odd sizes, …). The error of a kernel may be at most twice the error of the eager path in the same dtype, plus
    half a unit in the last place. The exit code is 1 if the error of a kernel is larger.

    The command takes 5 s of processor time, including its start, and longer if Triton compiles its kernels for the
    first time.
    """
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from savl.ops.equivalence import verify as verify_op
    from savl.ops.op import OPS, why_unavailable
    from savl.ops.switch import KernelUnavailable

    console, errors = Console(), Console(stderr=True)
    verdicts: dict[tuple[str, str], list[Verdict]] = {}
    skipped: dict[tuple[str, str], str] = {}
    pairs = [(name, backend) for name, op in OPS.items() for backend in op.backends]
    progress = Progress(console=errors, transient=True) if errors.is_terminal else None
    with raise_on_interrupt(), progress or nullcontext():
        bar = progress.add_task("verifying", total=len(pairs)) if progress else None
        for op, backend in pairs:
            reason = why_unavailable(op, backend)
            try:
                if reason is None:
                    verdicts[op, backend] = list(verify_op(op, backend, quick=not everything))
            except KernelUnavailable as error:  # there is a GPU, but it is too old
                reason = str(error)
            if reason is not None:
                skipped[op, backend] = reason
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
        console.print(f"{op} · {backend}: not here, {reason}", markup=False, highlight=False)
    cases = sum(len(found) for found in verdicts.values())
    console.print(f"{cases - failures} of {cases} cases within twice the error of the eager path", highlight=False)
    if not verdicts:
        console.print("nothing to verify: only the eager reference is available here", highlight=False)
    raise typer.Exit(1 if failures else 0)


def _grouped(verdicts: list[Verdict], verbose: bool) -> list[list[Verdict]]:
    """Return the verdicts in groups: one for each case, or one for each dtype."""
    if verbose:
        return [[verdict] for verdict in verdicts]
    dtypes = dict.fromkeys(verdict.dtype for verdict in verdicts)
    return [[verdict for verdict in verdicts if verdict.dtype == dtype] for dtype in dtypes]


def _print_backends(console: Console, report: KernelReport) -> None:
    """Print a row for every backend of every op; op names are never folded."""
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in ("op", "backend", "tensors", "serves"):
        table.add_column(column, no_wrap=True)
    table.add_column("why", overflow="fold")
    previous = ""
    for status in report.statuses:
        op = status.op if status.op != previous else ""
        style = "bold" if status.serves else "dim"
        table.add_row(
            op, status.backend, status.device, "yes" if status.serves else "no", escape(status.reason), style=style
        )
        previous = status.op
    console.print(table)
    console.print(report.describe_machine(), highlight=False, soft_wrap=True)


def _print_triton_kernels(console: Console, gpus: Sequence[str], dtypes: Sequence[str]) -> None:
    """Print the block sizes of every Triton kernel: on the GPUs here, or by the rule for some architectures."""
    from rich.markup import escape
    from rich.table import Table

    from savl.kernels import configs
    from savl.kernels.gpu import architecture_of
    from savl.network import CONFIGS
    from savl.ops.gpu import why_unfit
    from savl.ops.library import TRITON, TRITON_UNAVAILABLE

    targets: dict[str, tuple[str | None, Architecture]] = {}
    for index, name in enumerate(gpus):
        if (reason := why_unfit(TRITON, index)) is not None:
            console.print(f"Triton kernels: {reason}", markup=False, highlight=False, soft_wrap=True)
        else:
            targets[name] = name, architecture_of(index)
    here = bool(targets)
    for capability in () if here else ((8, 0), (9, 0), (10, 0)):
        targets[f"sm_{capability[0]}{capability[1]}"] = None, capability
    if TRITON_UNAVAILABLE is not None:
        console.print(
            f"Triton kernels: none can run here: {TRITON_UNAVAILABLE}", markup=False, highlight=False, soft_wrap=True
        )
    table = Table(
        title="Triton kernels: queries × keys of a tile, warps, pipeline stages",
        caption="fold_bias, the last kernel of the backward pass, has no block sizes",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("networks", "problem", "kernel", *(escape(name) for name in targets)):
        table.add_column(column, overflow="fold", no_wrap=column == "kernel")
    for dtype in dtypes:
        for names, tuning_problem in tuning_problems(dtype, tuple(CONFIGS)):
            problem = tuning_problem.problem
            ran = [configs.stages_of(problem, capability) for _, capability in targets.values()]
            shown = [stage for stage in configs.STAGES if any(stage in each for each in ran)]
            for stage in shown:
                cells = []
                for target, stages in zip(targets.values(), ran, strict=True):
                    if stage not in stages:
                        cells.append("–")
                        continue
                    config, source = configs.config_for(stage, problem, *target)
                    cells.append(config_label(config) + (f" · {source}" if here else ""))
                first = stage == shown[0]
                labels = (", ".join(names), problem_label(problem)) if first else ("", "")
                table.add_row(*labels, stage, *cells, end_section=stage == shown[-1])
    console.print(table)
    if not here:
        console.print("By the rule: this machine has no GPU that can run them.", highlight=False, soft_wrap=True)
    for name in dict.fromkeys(name for name, _ in targets.values() if name is not None):
        for _, store in configs.stores(name):
            for reason in store.ignored:
                console.print(f"ignored in {store.path}: {reason}", markup=False, highlight=False, soft_wrap=True)


def _print_cuda_architectures(console: Console, gpus: Sequence[str], architectures: Sequence[str]) -> None:
    """Print the architectures that the CUDA library was built for, and which GPUs here can run them."""
    import torch
    from rich.table import Table

    from savl.ops.gpu import runs_on
    from savl.ops.library import CUDA, CUDA_UNAVAILABLE
    from savl.ops.op import OPS

    if not architectures:
        console.print(f"CUDA library: {CUDA_UNAVAILABLE}", highlight=False, soft_wrap=True)
        return
    served = ", ".join(name for name, op in OPS.items() if CUDA in op.backends)
    table = Table(title=f"CUDA library ({served})", title_justify="left")
    for column in ("architecture", "code", "here"):
        table.add_column(column, overflow="fold")
    usable = gpus if CUDA_UNAVAILABLE is None else ()
    capabilities = {name: torch.cuda.get_device_capability(index) for index, name in enumerate(usable)}
    for architecture in architectures:
        number, _, ptx = architecture.partition("+")
        cells = [
            f"{name} can run it" if runs_on(architecture, own) else f"not for {name}, which is sm_{own[0]}{own[1]}"
            for name, own in capabilities.items()
        ]
        code = "machine code, PTX for newer GPUs" if ptx else "machine code"
        table.add_row(f"sm_{number}", code, CUDA_UNAVAILABLE or "; ".join(cells))
    console.print(table)


app.command()(tune)
