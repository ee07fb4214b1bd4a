"""`savl kernels tune`: the fastest block sizes of the Triton kernels for a GPU, searched and stored."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from savl.command_line import exit_with_error
from savl.interrupts import mark_reported, raise_on_interrupt

DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes of the Triton kernels."""


def tune(
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", metavar="DTYPE", help=f"{', '.join(DTYPES)}. All if omitted.")
    ] = None,
    network: Annotated[
        list[str] | None,
        typer.Option("--network", metavar="NAME", help="savl-base, savl-tiny, hat-s, hat or hat-l. All if omitted."),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", metavar="KERNEL", help="A kernel, such as forward. All if omitted."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare stored block sizes with the defaults, and write nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Search again for stored block sizes, and replace a broken file.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Store the results in this file, which the kernels do not read."),
    ] = None,
) -> None:
    """Search for the fastest block sizes of the Triton kernels on this GPU, and store them for later runs.

    Options may be given several times. Each result is stored as soon as it is found, in a file for this model of GPU
    in SAVL_CACHE_DIR (~/.cache/savl if unset). After an interruption, the same command continues from there.

    Tuning is optional: the default block sizes are good on every GPU, and no other command searches. If there are
    several GPUs, the first one in CUDA_VISIBLE_DEVICES is tuned. The exit code is 1 if no GPU can run the kernels.
    """
    from rich.console import Console
    from rich.markup import escape

    from savl.kernels import configs
    from savl.network import CONFIGS

    errors = Console(stderr=True, highlight=False, soft_wrap=True)

    for option, named, accepted in (
        ("--dtype", dtype, DTYPES),
        ("--network", network, tuple(CONFIGS)),
        ("--stage", stage, configs.STAGES),
    ):
        for name in named or ():
            if name not in accepted:
                exit_with_error(f"{option} must be one of {', '.join(accepted)}, got {name!r}", 2)
    machine = _machine()
    if isinstance(machine, str):
        exit_with_error(f"nothing to tune: {machine}", 1)
    folder = configs.user_folder()
    if output is None and folder is None:
        exit_with_error(
            "there is no home folder: set SAVL_CACHE_DIR or --output to choose where to store the results", 1
        )
    path = output or Path(str(folder)) / configs.file_name(machine.name)

    from savl.kernels.tune import CannotRunError, Task

    tasks = [
        Task(each, tuning_problem)
        for chosen in dtype or DTYPES
        for _, tuning_problem in tuning_problems(chosen, network or tuple(CONFIGS))
        for each in configs.stages_of(tuning_problem.problem, machine.architecture)
        if stage is None or each in stage
    ]
    try:
        with raise_on_interrupt():
            if check:
                _check(tasks, machine, path)
            else:
                _search(tasks, machine, path, force)
    except KeyboardInterrupt:
        stored = f"; the results so far are in {path}, and the same command continues from there"
        stored = stored if path.exists() and not check else ""
        errors.print(f"[yellow]interrupted{escape(stored)}[/yellow]")
        mark_reported()
        sys.exit(130)
    except (CannotRunError, OSError, ValueError) as error:
        exit_with_error(error, 1)


def _machine() -> Any:
    """Return the GPU to tune for, or the reason why there is none."""
    from savl.ops.gpu import why_unfit
    from savl.ops.library import INTERPRETED, INTERPRETER_VARIABLE, TRITON, TRITON_UNAVAILABLE

    reason = TRITON_UNAVAILABLE
    if reason is None and INTERPRETED:
        reason = f"{INTERPRETER_VARIABLE} is set: the kernels are interpreted, on the CPU"
    if reason is None:
        reason = why_unfit(TRITON, 0)
    if reason is not None:
        return reason
    from savl.kernels.gpu_timing import Gpu

    return Gpu()


def tuning_problems(dtype: str, networks: Sequence[str]) -> list[tuple[list[str], Any]]:
    """Return each `savl.kernels.tune.TuningProblem` that networks pose, with the names of these networks."""
    from savl.kernels.configs import Problem
    from savl.kernels.tune import TuningProblem
    from savl.network import CONFIGS

    found: dict[Problem, tuple[list[str], TuningProblem]] = {}
    for name in networks:
        config = CONFIGS[name]
        for key_window in (config.window, config.key_window):
            problem = Problem(dtype, config.channels // config.heads, config.window, key_window)
            # The attention of DSCA has one. The others run with the same block sizes, with less to do.
            severity = (
                key_window == config.window and config.degradation_code == "variational" and config.spatial_modulation
            )
            names, before = found.get(problem, ([], None))
            severity = severity or (before is not None and before.severity)
            found[problem] = [*names, name], TuningProblem(problem, config.heads, severity)
    return list(found.values())


def _search(tasks: Sequence[Any], machine: Any, path: Path, force: bool) -> None:
    """Tune, with a bar and a line for each task, and a table of the results at the end."""
    from rich.console import Console

    from savl.atomic_write import check_writable
    from savl.kernels.tune import Compilations
    from savl.kernels.tune import tune as tune_tasks

    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path, overwrite=True)
    console = Console()
    outcomes = []
    with _Steps(len(tasks)) as steps, Compilations(tasks, machine.architecture) as unfit:
        for outcome in tune_tasks(tasks, machine, path, unfit=unfit, force=force, on_step=steps.trying):
            outcomes.append(outcome)
            entry = outcome.entry
            found = "stored before" if outcome.kept else f"{outcome.measured} measured, {outcome.left_out} left out"
            steps.done(
                f"{task_label(outcome.task)}: {entry.microseconds:.1f} µs, {config_label(entry.config)}; {found}"
            )
    table = _timing_table(machine.name)
    for outcome in outcomes:
        entry = outcome.entry
        _add_timing(table, outcome.task, entry.rule_microseconds, entry.microseconds, entry.config, outcome.rule)
    console.print(table)
    searched = sum(not outcome.kept for outcome in outcomes)
    better = sum(outcome.entry.config != outcome.rule for outcome in outcomes)
    console.print(
        f"{searched} searched, {len(outcomes) - searched} stored before (--force searches again); "
        f"{better} of {len(outcomes)} better than the rule; {path}",
        highlight=False,
        soft_wrap=True,
    )


def _check(tasks: Sequence[Any], machine: Any, path: Path) -> None:
    """Measure the stored block sizes and those of the rule, and print the difference in time."""
    from rich.console import Console

    from savl.kernels import configs
    from savl.kernels.tune import compare

    shipped = configs.SHIPPED_FOLDER / configs.file_name(machine.name)
    stored: dict[Any, Any] = {}
    console = Console()
    for file in (shipped, path):
        store = configs.read_store(file, machine.name)
        if store is not None:
            stored.update(store.tuned)
            for reason in store.ignored:
                console.print(f"{file}: {reason}", highlight=False, soft_wrap=True)
    known = [task for task in tasks if (task.stage, task.problem) in stored]
    table = _timing_table(machine.name)
    gaps = []
    with _Steps(len(known)) as steps:
        for task in known:
            config = stored[task.stage, task.problem].config
            rule = configs.default_config(task.stage, task.problem, machine.architecture)
            rule_time, time = compare(task, machine, config, steps.trying)
            gaps.append(rule_time / time - 1)
            _add_timing(table, task, rule_time, time, config, rule)
            steps.done(f"{task_label(task)}: {rule_time:.1f} µs by the rule, {time:.1f} µs as stored")
    if known:
        console.print(table)
        mean = sum(gaps) / len(gaps)
        console.print(
            f"the defaults take {mean:+.1%} time compared with the stored block sizes, {max(gaps):+.1%} at worst",
            highlight=False,
        )
    missing = len(tasks) - len(known)
    if missing:
        console.print(f"nothing is stored for {missing} of {len(tasks)}: `savl kernels tune` searches", highlight=False)


class _Steps:
    """Progress: on a terminal a bar that names the current measurement, and a line for each finished task."""

    def __init__(self, tasks: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=tasks)

    def __enter__(self) -> _Steps:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def trying(self, task: Any, config: Any, why: str) -> None:
        """Show what is about to be measured."""
        self._progress.update(self._bar, description=f"{task_label(task)}: {config_label(config)} ({why})")

    def done(self, line: str) -> None:
        """Print the line of a finished task."""
        self._progress.advance(self._bar)
        self._console.print(line, markup=False, soft_wrap=True)


def _timing_table(title: str) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for column in ("problem", "kernel", "rule µs", "tuned µs", "gain", "block sizes"):
        table.add_column(column, justify="right" if column in ("rule µs", "tuned µs", "gain") else "left")
    return table


def _add_timing(table: Any, task: Any, rule_time: float, time: float, config: Any, rule: Any) -> None:
    sizes = f"{config_label(config)}{' (the rule)' if config == rule else ''}"
    gain = f"{1 - time / rule_time:.1%}"
    table.add_row(problem_label(task.problem), task.stage, f"{rule_time:.1f}", f"{time:.1f}", gain, sizes)


def task_label(task: Any) -> str:
    """Describe a task in a line."""
    return f"{task.stage} · {problem_label(task.problem)}"


def problem_label(problem: Any) -> str:
    """Describe a `savl.kernels.configs.Problem` in words."""
    windows = (
        f"window {problem.window}"
        if problem.window == problem.key_window
        else f"windows {problem.window} in {problem.key_window}"
    )
    return f"{windows}, head dim {problem.head_dim}, {problem.dtype}"


def config_label(config: Any) -> str:
    """Describe a `savl.kernels.configs.KernelConfig` in short: queries × keys of a tile, warps, pipeline stages."""
    return f"{config.block_m}×{config.block_n}, {config.warps}w, {config.stages}s"
