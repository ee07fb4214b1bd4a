"""Which pictures the user's arguments stand for: files, folders and quoted globs."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

from savl.cli.claims import CLAIM_SUFFIX
from savl.images.format import READABLE, READABLE_FORMATS, format_of_suffix

_MOST_KINDS = 8
# savl's own files in work, of another process or of one that was killed: no news for anybody.
_IN_WORK = re.compile(rf"\..*(\.part|{re.escape(CLAIM_SUFFIX)})")


class UsageMistake(ValueError):
    """The arguments contradict each other or name nothing; nothing has been started."""


@dataclass(frozen=True)
class Source:
    """One input picture.

    Attributes:
        path: the file, as reached from the user's argument.
        folder: where it goes below an output folder: its place below the folder that was given, else ".".
        named: the user (or the shell) named the file itself, rather than a folder or a glob.
        content: what standard input held, whose `path` is a mere name; None for files.
    """

    path: Path
    folder: Path
    named: bool
    content: bytes | None = None


@dataclass
class Skipped:
    """What lay in the folders and is no input, each file or folder once, with what it is."""

    _kinds: dict[str, str] = field(default_factory=dict)

    def add(self, path: Path, kind: str) -> None:
        """Count a file or folder."""
        self._kinds[_place(path)] = kind

    def __str__(self) -> str:
        """Return the counts in one line, the most frequent first, or "" where nothing was skipped."""
        counts = Counter(self._kinds.values()).most_common()
        parts = [_spell(kind, count) for kind, count in counts[:_MOST_KINDS]]
        if rest := sum(count for _, count in counts[_MOST_KINDS:]):
            parts.append(f"{rest} of other kinds")
        return ", ".join(parts)


HIDDEN, LINKED_FOLDER, SUBFOLDER, EXCLUDED, NO_SUFFIX = "hidden", "linked folder", "subfolder", "excluded", "no suffix"


def _spell(kind: str, count: int) -> str:
    plural = "" if count == 1 else "s"
    return {
        LINKED_FOLDER: f"{count} linked folder{plural} (not followed)",
        SUBFOLDER: f"{count} subfolder{plural} (-r looks into {'it' if count == 1 else 'them'})",
        EXCLUDED: f"{count} by --exclude",
        NO_SUFFIX: f"{count} without a suffix",
    }.get(kind, f"{count} {kind}")


@dataclass(frozen=True)
class Found:
    """What the arguments stand for.

    Attributes:
        sources: the pictures.
        unreadable: folders that could not be looked into, each with the reason.
        skipped: what else is there.
        results: pictures left out because savl made them; see `savl.cli.results`.
    """

    sources: tuple[Source, ...]
    unreadable: dict[Path, str]
    skipped: Skipped
    results: tuple[Path, ...] = ()


def find_sources(
    arguments: Sequence[str],
    *,
    recursive: bool,
    output: Path | None,
    exclude: Sequence[str] = (),
    standard_input: bytes | None = None,
) -> Found:
    """List the pictures that the arguments stand for, each once, folders in alphabetical order.

    A name that exists is taken as it is, so files called `a[1].png` need no quoting; otherwise `*`, `?`,
    `[...]` and `**` are expanded here. From folders and globs only files with an image suffix are taken, and
    no hidden ones. Named files are kept even when missing: that is for reading to report.

    Args:
        arguments: as typed.
        recursive: look into the folders' subfolders.
        output: an output folder inside an input folder is not searched, so that results are not upscaled
            again.
        exclude: globs; files and folders are left out whose name, or whose path below the folder that was given,
            matches one of them.
        standard_input: what `-` stands for; None takes `-` for a file of that name.

    Raises:
        UsageMistake: a folder or glob without any picture, or nothing is left of what was named.
    """
    found: dict[str, Source] = {}
    unreadable: dict[Path, str] = {}
    skipped = Skipped()
    for argument in arguments:
        path = Path(argument)
        if argument == "-" and standard_input is not None:
            sources = [Source(Path("stdin"), Path("."), named=True, content=standard_input)]
        elif os.path.isdir(path):
            errors: list[OSError] = []
            sources = list(_in_folder(path, recursive, output, exclude, skipped, errors))
            unreadable |= {Path(error.filename): (error.strerror or str(error)).lower() for error in errors}
            if not sources and not errors:
                below = " or below" if recursive else "; -r looks into its subfolders"
                raise UsageMistake(f"no {READABLE} picture in folder {argument!r}{below}{_in_brackets(skipped)}")
        elif not os.path.exists(path) and glob.has_magic(argument):
            matches = [path for path in map(Path, sorted(glob.glob(argument, recursive=True))) if os.path.isfile(path)]
            pictures = _pictures({match: match for match in matches}, exclude, skipped)
            sources = [Source(match, Path("."), named=False) for match in pictures]
            if not sources:
                raise UsageMistake(f"no {READABLE} picture matches {argument!r}{_in_brackets(skipped)}")
        elif _excluded(path, exclude):
            skipped.add(path, EXCLUDED)
            sources = []
        else:
            sources = [Source(path, Path("."), named=True)]
        for source in sources:
            # A link is a picture of its own beside the file it leads to: both names get a result.
            other = found.setdefault(_place(source.path), source)
            if source.named and not other.named:
                found[_place(source.path)] = replace(other, named=True)
    if not found and not unreadable:
        raise UsageMistake(f"no picture is left to work on{_in_brackets(skipped)}")
    return Found(tuple(found.values()), unreadable, skipped)


def same_file_key(path: Path) -> str:
    """Return a string that is equal for two spellings of one file, whether it exists or not."""
    return os.path.normcase(os.path.realpath(path))


def _place(path: Path) -> str:
    """A string that is equal for two spellings of one name in a folder; links are names of their own."""
    return str(Path(same_file_key(path.parent), os.path.normcase(path.name)))


def _in_brackets(skipped: Skipped) -> str:
    return f" (skipped: {skipped})" if str(skipped) else ""


def _excluded(below: Path, exclude: Sequence[str]) -> bool:
    """Whether a path, or a folder on the way to it, matches a glob by its name or from the beginning."""
    parts = [part for part in below.parts if part not in (".", below.anchor)]
    for pattern in exclude:
        pattern = pattern.removeprefix("./").removeprefix("**/").strip("/")
        for end, name in enumerate(parts, 1):
            if fnmatch(name, pattern) or fnmatch("/".join(parts[:end]), pattern):
                return True
    return False


def _pictures(paths: dict[Path, Path], exclude: Sequence[str], skipped: Skipped) -> Iterator[Path]:
    """The pictures among files; the others are counted as skipped.

    Args:
        paths: the files, each with what `exclude` is compared to.
        exclude: globs, see `find_sources`.
        skipped: where to count.
    """
    for path, below in paths.items():
        if format_of_suffix(path, READABLE_FORMATS) is None:
            skipped.add(path, path.suffix.lower() or NO_SUFFIX)
        elif _excluded(below, exclude):
            skipped.add(path, EXCLUDED)
        else:
            yield path


def _in_folder(
    root: Path,
    recursive: bool,
    output: Path | None,
    exclude: Sequence[str],
    skipped: Skipped,
    errors: list[OSError],
) -> Iterator[Source]:
    no_input = None if output is None else same_file_key(output)
    if no_input == same_file_key(root):
        no_input = None  # writing into the input folder itself, under other names
    for folder, subfolders, names in os.walk(root, onerror=errors.append):
        entered = []
        for path in (Path(folder, name) for name in sorted(subfolders)):
            if path.name.startswith("."):
                skipped.add(path, HIDDEN)
            elif _excluded(path.relative_to(root), exclude):
                skipped.add(path, EXCLUDED)
            elif same_file_key(path) == no_input:
                continue
            elif path.is_symlink():
                skipped.add(path, LINKED_FOLDER)
            elif not recursive:
                skipped.add(path, SUBFOLDER)
            else:
                entered.append(path.name)
        subfolders[:] = entered
        files = {}
        for path in (Path(folder, name) for name in sorted(names) if not _IN_WORK.fullmatch(name)):
            if path.name.startswith("."):
                skipped.add(path, HIDDEN)
            else:
                files[path] = path.relative_to(root)
        for path in _pictures(files, exclude, skipped):
            yield Source(path, path.parent.relative_to(root), named=False)
