"""`savl upscale --ray`: the loop over files, on a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from savl.cli.streams import STANDARD
from savl.command_line import Command, UsageError

if TYPE_CHECKING:
    from savl.cli.progress import ProgressReport
    from savl.distributed.coordinator import Update
    from savl.distributed.run import Workers
    from savl.distributed.storage import UrlPlace
    from savl.distributed.worker import Settings, Task
    from savl.images.job import Job, Outcome

_WAIT = 1.0  # seconds between two attempts to get the files that other processes have locked
_ADDRESS = re.compile(r"auto|local|(ray://)?(\[[0-9a-fA-F:.]+\]|[\w.-]+):\d+")


class RayCommand(Command):
    """A command whose option `--ray` may have a value: an address, which no input looks like."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line, in which `--ray` without an address means a local instance."""
        completed: list[str] = []
        for number, word in enumerate(args):
            completed.append(word)
            following = args[number + 1] if number + 1 < len(args) else ""
            if "--" not in completed and word == "--ray" and not _ADDRESS.fullmatch(following):
                completed.append("local")
        return super().parse_args(ctx, completed)


def check_arguments(address: str, inputs: Sequence[str], output: str | None, device: str) -> None:
    """Refuse what the workers of a cluster cannot do.

    Raises:
        UsageError: An argument cannot be combined with `--ray`, or its value is not an address.
    """
    if not _ADDRESS.fullmatch(address):
        raise UsageError(f"--ray {address} is not an address; auto and host:port are accepted")
    if address.startswith("ray://"):
        raise UsageError(
            f"--ray {address}: Ray's client is not supported; run the command on a node of the cluster, with --ray auto"
        )
    if STANDARD in inputs or output == STANDARD:
        raise UsageError("--ray: the workers of a cluster have no standard input and output; name files or folders")
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--ray: Ray assigns a GPU to each worker; --device takes cpu, cuda or auto, got {device}")


def open_output(output: str | None, inputs: Sequence[str]) -> UrlPlace | None:
    """Return the place of the outputs, or None if they are files.

    Args:
        output: Value of `-o`.
        inputs: Arguments of the command line.

    Raises:
        UsageError: The URL cannot be used.
    """
    from savl.cli.jobs import output_is_file
    from savl.distributed.storage import UrlPlace, is_url

    if output is None or not is_url(output):
        return None
    try:
        place = UrlPlace(output.rsplit("/", 1)[0] if output_is_file(output, inputs) else output)
    except ValueError as error:
        raise UsageError(f"-o {error}") from error
    if not place.shared:
        raise UsageError(f"-o {output} is the memory of one process, which the others do not see")
    return place


@dataclass
class ClusterLoop:
    """The files that are left to process, on a cluster.

    Attributes:
        jobs: The files.
        start: Starts the workers, of which there are at most as many as files.
        place: Where the outputs are; None for files.
        overwrite: Replace existing outputs.
        debug: Raise the error of a file.
    """

    jobs: Sequence[Job]
    start: Callable[[int], Workers]
    place: UrlPlace | None
    overwrite: bool
    debug: bool

    def run(self, report: ProgressReport) -> None:
        """Process the files.

        Raises:
            UsageError: `-o` names a file that exists.
            KeyboardInterrupt: Ctrl-C; no partial file is left.
            RuntimeError: With `debug`, the error of a file.
        """
        waiting = dict(enumerate(self._tasks()))
        workers = self.start(len(waiting))
        report.say(f"Ray: {workers.share}", "dim")
        said = False
        while waiting:
            count = len(waiting)
            self._run_once(workers, waiting, report)
            if len(waiting) == count:
                if not said:
                    first = self.jobs[next(iter(waiting))].source
                    more = f" and {count - 1} more" if count > 1 else ""
                    report.say(f"waiting for another process, which is working on {first}{more}")
                    said = True
                time.sleep(_WAIT)

    def _tasks(self) -> list[Task]:
        from savl.distributed.worker import Task
        from savl.images.job import signatures_of

        jobs = [_absolute(job, self.place) for job in self.jobs]
        # Another file system is asked over the network.
        with ThreadPoolExecutor(1 if self.place is None else 32) as pool:
            before = pool.map(lambda job: signatures_of([job], self.place), jobs)
            tasks = [Task(key, job, each) for key, (job, each) in enumerate(zip(jobs, before, strict=True))]
        for task in tasks:  # An existing file is refused by the command; see `savl.cli.jobs.refuse_existing`.
            if self.place is not None and task.job.exact and not self.overwrite and task.before[task.job.target]:
                raise UsageError(f"-o {self.place.url_of(task.job.target)} exists already; --overwrite replaces it")
        return tasks

    def _run_once(self, workers: Workers, waiting: dict[int, Task], report: ProgressReport) -> None:
        """Process the files that are waiting; those that another process has locked still wait afterwards."""
        locked: set[int] = set()
        sizes: dict[int | str, int] = {key: _size(task.job.source) for key, task in waiting.items()}
        # Closed at once in case of an exception here: the workers must have stopped before the command ends.
        with contextlib.closing(workers.run(list(waiting.values()), sizes)) as updates:
            try:
                for update in updates:
                    self._report(update, waiting, locked, report)
            except RuntimeError as error:
                if self.debug:
                    raise
                for key in sorted(waiting.keys() - locked):
                    report.fail(self.jobs[key].source, str(error))
                    del waiting[key]
                return
        for key in sorted(waiting.keys() - locked):
            report.fail(self.jobs[key].source, "the cluster returned no result")
            del waiting[key]

    def _report(self, update: Update, waiting: dict[int, Task], locked: set[int], report: ProgressReport) -> None:
        for key, outcome in update.finished:
            assert isinstance(key, int)
            if outcome is None:
                locked.add(key)
            elif key in waiting:  # A file whose worker ended after it had reported is processed, and reported, again.
                job, task = self.jobs[key], waiting.pop(key)
                report.outcome(job.source, self._as_given(outcome, job, task.job))
        active = [file for file in update.active.values() if isinstance(file.key, int)]
        report.on_workers([(self.jobs[file.key].source, file.done, file.total) for file in active])  # type: ignore[index]

    def _as_given(self, outcome: Outcome, job: Job, task: Job) -> Outcome:
        """Return an outcome with the names that the user gave, instead of absolute paths."""
        from savl.images.job import Done, Failed, Kept

        names = dict(_renamed(task, job)) if self.place is None else {}
        if isinstance(outcome, Done):
            return replace(outcome, written=names.get(outcome.written, outcome.written))
        if isinstance(outcome, Kept):
            return replace(outcome, target=names.get(outcome.target, outcome.target))
        assert isinstance(outcome, Failed)
        if self.debug:
            raise RuntimeError(f"{job.source}, in a worker:\n{outcome.traceback}")
        reason = outcome.reason
        for absolute, given in sorted(names.items(), key=lambda pair: -len(pair[0])):
            reason = reason.replace(absolute, given)
        return replace(outcome, reason=reason)


def _renamed(task: Job, job: Job) -> Iterator[tuple[str, str]]:
    yield from ((str(absolute), str(given)) for absolute, given in zip(task.outputs, job.outputs, strict=True))
    if task.alternative is not None and job.alternative is not None:
        yield from _renamed(task.alternative, job.alternative)


def _absolute(job: Job, place: UrlPlace | None) -> Job:
    """Return a job with absolute paths: workers have other current folders."""

    def output(path: Path) -> Path:
        return Path(os.path.abspath(path)) if place is None else path

    return replace(
        job,
        source=Path(os.path.abspath(job.source)),
        target=output(job.target),
        maps=tuple(map(output, job.maps)),
        alternative=None if job.alternative is None else _absolute(job.alternative, place),
    )


def _size(path: Path) -> int:
    try:
        return os.path.getsize(path)
    except (OSError, ValueError):
        return 0


@contextlib.contextmanager
def cluster_starter(
    address: str, *, settings: Settings, content: Any, device: str, workers: int | None, threads: int | None
) -> Iterator[Callable[[int], Workers]]:
    """Connect to a cluster for the duration of a `with` block; yield the function that starts the workers.

    Args:
        address: Value of `--ray`.
        settings: How the workers upscale, without device and threads.
        content: The model, if the workers cannot load it by its name.
        device: Value of `--device`.
        workers: Value of `--workers`.
        threads: Value of `--threads`.

    Raises:
        RayUnavailable: Ray is not installed.
        UsageError: There is no such cluster, or it has no room for a worker.
    """
    from savl.distributed.cluster import connected, share_cluster, start_coordinator
    from savl.distributed.run import Workers

    with contextlib.ExitStack() as stack:
        try:
            ray = stack.enter_context(connected(address))
            share = share_cluster(ray, device=device, workers=workers, threads=threads)
        except (ConnectionError, ValueError) as error:
            raise UsageError(f"--ray {address}: {' '.join(str(error).split())}") from error

        def start(files: int) -> Workers:
            count = max(1, min(share.workers, files))
            used = replace(share, workers=count, fitting=min(share.fitting, count))
            own = replace(settings, device=used.device, threads=used.threads)
            return Workers(ray, used, own, start_coordinator(ray, content))

        yield start
