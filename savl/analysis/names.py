"""What files are called in a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def distinct_names(paths: Sequence[Path], *, suffix: bool = False, folder: bool = False) -> list[str]:
    r"""Short names that tell the files apart: of each as much of its path, from the end, as that takes.

    Args:
        paths: The files.
        suffix: Keep the suffix even where it is not needed.
        folder: Likewise the folder that a file is in, and its suffix.

    Returns:
        One a file, as text that can be written anywhere: what is no UTF-8 in a name is shown as ``\udcff``. Of a file
        that is named twice, the same twice.
    """
    longest = max((len(path.parts) for path in paths), default=0)
    names = [str(Path(*path.parts[-2:])) if folder else path.name if suffix else path.stem for path in paths]
    for parts in range(1, longest + 1):
        owners = Counter(name for name, _ in set(zip(names, paths, strict=True)))
        names = [
            str(Path(*path.parts[-parts:])) if owners[name] > 1 else name
            for name, path in zip(names, paths, strict=True)
        ]
    return [name.encode("utf-8", "backslashreplace").decode() for name in names]
