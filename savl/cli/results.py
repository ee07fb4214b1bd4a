"""Recognise images that savl has made, so that a second run over a folder does not process results of the first."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from savl.cli.sources import Found, same_file_key
from savl.command_line import UsageError
from savl.images.format import READABLE_FORMATS, format_of_suffix
from savl.images.result_mark import read_mark

_MAP = "_severity"
_ENDINGS = "|".join(suffix[1:] for image_format in READABLE_FORMATS for suffix in image_format.suffixes)


@dataclass
class ResultRule:
    """Rule by which a file is recognised as a result.

    If a file has a mark of savl in its metadata, the mark decides. If it has none (because it was written by an old
    version, or its metadata was removed), its name decides: photo_x4.png, photo.jpg_x4.png and photo_x4_severity.png
    are results if there is an image called photo in the same folder.

    Attributes:
        marks: Marks of results, see `savl.images.result_mark`.
        suffixes: Regular expressions for the ends of the names of results, such as `_lr`.
    """

    marks: frozenset[str]
    suffixes: tuple[str, ...]
    _names: dict[Path, frozenset[str]] = field(default_factory=dict, init=False, repr=False)

    def matches(self, path: Path, *, by_name: bool) -> bool:
        """Return whether a file is a result.

        Args:
            path: The file.
            by_name: Decide by the name if the file has no mark; otherwise such a file is not a result.
        """
        if not os.path.isfile(path):  # reading a pipe would block
            return False
        mark = read_mark(path)
        if mark is not None:
            return mark in self.marks
        return by_name and any(base in self._pictures(path.parent) for base in self._originals(path.stem))

    def _originals(self, stem: str) -> list[str]:
        """Return possible names of the original of a result, with or without suffix."""
        found = [stem.removesuffix(_MAP)] if stem.endswith(_MAP) else []
        for suffix in filter(None, self.suffixes):
            match = re.fullmatch(rf"(.+){suffix}({_MAP})?", stem)
            if match is not None:
                found.append(match.group(1))
        return found

    def _pictures(self, folder: Path) -> frozenset[str]:
        """Return the names of the images in a folder, each with and without suffix."""
        if folder not in self._names:
            try:
                names = [name for name in os.listdir(folder) if format_of_suffix(Path(name), READABLE_FORMATS)]
            except OSError:
                names = []
            self._names[folder] = frozenset(names) | {Path(name).stem for name in names}
        return self._names[folder]


def remove_results(found: Found, rule: ResultRule) -> Found:
    """Remove results from the images that were found.

    A result that was found in a folder or by a glob is removed. One that was named is kept, unless it has a mark and
    the image that it seems to be made of is named too, as happens when a shell expands `*`.

    Raises:
        UsageError: No image is left.
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
        raise UsageError(f"no image is left to work on: {results_message(left_out)}")
    return replace(found, sources=tuple(kept), results=tuple(left_out))


def results_message(results: Sequence[Path]) -> str:
    """Return a line that says which results were left out."""
    if len(results) == 1:
        return f"left out 1 result of an earlier run, {results[0]} (--include-results takes it)"
    return f"left out {len(results)} results of earlier runs, such as {results[0]} (--include-results takes them)"


def _made_of(name: str, stem: str) -> bool:
    """Return whether a result's name begins with that of an original: photo_x4.png or photo.jpg_x4.png of photo."""
    return name.startswith(stem) and not name[len(stem) :][:1].isalnum()
