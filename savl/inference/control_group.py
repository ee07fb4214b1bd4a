"""The control groups around this process, by which Linux limits the memory and processors of a container or a job."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

MOUNT = Path("/sys/fs/cgroup")
LISTING = Path("/proc/self/cgroup")


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
