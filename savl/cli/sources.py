"""Which pictures the user's arguments stand for: files, folders and quoted globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from savl.images.format import READABLE, format_of_suffix


class UsageMistake(ValueError):
    """The arguments contradict each other or name nothing; nothing has been started."""


@dataclass(frozen=True)
class Source:
    """One input picture.

    Attributes:
        path: the file, as reached from the user's argument.
        folder: where it goes below an output folder: its place below the folder that was given, else ".".
        named: the user (or the shell) named the file itself, rather than a folder or a glob.
    """

    path: Path
    folder: Path
    named: bool


@dataclass(frozen=True)
class Found:
    """What the arguments stand for.

    Attributes:
        sources: the pictures.
        unreadable: folders that could not be looked into, each with the reason.
    """

    sources: tuple[Source, ...]
    unreadable: dict[Path, str]


def find_sources(arguments: Sequence[str], *, recursive: bool, output: Path | None) -> Found:
    """Lists the pictures that the arguments stand for, each once, folders in alphabetical order.

    A name that exists is taken as it is, so files called `a[1].png` need no quoting; otherwise `*`, `?`,
    `[...]` and `**` are expanded here. From folders and globs only files with an image suffix are taken, and
    no hidden ones. Named files are kept even when missing: that is for reading to report.

    Args:
        arguments: as typed.
        recursive: look into the folders' subfolders.
        output: an output folder inside an input folder is not searched, so that results are not upscaled
            again.

    Raises:
        UsageMistake: a folder or glob without any picture.
    """
    found: dict[str, Source] = {}
    unreadable: dict[Path, str] = {}
    for argument in arguments:
        path = Path(argument)
        if os.path.isdir(path):
            errors: list[OSError] = []
            sources = list(_in_folder(path, recursive, output, errors.append))
            unreadable |= {Path(error.filename): (error.strerror or str(error)).lower() for error in errors}
            if not sources and not errors:
                below = " or below" if recursive else "; -r looks into its subfolders"
                raise UsageMistake(f"no {READABLE} picture in folder {argument!r}{below}")
        elif not os.path.exists(path) and glob.has_magic(argument):
            sources = [
                Source(match, Path("."), named=False)
                for match in map(Path, sorted(glob.glob(argument, recursive=True)))
                if os.path.isfile(match) and format_of_suffix(match) is not None
            ]
            if not sources:
                raise UsageMistake(f"no {READABLE} picture matches {argument!r}")
        else:
            sources = [Source(path, Path("."), named=True)]
        for source in sources:
            # A link is a picture of its own beside the file it leads to: both names get a result.
            place = Path(same_file_key(source.path.parent), os.path.normcase(source.path.name))
            found.setdefault(str(place), source)
    return Found(tuple(found.values()), unreadable)


def same_file_key(path: Path) -> str:
    """A string that is equal for two spellings of one file, whether it exists or not."""
    return os.path.normcase(os.path.realpath(path))


def _in_folder(
    root: Path, recursive: bool, output: Path | None, on_error: Callable[[OSError], None]
) -> Iterator[Source]:
    skipped = None if output is None else same_file_key(output)
    if skipped == same_file_key(root):
        skipped = None  # writing into the input folder itself, under other names
    for folder, subfolders, names in os.walk(root, onerror=on_error):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if recursive and not name.startswith(".") and same_file_key(Path(folder, name)) != skipped
        )
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and format_of_suffix(path) is not None:
                yield Source(path, path.parent.relative_to(root), named=False)
