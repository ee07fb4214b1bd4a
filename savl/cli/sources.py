"""Which pictures the user's arguments stand for: files, folders and quoted globs."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

from savl.cli.claims import CLAIM_SUFFIX
from savl.images.format import READABLE, READABLE_FORMATS, format_of_suffix

_MOST_KINDS = 8
_MOST_STARS = 6  # `**/` in one glob; further ones stand for one folder or more
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
        unmatched: globs to exclude that matched nothing.
        results: pictures left out because savl made them; see `savl.cli.results`.
    """

    sources: tuple[Source, ...]
    unreadable: dict[Path, str]
    skipped: Skipped
    unmatched: tuple[str, ...] = ()
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
            matches one of them, and those given that match. `**/` is any number of folders. An absolute glob matches
            where a file or folder lies.
        standard_input: what `-` stands for; None takes `-` for a file of that name.

    Raises:
        UsageMistake: a folder or glob without any picture, or nothing is left of what was named.
    """
    found: dict[str, Source] = {}
    unreadable: dict[Path, str] = {}
    skipped = Skipped()
    exclusion = _Exclusion(exclude)
    for argument in arguments:
        path = Path(argument)
        if argument == "-" and standard_input is not None:
            sources = [Source(Path("stdin"), Path("."), named=True, content=standard_input)]
        elif os.path.isdir(path) and exclusion.covers_argument(path):
            skipped.add(path, EXCLUDED)
            sources = []
        elif os.path.isdir(path):
            errors: list[OSError] = []
            sources = list(_in_folder(path, recursive, output, exclusion, skipped, errors))
            unreadable |= {Path(error.filename): (error.strerror or str(error)).lower() for error in errors}
            if not sources and not errors:
                below = " or below" if recursive else "; -r looks into its subfolders"
                raise UsageMistake(f"no {READABLE} picture in folder {argument!r}{below}{_in_brackets(skipped)}")
        elif not os.path.exists(path) and glob.has_magic(argument):
            matches = [path for path in map(Path, sorted(glob.glob(argument, recursive=True))) if os.path.isfile(path)]
            pictures = _pictures({match: match for match in matches}, exclusion, skipped)
            sources = [Source(match, Path("."), named=False) for match in pictures]
            if not sources:
                raise UsageMistake(f"no {READABLE} picture matches {argument!r}{_in_brackets(skipped)}")
        elif exclusion.covers(path, path):
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
    return Found(tuple(found.values()), unreadable, skipped, exclusion.unmatched)


def same_file_key(path: Path) -> str:
    """Return a string that is equal for two spellings of one file, whether it exists or not."""
    return os.path.normcase(os.path.realpath(path))


def _place(path: Path) -> str:
    """A string that is equal for two spellings of one name in a folder; links are names of their own."""
    return str(Path(same_file_key(path.parent), os.path.normcase(path.name)))


def _in_brackets(skipped: Skipped) -> str:
    return f" (skipped: {skipped})" if str(skipped) else ""


class _Exclusion:
    """The globs of `--exclude`, and which of them have matched."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._variants = {pattern: frozenset(_variants(pattern)) for pattern in patterns}
        self._matched: set[str] = set()

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The globs that have matched nothing so far."""
        return tuple(pattern for pattern in self._variants if pattern not in self._matched)

    def covers(self, path: Path, below: Path) -> bool:
        """Return whether a glob matches a file or folder, or a folder on the way to it, by name or from the beginning.

        Args:
            path: the file or folder. Absolute globs are compared to where it lies.
            below: its path below the folder that was given, which other globs are compared to.
        """
        parts = [part for part in below.parts if part not in (".", below.anchor)]
        return self._match(path, {*parts, *("/".join(parts[:end]) for end in range(1, len(parts) + 1))})

    def covers_argument(self, folder: Path) -> bool:
        """Return whether a glob matches a folder that was given, by its name or as a whole."""
        parts = [part for part in folder.parts if part not in (".", folder.anchor)]
        return self._match(folder, {*parts[-1:], "/".join(parts)} - {""})

    def _match(self, path: Path, names: set[str]) -> bool:
        place = Path(os.path.abspath(path))
        places = {parent.as_posix() for parent in (place, *place.parents)}
        found = False
        for pattern, variants in self._variants.items():  # all of them, to know which match
            compared = names | places if os.path.isabs(pattern) else names
            if any(fnmatch(name, variant) for name in compared for variant in variants):
                self._matched.add(pattern)
                found = True
        return found


def _variants(pattern: str) -> Iterator[str]:
    """The globs to try for one in which `**/` stands for any number of folders, none included."""
    pattern = pattern.removeprefix("./")
    absolute = pattern.rstrip("/") if os.path.isabs(pattern) else ""
    for start in filter(None, {pattern.strip("/"), absolute}):
        first, *others = start.split("**/", _MOST_STARS)
        for chosen in product(*((piece, f"*/{piece}") for piece in others)):
            yield first + "".join(chosen)


def _pictures(paths: dict[Path, Path], exclusion: _Exclusion, skipped: Skipped) -> Iterator[Path]:
    """The pictures among files; the others are counted as skipped.

    Args:
        paths: the files, each with what `exclude` is compared to.
        exclusion: the globs of `--exclude`.
        skipped: where to count.
    """
    for path, below in paths.items():
        excluded = exclusion.covers(path, below)
        if format_of_suffix(path, READABLE_FORMATS) is None:
            skipped.add(path, path.suffix.lower() or NO_SUFFIX)
        elif excluded:
            skipped.add(path, EXCLUDED)
        else:
            yield path


def _in_folder(
    root: Path,
    recursive: bool,
    output: Path | None,
    exclusion: _Exclusion,
    skipped: Skipped,
    errors: list[OSError],
) -> Iterator[Source]:
    no_input = None if output is None else same_file_key(output)
    if no_input == same_file_key(root):
        no_input = None  # writing into the input folder itself, under other names
    for folder, subfolders, names in os.walk(root, onerror=errors.append):
        entered = []
        for path in (Path(folder, name) for name in sorted(subfolders)):
            excluded = exclusion.covers(path, path.relative_to(root))
            if path.name.startswith("."):
                skipped.add(path, HIDDEN)
            elif excluded:
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
                exclusion.covers(path, path.relative_to(root))
                skipped.add(path, HIDDEN)
            else:
                files[path] = path.relative_to(root)
        for path in _pictures(files, exclusion, skipped):
            yield Source(path, path.parent.relative_to(root), named=False)
