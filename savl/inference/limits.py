"""Limits on the memory and processors of this process: the machine, control groups (containers, jobs), and ulimit."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

MOUNT = Path("/sys/fs/cgroup")
LISTING = Path("/proc/self/cgroup")

_UNKNOWN_FREE_BYTES = 2 << 30  # assumed where the system does not say how much memory is free


def control_group_folders(controller: str) -> list[Path]:
    """Return the folders of the Linux control groups that contain this process, of version 1 and version 2.

    Args:
        controller: "memory" or "cpu".

    Returns:
        Existing folders, the innermost group first; empty if the system has no control groups. Inside a container the
        last one is often the container's own group, mounted in place of the root.
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
    """Return how many processors' time the control groups allow this process, or None without a limit.

    For example 1.5 under ``docker run --cpus 1.5``. More threads than that do not compute faster: the system stops all
    of them whenever the quota is used up.
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
            continue  # "max" or -1 stands for no limit; the root group has no such files
    return min(quotas, default=None)


def available_bytes() -> int:
    """Return how many bytes this process can still allocate on the CPU, as far as the system reports it.

    This is the minimum of the machine's free memory, of what the control groups of the process (a container, a job of
    a cluster) have left, and of what ``ulimit`` leaves. 2 GiB where the system reports none of them.
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
    """Return the least that any control group of this process has left; inactive page cache counts as free."""
    least = None
    for folder in control_group_folders("memory"):
        try:
            version2 = (folder / "memory.max").exists()
            limit = int((folder / ("memory.max" if version2 else "memory.limit_in_bytes")).read_text())
            used = int((folder / ("memory.current" if version2 else "memory.usage_in_bytes")).read_text())
            counts = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # "max" stands for no limit; the root group has no such files
        cached = int(counts.get("inactive_file" if version2 else "total_inactive_file", 0))
        free = limit - used + cached
        least = free if least is None else min(least, free)
    return least


def _free_below_limits() -> int | None:
    """Return what ``ulimit -v`` and ``ulimit -d`` leave, or None without such a limit."""
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
    """Return whether ``ulimit`` limits a resource of this process, such as "RLIMIT_AS"."""
    try:
        import resource
    except ImportError:  # Windows
        return False
    kind = getattr(resource, name, None)
    return kind is not None and resource.getrlimit(kind)[0] != resource.RLIM_INFINITY
