"""Search for the fastest block sizes of each kernel and problem on the GPU at hand, for `savl kernels tune`.

The search for one kernel and problem compiles all candidates first. It leaves out those that spill registers or need
more shared memory than is certain to be available. It then measures the others in turn, several times, and drops the
slower ones after each turn. The best block sizes are tried with deeper pipelines too. Finally the fastest are compared
with the rule. One that is faster by more than the noise and computes the same is stored, otherwise the rule.

This module does not use the GPU itself: `savl.kernels.gpu_timing` does.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from types import TracebackType
from typing import Protocol

from savl.atomic_write import write_atomically
from savl.kernels import configs
from savl.kernels.configs import KernelConfig, Problem, Tuned, default_config
from savl.kernels.targets import Architecture

LEAST_GAIN = 0.02
"""Least gain as a share of the rule's time. Less may be noise, and is not worth a difference between machines."""
SHARED_MEMORY_SHARE = 0.75
"""Share of a program's shared memory that may be used: other versions of Triton may need a little more."""
TURNS = 3
"""Turns of measurements, after each of which the slower candidates are dropped."""
FINAL_TURNS = 12
"""Measurements of the finalists and of the rule."""
FINALISTS = 3


class CannotRunError(RuntimeError):
    """A kernel does not compile or launch with these block sizes; the message says why."""


@dataclass(frozen=True)
class TuningProblem:
    """A problem as it occurs in networks: besides its `Problem`, what costs time but does not select block sizes."""

    problem: Problem
    heads: int
    severity: bool
    """Whether there is a severity map."""

    @property
    def shifted(self) -> bool:
        """Whether windows are shifted, which needs more registers: true where any network shifts them."""
        return self.problem.window == self.problem.key_window


@dataclass(frozen=True)
class Task:
    """One search: a kernel and a problem."""

    stage: str
    tuning_problem: TuningProblem

    @property
    def problem(self) -> Problem:
        """The problem that block sizes are looked up for."""
        return self.tuning_problem.problem


class Machine(Protocol):
    """A GPU that kernels are measured on, such as `savl.kernels.gpu_timing.Gpu`."""

    name: str
    architecture: Architecture
    triton: str

    def measure(self, stage: str, tuning_problem: TuningProblem, config: KernelConfig) -> float:
        """Return the median time of one kernel with cold caches, in microseconds; raise CannotRunError."""

    def disagreement(
        self, stage: str, tuning_problem: TuningProblem, config: KernelConfig, rule: KernelConfig
    ) -> str | None:
        """Return how results differ from those with the rule's block sizes; None if only by rounding errors."""


Unfit = Callable[[Task, KernelConfig], str | None]
"""Returns why block sizes need not be measured, or None."""


@dataclass(frozen=True)
class Outcome:
    """Result of one search."""

    task: Task
    entry: Tuned
    rule: KernelConfig
    measured: int
    """Number of candidates that were measured."""
    left_out: int
    """Number of candidates that were compiled but not measured."""
    kept: bool = False
    """Whether the result of an earlier run was kept."""

    @property
    def gain(self) -> float:
        """Saved time as a share of the rule's time."""
        return 1 - self.entry.microseconds / self.entry.rule_microseconds


def candidates(problem: Problem) -> list[KernelConfig]:
    """Return block sizes to try: no larger than the windows, with neither few nor many scores per thread.

    Args:
        problem: The problem.
    """
    # Tensor cores do not compute float32 products: larger tiles would only need more registers.
    fewest, most = (4, 32) if problem.dtype == "float32" else (8, 64)
    sizes = (16, 32, 64, 128)
    rows = [size for size in sizes if size < 2 * problem.queries or size == 16]
    columns = [size for size in sizes if size < 2 * problem.keys or size == 16]
    return [
        KernelConfig(block_m, block_n, warps, 1)
        for block_m in rows
        for block_n in columns
        for warps in (1, 2, 4, 8)
        if fewest <= block_m * block_n // (32 * warps) <= most
    ]


def tune(
    tasks: Sequence[Task],
    machine: Machine,
    path: Path,
    *,
    unfit: Unfit,
    force: bool = False,
    on_step: Callable[[Task, KernelConfig, str], None] | None = None,
) -> Iterator[Outcome]:
    """Search for every task, and store each result at once.

    Results in the file for the same kernels and Triton are kept, so that an interrupted run continues where it stopped.

    Args:
        tasks: Kernels and problems to search for.
        machine: The GPU.
        path: The file to store in.
        unfit: Returns why block sizes need not be measured.
        force: Search for tasks with stored results too, and replace a file that cannot be used.
        on_step: Callback before each measurement: task, block sizes, and the purpose.

    Yields:
        An outcome for each task, in order.

    Raises:
        ValueError: The file exists and is not one of this GPU.
        OSError: The file cannot be written.
        CannotRunError: A kernel does not run with the block sizes of the rule.
    """
    known = _known(path, machine, force)
    for task in tasks:
        rule = default_config(task.stage, task.problem, machine.architecture)
        key = (task.stage, task.problem)
        if key in known and not force and known[key].triton == machine.triton:
            yield Outcome(task, known[key], rule, 0, 0, kept=True)
            continue
        outcome = search(task, machine, unfit, on_step)
        known[key] = outcome.entry
        write_atomically(path, configs.dump_store(machine.name, known.values()))
        configs.forget()
        yield outcome


def _known(path: Path, machine: Machine, force: bool) -> dict[tuple[str, Problem], Tuned]:
    """Return the entries of a file that can be kept. Those of other kernels are dropped when the file is written."""
    store = configs.read_store(path, machine.name)
    if store is None:
        return {}
    if store.unusable and not force:
        raise ValueError(f"{path}: {store.ignored[0]}; --force replaces it, --output writes another file")
    return dict(store.tuned)


def search(
    task: Task,
    machine: Machine,
    unfit: Unfit,
    on_step: Callable[[Task, KernelConfig, str], None] | None = None,
) -> Outcome:
    """Search for one task; arguments and errors as for `tune`."""
    rule = default_config(task.stage, task.problem, machine.architecture)
    trial = _Trial(task, machine, rule, on_step)
    trial.measure(rule, "rule")  # raises if even the rule does not run
    tried = [config for config in candidates(task.problem) if config != rule]
    fit = [config for config in tried if unfit(task, config) is None]
    best = trial.halve([rule, *fit], FINALISTS)
    deeper = [replace(config, stages=stages) for config in best for stages in (2, 3)]
    fit_deeper = [config for config in deeper if unfit(task, config) is None and config != rule]
    finalists = trial.halve([*best, *fit_deeper], FINALISTS)
    winner = trial.winner(finalists)
    entry = Tuned(
        task.stage,
        task.problem,
        winner,
        round(trial.median(winner), 2),
        round(trial.median(rule), 2),
        configs.kernels_hash(),
        machine.triton,
        datetime.now(UTC).date().isoformat(),
    )
    left_out = len(tried) - len(fit) + len(deeper) - len(fit_deeper)
    return Outcome(task, entry, rule, len(trial.samples), left_out)


def compare(
    task: Task, machine: Machine, config: KernelConfig, on_step: Callable[[Task, KernelConfig, str], None] | None = None
) -> tuple[float, float]:
    """Measure block sizes against the rule, in turn.

    Args:
        task: The kernel and problem.
        machine: The GPU.
        config: The block sizes.
        on_step: As for `tune`.

    Returns:
        Median microseconds of the rule, and of ``config``.

    Raises:
        CannotRunError: The kernel does not run with one of them.
    """
    rule = default_config(task.stage, task.problem, machine.architecture)
    trial = _Trial(task, machine, rule, on_step)
    for _ in range(FINAL_TURNS):
        for each in dict.fromkeys((rule, config)):
            trial.measure(each, "check")
    return trial.median(rule), trial.median(config)


class _Trial:
    """The measurements of one task."""

    def __init__(
        self,
        task: Task,
        machine: Machine,
        rule: KernelConfig,
        on_step: Callable[[Task, KernelConfig, str], None] | None,
    ) -> None:
        self.task = task
        self.machine = machine
        self.rule = rule
        self.on_step = on_step
        self.samples: dict[KernelConfig, list[float]] = {}

    def measure(self, config: KernelConfig, why: str) -> None:
        if self.on_step is not None:
            self.on_step(self.task, config, why)
        time = self.machine.measure(self.task.stage, self.task.tuning_problem, config)
        self.samples.setdefault(config, []).append(time)

    def median(self, config: KernelConfig) -> float:
        return median(self.samples[config])

    def halve(self, contestants: Iterable[KernelConfig], survivors: int) -> list[KernelConfig]:
        """Return the fastest, in order: measure all once, the fastest half (or ``survivors``) again, and so on."""
        left = list(dict.fromkeys(contestants))
        for turn in range(TURNS):
            for config in list(left):
                try:
                    self.measure(config, f"turn {turn + 1} of {TURNS}")
                except CannotRunError:
                    if config == self.rule:
                        raise
                    left.remove(config)
            left.sort(key=self.median)
            left = left[: max(survivors, len(left) // 2)]
        return left[:survivors]

    def winner(self, finalists: Sequence[KernelConfig]) -> KernelConfig:
        """Return the fastest finalist that beats the rule by more than noise and computes the same; else the rule."""
        candidates = [config for config in finalists if config != self.rule]
        for config in (self.rule, *candidates):
            self.samples[config] = []  # compare only measurements taken at the same time and temperature
        for turn in range(FINAL_TURNS):
            for config in (self.rule, *candidates):
                self.measure(config, f"final {turn + 1} of {FINAL_TURNS}")
        best_quarter = quantiles(self.samples[self.rule], n=4)[0]
        for config in sorted(candidates, key=self.median):
            faster = self.median(config) < (1 - LEAST_GAIN) * self.median(self.rule)
            if not faster or quantiles(self.samples[config], n=4)[2] >= best_quarter:
                continue
            if self.machine.disagreement(self.task.stage, self.task.tuning_problem, config, self.rule) is None:
                return config
        return self.rule


class Compilations:
    """Compile candidates in other processes while this one measures. The open context is an `Unfit`.

    Args:
        tasks: Tasks in the order in which they will be asked for.
        architecture: Architecture of the GPU.
    """

    def __init__(self, tasks: Sequence[Task], architecture: Architecture) -> None:
        self._tasks = list(tasks)
        self._architecture = architecture
        self._futures: dict[tuple[Task, KernelConfig], Future[str | None]] = {}

    def __enter__(self) -> Compilations:
        # Spawned, because a process that has used a GPU must not fork.
        workers = max(1, min(8, (os.cpu_count() or 2) - 1))
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _leave_interrupts_to_the_parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, task: Task, config: KernelConfig) -> str | None:
        """Return why block sizes need not be measured, or None."""
        # The candidates of the next task are compiled while those of this one are measured.
        place = self._tasks.index(task)
        for each in self._tasks[place : place + 2]:
            for candidate in candidates(each.problem):
                self._submit(each, candidate)
        try:
            return self._submit(task, config).result()
        except BrokenExecutor as error:
            raise CannotRunError(
                f"the processes that compile kernels have ended, perhaps because memory ran out: {error}"
            ) from error

    def _submit(self, task: Task, config: KernelConfig) -> Future[str | None]:
        key = (task, config)
        if key not in self._futures:
            self._futures[key] = self._pool.submit(why_unfit, task, config, self._architecture)
        return self._futures[key]


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def why_unfit(task: Task, config: KernelConfig, architecture: Architecture) -> str | None:
    """Compile a kernel; return why its block sizes need not be measured, or None.

    Args:
        task: The kernel and problem.
        config: The block sizes.
        architecture: Architecture of the GPU.
    """
    from savl.kernels import compile_ahead_of_time

    tuning_problem = task.tuning_problem
    if task.stage == "backward_qkv" and task.problem.queries > 4 * config.block_m:
        return "repeats its code for more than four tiles of queries"
    try:
        used = compile_ahead_of_time.resources(
            task.stage,
            task.problem,
            config,
            architecture,
            severity=tuning_problem.severity,
            shifted=tuning_problem.shifted,
            heads=tuning_problem.heads,
        )
    except Exception as error:  # Triton's own, of many kinds
        return f"does not compile ({type(error).__name__})"
    if used.spills:
        return f"spills {used.stack} bytes of registers a thread"
    allowed = int(SHARED_MEMORY_SHARE * compile_ahead_of_time.shared_memory_limit(architecture))
    if used.shared > allowed:
        return f"wants {used.shared} bytes of shared memory, {allowed} are sure to be there"
    if used.programs(architecture) < 1:
        return f"wants {used.registers} registers a thread for {used.warps} warps, more than there are"
    return None
