"""Find the input images and videos of a command from its arguments: files, folders and quoted globs."""

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

from savl.command_line import UsageError
from savl.images.format import READABLE, READABLE_FORMATS, format_of_suffix
from savl.images.locks import LOCK_SUFFIX
from savl.video.container import is_video_name

_MOST_KINDS = 8
_MOST_STARS = 6  # `**/` in one glob; further ones match one folder or more
# savl's own temporary files and folders, of another process or of one that was killed. They are not counted as skipped.
_TEMPORARY = re.compile(rf"\..*(\.part|\.segments|{re.escape(LOCK_SUFFIX)})")


@dataclass(frozen=True)
class Source:
    """One input image or video.

    Attributes:
        path: The file, relative to the same folder as the user's argument.
        folder: Folder of the result, relative to the output folder. For a file found in an input folder, this is the
            path of its folder relative to the input folder; otherwise ".".
        named: Whether the file itself is an argument of the command line. False if savl found it in a folder or by a
            glob.
        content: Content of standard input, for which `path` is only a name; None for files.
        is_video: Whether it is processed as a video.
    """

    path: Path
    folder: Path
    named: bool
    content: bytes | None = None
    is_video: bool = False


@dataclass
class Skipped:
    """Files and folders that are not inputs, each counted once with its kind."""

    videos: bool = False
    """Whether the command processes videos that are named."""
    _kinds: dict[str, str] = field(default_factory=dict)

    def add(self, path: Path, kind: str) -> None:
        """Count a file or folder of a kind, such as ".txt"."""
        if self.videos and kind.startswith(".") and is_video_name(path):
            kind = f"{kind} (a video is upscaled if you name it)"
        self._kinds[_place(path)] = kind

    def __str__(self) -> str:
        """Return the counts in one line, the most frequent first, or "" if nothing was skipped."""
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
        SUBFOLDER: f"{count} subfolder{plural} (use -r to search {'it' if count == 1 else 'them'})",
        EXCLUDED: f"{count} by --exclude",
        NO_SUFFIX: f"{count} without a suffix",
    }.get(kind, f"{count} {kind}")


@dataclass(frozen=True)
class Found:
    """Files found for the arguments of the command line.

    Attributes:
        sources: The images.
        unreadable: Folders that could not be read, each with the reason.
        skipped: Other files and folders.
        unmatched: Globs of `--exclude` that matched nothing.
        results: Images that are skipped because savl made them; see `savl.cli.results`.
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
    videos: bool = False,
) -> Found:
    """List the input images for the arguments, each image once, and the images of a folder in alphabetical order.

    If a file with exactly the name of an argument exists, it is the input, so that `a[1].png` needs no quoting.
    Otherwise, `*`, `?`, `[...]` and `**` are expanded here. In folders and globs, hidden files and files without the
    suffix of an image format are skipped. Arguments that are neither are listed even if the file does not exist; the
    error is reported when the file is read.

    Videos take hours, so they are inputs only if they are named, or by a glob that ends in the suffix of a video.

    Args:
        arguments: Arguments of the command line.
        recursive: Search subfolders too.
        output: Output folder. It is not searched if it lies in an input folder, so that results are not upscaled again.
        exclude: Globs. A file or folder is skipped if its name, or its path below the input folder, matches one of
            them; so is an argument that matches. `**/` matches any number of folders. An absolute glob is compared with
            the absolute path.
        standard_input: Content of standard input, for the argument `-`. If None, `-` is the name of a file.
        videos: Whether the command processes videos.

    Raises:
        UsageError: A folder or glob contains no image, or no image remains after exclusion.
    """
    found: dict[str, Source] = {}
    unreadable: dict[Path, str] = {}
    skipped = Skipped(videos)
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
                below = " or below" if recursive else "; use -r to search its subfolders"
                raise UsageError(f"no {READABLE} image in folder {argument!r}{below}{_in_brackets(skipped)}")
        elif not os.path.exists(path) and glob.has_magic(argument):
            matches = [path for path in map(Path, sorted(glob.glob(argument, recursive=True))) if os.path.isfile(path)]
            wants_videos = videos and is_video_name(path)
            inputs = _inputs({match: match for match in matches}, exclusion, skipped, videos=wants_videos)
            sources = [Source(match, Path("."), named=False, is_video=wants_videos) for match in inputs]
            if not sources:
                kind = "video" if wants_videos else f"{READABLE} image"
                raise UsageError(f"no {kind} matches {argument!r}{_in_brackets(skipped)}")
        elif exclusion.covers(path, path):
            skipped.add(path, EXCLUDED)
            sources = []
        else:
            sources = [Source(path, Path("."), named=True, is_video=videos and is_video_name(path))]
        for source in sources:
            # A symbolic link is an image of its own: both names get a result.
            other = found.setdefault(_place(source.path), source)
            if source.named and not other.named:
                found[_place(source.path)] = replace(other, named=True)
    if not found and not unreadable:
        raise UsageError(f"no input image remains{_in_brackets(skipped)}")
    return Found(tuple(found.values()), unreadable, skipped, exclusion.unmatched)


def same_file_key(path: Path) -> str:
    """Return a string that is equal for two paths of one file, whether it exists or not."""
    return os.path.normcase(os.path.realpath(path))


def _place(path: Path) -> str:
    """Return a string that is equal for two paths of one directory entry; symbolic links are entries of their own."""
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
        """Return whether a glob matches a file or folder, or one of the folders that contain it.

        Args:
            path: The file or folder, with which absolute globs are compared.
            below: Its path below the folder that was given, with which other globs are compared.
        """
        parts = [part for part in below.parts if part not in (".", below.anchor)]
        return self._match(path, {*parts, *("/".join(parts[:end]) for end in range(1, len(parts) + 1))})

    def covers_argument(self, folder: Path) -> bool:
        """Return whether a glob matches a folder that was given, by its name or by its whole path."""
        parts = [part for part in folder.parts if part not in (".", folder.anchor)]
        return self._match(folder, {*parts[-1:], "/".join(parts)} - {""})

    def _match(self, path: Path, names: set[str]) -> bool:
        place = Path(os.path.abspath(path))
        places = {parent.as_posix() for parent in (place, *place.parents)}
        found = False
        for pattern, variants in self._variants.items():  # all of them, to record which ones match
            compared = names | places if os.path.isabs(pattern) else names
            if any(fnmatch(name, variant) for name in compared for variant in variants):
                self._matched.add(pattern)
                found = True
        return found


def _variants(pattern: str) -> Iterator[str]:
    """Yield globs without `**/` that together match what a glob matches in which it is any number of folders."""
    pattern = pattern.removeprefix("./")
    absolute = pattern.rstrip("/") if os.path.isabs(pattern) else ""
    for start in filter(None, {pattern.strip("/"), absolute}):
        first, *others = start.split("**/", _MOST_STARS)
        for chosen in product(*((piece, f"*/{piece}") for piece in others)):
            yield first + "".join(chosen)


def _inputs(
    paths: dict[Path, Path], exclusion: _Exclusion, skipped: Skipped, *, videos: bool = False
) -> Iterator[Path]:
    """Yield the images, or the videos, among files, and count the others as skipped.

    Args:
        paths: The files, each with the path that globs are compared with.
        exclusion: The globs of `--exclude`.
        skipped: Counts of skipped files.
        videos: Yield videos instead of images.
    """
    for path, below in paths.items():
        excluded = exclusion.covers(path, below)
        if not (is_video_name(path) if videos else format_of_suffix(path, READABLE_FORMATS)):
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
        no_input = None  # The results go into the input folder itself, under other names.
    for folder, subfolders, names in os.walk(root, onerror=errors.append):
        entered = []
        for path in (Path(folder, name) for name in sorted(subfolders) if not _TEMPORARY.fullmatch(name)):
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
        for path in (Path(folder, name) for name in sorted(names) if not _TEMPORARY.fullmatch(name)):
            if path.name.startswith("."):
                exclusion.covers(path, path.relative_to(root))
                skipped.add(path, HIDDEN)
            else:
                files[path] = path.relative_to(root)
        for path in _inputs(files, exclusion, skipped):
            yield Source(path, path.parent.relative_to(root), named=False)
