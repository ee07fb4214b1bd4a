"""Limits on the memory and processors of this process: the machine, control groups (containers, jobs), and ulimit."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

MOUNT = Path("/sys/fs/cgroup")
LISTING = Path("/proc/self/cgroup")

_UNKNOWN_FREE_BYTES = 2 << 30  # assumed where the system does not say how much memory is free


def control_group_folders(controller: str) -> list[Path]:
    """Return the folders of the groups that hold this process, its own first, of both versions of control groups.

    Args:
        controller: "memory" or "cpu".

    Returns:
        Existing folders; none where the system has no control groups. Inside a container the outermost is often the
        container's own group, mounted in place of the root.
    """
    try:
        lines = LISTING.read_text().splitlines()
    except OSError:
        return []  # not Linux
    folders = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mount = MOUNT
        elif controller in controllers.split(","):
            mount = MOUNT / controller
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        folders += [mount / each for each in (group, *group.parents)]
    return [folder for folder in dict.fromkeys(folders) if ".." not in folder.parts and folder.is_dir()]


def processor_quota() -> float | None:
    """Return how many processors' time the groups around this process may take, or None where nothing limits them.

    For example 1.5 under ``docker run --cpus 1.5``. Threads beyond it do not run faster, they are stopped together.
    """
    quotas = []
    for folder in control_group_folders("cpu"):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0 and int(period) > 0:
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError):
            continue  # no limit is the word max, or -1; the root has no files
    return min(quotas, default=None)


def available_bytes() -> int:
    """Return how many bytes this process can still allocate on the CPU, as far as the system says.

    The least of the machine's free memory, of what the process's control group (a container, a job of a cluster) has
    left, and of what ``ulimit`` leaves it.
    """
    limits = [free for free in (_free_on_machine(), _free_in_control_group(), _free_below_limits()) if free is not None]
    return max(0, min(limits, default=_UNKNOWN_FREE_BYTES))


def _free_on_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass  # not Linux
    return None


def _free_in_control_group() -> int | None:
    """The least that any of the groups around this process has left; files in the page cache count as free."""
    least = None
    for folder in control_group_folders("memory"):
        try:
            version2 = (folder / "memory.max").exists()
            limit = int((folder / ("memory.max" if version2 else "memory.limit_in_bytes")).read_text())
            used = int((folder / ("memory.current" if version2 else "memory.usage_in_bytes")).read_text())
            counts = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # no limit is the word max; the root has no files
        cached = int(counts.get("inactive_file" if version2 else "total_inactive_file", 0))
        free = limit - used + cached
        least = free if least is None else min(least, free)
    return least


def _free_below_limits() -> int | None:
    """What ``ulimit -v`` and ``ulimit -d`` leave."""
    try:
        import resource

        pages = [int(count) for count in Path("/proc/self/statm").read_text().split()]
        left = [
            resource.getrlimit(getattr(resource, name))[0] - used * resource.getpagesize()
            for name, used in (("RLIMIT_AS", pages[0]), ("RLIMIT_DATA", pages[5]))
            if is_limited(name)
        ]
    except (ImportError, OSError, ValueError):
        return None  # not Linux
    return min(left, default=None)


def is_limited(name: str) -> bool:
    """Return whether ``ulimit`` limits this process in a resource, such as "RLIMIT_AS"."""
    try:
        import resource
    except ImportError:  # Windows
        return False
    kind = getattr(resource, name, None)
    return kind is not None and resource.getrlimit(kind)[0] != resource.RLIM_INFINITY
