"""The search behind `savl kernels tune`: the fastest block sizes of each kernel for each problem, on the GPU at hand.

For one kernel and problem: candidates that spill registers or want more shared memory than is sure to be there are left
out by what the compiler says of them. The others are measured in turn, several times over, and the slower ones dropped
at each turn. A pipeline deeper than one stage is tried with the block sizes that are best without. The fastest are held
against the rule, and one that is faster by more than the noise, and computes the same, is stored; else the rule is.

Nothing here touches a GPU: `savl.kernels.gpu_timing` does.
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

LEAST_GAIN = 0.02
"""A share of the rule's time. What gains less is noise, or not worth a difference between machines."""
SHARED_MEMORY_SHARE = 0.75
"""Of what a program may have: another Triton may need a little more for the same block sizes, and must still launch."""
TURNS = 3
"""Measurements of each candidate before the slower ones are dropped."""
FINAL_TURNS = 12
"""Measurements of the finalists and of the rule."""
FINALISTS = 3


class CannotRunError(RuntimeError):
    """A kernel does not compile or launch with these block sizes; the message says why."""


@dataclass(frozen=True)
class TuningProblem:
    """A problem as networks pose it."""

    problem: Problem
    heads: int
    severity: bool
    """Whether there is a severity map."""

    @property
    def shifted(self) -> bool:
        """Whether windows are shifted, which costs more registers: always where networks shift them."""
        return self.problem.window == self.problem.key_window


@dataclass(frozen=True)
class Task:
    """One search."""

    stage: str
    tuning_problem: TuningProblem

    @property
    def problem(self) -> Problem:
        """What block sizes are looked up by."""
        return self.tuning_problem.problem


class Machine(Protocol):
    """A GPU; `savl.kernels.gpu_timing.Gpu` is the one there is."""

    name: str
    capability: tuple[int, int]
    triton: str

    def measure(self, stage: str, tuning_problem: TuningProblem, config: KernelConfig) -> float:
        """Run one kernel a few times, with cold caches; the median, in microseconds. Raises CannotRunError."""

    def disagreement(
        self, stage: str, tuning_problem: TuningProblem, config: KernelConfig, rule: KernelConfig
    ) -> str | None:
        """How results differ from those with the block sizes of the rule; None if only as rounding may differ."""


Unfit = Callable[[Task, KernelConfig], str | None]
"""Why block sizes are not worth a measurement, None if they may be."""


@dataclass(frozen=True)
class Outcome:
    """What one search found."""

    task: Task
    entry: Tuned
    rule: KernelConfig
    measured: int
    """How many candidates were measured."""
    left_out: int
    """How many were not, by what the compiler said of them."""
    kept: bool = False
    """Whether an earlier run had found it."""

    @property
    def gain(self) -> float:
        """Share of the rule's time that is saved."""
        return 1 - self.entry.microseconds / self.entry.rule_microseconds


def candidates(problem: Problem) -> list[KernelConfig]:
    """Block sizes worth trying without a pipeline: no larger than the windows, scores a thread neither few nor many.

    Args:
        problem: The problem.
    """
    # Products of float32 are no work for tensor cores: more of them at once only fill registers.
    fewest, most = (4, 32) if problem.dtype == "float32" else (8, 64)
    sizes = (16, 32, 64, 128)
    rows = [size for size in sizes if size < 2 * problem.window**2 or size == 16]
    columns = [size for size in sizes if size < 2 * problem.key_window**2 or size == 16]
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
    """Search for every task, and store each result as soon as it is there.

    What the file has already of the same kernels and Triton is kept, so that an interrupted run goes on where it
    stopped.

    Args:
        tasks: What to search for.
        machine: The GPU.
        path: The file to store in.
        unfit: Says what need not be measured.
        force: Search for what is there too, and replace a file that cannot be used.
        on_step: Told what is about to be tried, and what for.

    Yields:
        An outcome for each task, in their order.

    Raises:
        ValueError: The file is there and is none of this GPU's.
        OSError: It cannot be written.
        CannotRunError: A kernel does not even run with the block sizes of the rule.
    """
    known = _known(path, machine, force)
    for task in tasks:
        rule = default_config(task.stage, task.problem, machine.capability)
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
    """What a file holds that can be kept; entries for other kernels go with the next that is stored."""
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
    rule = default_config(task.stage, task.problem, machine.capability)
    trial = _Trial(task, machine, rule, on_step)
    trial.measure(rule, "rule")  # raises where nothing runs
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
    rule = default_config(task.stage, task.problem, machine.capability)
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
        """The fastest, in order. All are measured once, the fastest half (or what survives) again, and so on."""
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
        """The fastest finalist that beats the rule by more than the noise and computes the same; else the rule."""
        candidates = [config for config in finalists if config != self.rule]
        for config in (self.rule, *candidates):
            self.samples[config] = []  # of one time and one temperature, or they cannot be compared
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
    """What the compiler says of candidates, from other processes while this one measures; an `Unfit` while it is open.

    Args:
        tasks: What will be asked for, in this order.
        capability: Compute capability of the GPU.
    """

    def __init__(self, tasks: Sequence[Task], capability: tuple[int, int]) -> None:
        self._tasks = list(tasks)
        self._capability = capability
        self._futures: dict[tuple[Task, KernelConfig], Future[str | None]] = {}

    def __enter__(self) -> Compilations:
        # Not forked: a process that has used a GPU cannot be.
        workers = max(1, min(8, (os.cpu_count() or 2) - 1))
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _leave_interrupts_to_the_parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, task: Task, config: KernelConfig) -> str | None:
        """Why block sizes are not worth a measurement, or None."""
        # The next task's are compiled while this one's are measured.
        place = self._tasks.index(task)
        for each in self._tasks[place : place + 2]:
            for candidate in candidates(each.problem):
                self._submit(each, candidate)
        try:
            return self._submit(task, config).result()
        except BrokenExecutor as error:
            raise CannotRunError(
                f"the processes that compile have ended, perhaps for want of memory: {error}"
            ) from error

    def _submit(self, task: Task, config: KernelConfig) -> Future[str | None]:
        key = (task, config)
        if key not in self._futures:
            self._futures[key] = self._pool.submit(why_unfit, task, config, self._capability)
        return self._futures[key]


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def why_unfit(task: Task, config: KernelConfig, capability: tuple[int, int]) -> str | None:
    """Compile a kernel and say why its block sizes are not worth a measurement; None if they may be.

    Args:
        task: The kernel and problem.
        config: The block sizes.
        capability: Compute capability of the GPU.
    """
    from savl.kernels import compile_ahead_of_time

    tuning_problem = task.tuning_problem
    try:
        used = compile_ahead_of_time.resources(
            task.stage,
            task.problem,
            config,
            capability,
            severity=tuning_problem.severity,
            shifted=tuning_problem.shifted,
            heads=tuning_problem.heads,
        )
    except Exception as error:  # Triton's own, of many kinds
        return f"does not compile ({type(error).__name__})"
    if used.spills:
        return f"spills {used.stack} bytes of registers a thread"
    allowed = int(SHARED_MEMORY_SHARE * compile_ahead_of_time.shared_memory_limit(capability))
    if used.shared > allowed:
        return f"wants {used.shared} bytes of shared memory, {allowed} are sure to be there"
    if used.programs(capability) < 1:
        return f"wants {used.registers} registers a thread for {used.warps} warps, more than there are"
    return None
