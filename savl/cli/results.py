"""Which inputs are results of savl's own, so that a second run over a folder does not enlarge what the first made."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from savl.cli.sources import Found, UsageMistake, same_file_key
from savl.images.format import READABLE_FORMATS, format_of_suffix
from savl.images.result_mark import read_mark

_MAP = "_severity"
_ENDINGS = "|".join(suffix[1:] for image_format in READABLE_FORMATS for suffix in image_format.suffixes)


@dataclass
class ResultRule:
    """What counts as a result.

    A file that carries a mark of savl's is judged by it. One without (written by an older savl, or stripped of
    its metadata) is judged by its name: photo_x4.png, photo.jpg_x4.png and photo_x4_severity.png are results where a
    picture photo lies beside them.

    Attributes:
        marks: the marks of `savl.images.result_mark` that count.
        suffixes: regular expressions for what results have at the ends of their names, such as `_lr`.
    """

    marks: frozenset[str]
    suffixes: tuple[str, ...]
    _names: dict[Path, frozenset[str]] = field(default_factory=dict, init=False, repr=False)

    def matches(self, path: Path, *, by_name: bool) -> bool:
        """Return whether a file is a result.

        Args:
            path: the file.
            by_name: judge a file without a mark by its name; otherwise it is no result.
        """
        if not os.path.isfile(path):  # a pipe would be waited for
            return False
        mark = read_mark(path)
        if mark is not None:
            return mark in self.marks
        return by_name and any(base in self._pictures(path.parent) for base in self._originals(path.stem))

    def _originals(self, stem: str) -> list[str]:
        """What the original of a file could be called, if the file is a result: with or without its ending."""
        found = [stem.removesuffix(_MAP)] if stem.endswith(_MAP) else []
        for suffix in filter(None, self.suffixes):
            match = re.fullmatch(rf"(.+){suffix}({_MAP})?", stem)
            if match is not None:
                found.append(match.group(1))
        return found

    def _pictures(self, folder: Path) -> frozenset[str]:
        """The names of the pictures in a folder, each with and without its ending."""
        if folder not in self._names:
            try:
                names = [name for name in os.listdir(folder) if format_of_suffix(Path(name), READABLE_FORMATS)]
            except OSError:
                names = []
            self._names[folder] = frozenset(names) | {Path(name).stem for name in names}
        return self._names[folder]


def leave_out_results(found: Found, rule: ResultRule) -> Found:
    """Leave the results out of the pictures that were found.

    What was found in a folder or by a glob is left out if it is a result. What was named is taken, unless it has a
    mark and the picture that it seems to be made of is named too, as by a shell's `*`.

    Raises:
        UsageMistake: nothing is left.
    """
    results = {
        same_file_key(source.path) for source in found.sources if rule.matches(source.path, by_name=not source.named)
    }
    if not results:
        return found
    originals: dict[str, list[str]] = {}
    for source in found.sources:
        if source.named and same_file_key(source.path) not in results:
            originals.setdefault(same_file_key(source.path.parent), []).append(source.path.stem)
    kept, left_out = [], []
    for source in found.sources:
        stems = originals.get(same_file_key(source.path.parent), [])
        if same_file_key(source.path) in results and (
            not source.named or any(_made_of(source.path.name, stem) for stem in stems)
        ):
            left_out.append(source.path)
        else:
            kept.append(source)
    if not kept and not found.unreadable:
        raise UsageMistake(f"no picture is left to work on: {left_out_results(left_out)}")
    return replace(found, sources=tuple(kept), results=tuple(left_out))


def left_out_results(results: Sequence[Path]) -> str:
    """Return the line that says what was left out."""
    if len(results) == 1:
        return f"left out 1 result of an earlier run, {results[0]} (--include-results takes it)"
    return f"left out {len(results)} results of earlier runs, such as {results[0]} (--include-results takes them)"


def _made_of(name: str, stem: str) -> bool:
    """Whether a result's name is an original's with something added: photo_x4.png or photo.jpg_x4.png of photo."""
    return name.startswith(stem) and not name[len(stem) :][:1].isalnum()
