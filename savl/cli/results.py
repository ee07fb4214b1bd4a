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
from savl.video.container import is_video_name

_MAP_SUFFIXES = ("_severity", "_strength")


@dataclass
class ResultRule:
    """Rule by which a file is recognised as a result.

    If the metadata of a file contain a mark of savl, the mark decides. If there is no mark (because an old version
    wrote the file, or another program removed its metadata), the name decides: photo_x4.png, photo.jpg_x4.png,
    photo_x4_severity.png and photo_x4_strength.png are results if the same folder contains an image named photo, with
    any file extension.

    Attributes:
        marks: Marks of results, see `savl.images.result_mark`.
        suffixes: Regular expressions for the text between the name of the original and the file extension of the
            result, such as `_lr`.
    """

    marks: frozenset[str]
    suffixes: tuple[str, ...]
    _names: dict[Path, frozenset[str]] = field(default_factory=dict, init=False, repr=False)

    def matches(self, path: Path, *, by_name: bool) -> bool:
        """Return whether a file is a result.

        Args:
            path: The file.
            by_name: Whether the name decides about a file without a mark. If False, such a file is not a result.
        """
        if not os.path.isfile(path):  # reading a pipe would block
            return False
        mark = read_mark(path)
        if mark is not None:
            return mark in self.marks
        return by_name and any(name in self._image_names(path.parent) for name in self._original_names(path.stem))

    def _original_names(self, stem: str) -> list[str]:
        """Return the possible names of the original, with or without file extension, for a result named `stem`."""
        found = [stem.removesuffix(suffix) for suffix in _MAP_SUFFIXES if stem.endswith(suffix)]
        for suffix in filter(None, self.suffixes):
            match = re.fullmatch(rf"(.+){suffix}({'|'.join(_MAP_SUFFIXES)})?", stem)
            if match is not None:
                found.append(match.group(1))
        return found

    def _image_names(self, folder: Path) -> frozenset[str]:
        """Return the names of the images in a folder, each with and without file extension."""
        if folder not in self._names:
            try:
                names = [
                    name
                    for name in os.listdir(folder)
                    if format_of_suffix(Path(name), READABLE_FORMATS) or is_video_name(Path(name))
                ]
            except OSError:
                names = []
            self._names[folder] = frozenset(names) | {Path(name).stem for name in names}
        return self._names[folder]


def remove_results(found: Found, rule: ResultRule) -> Found:
    """Remove results from the images that were found.

    Results that were found in a folder or by a glob are removed. A result that is itself an argument of the command
    line is kept, unless it has a mark and an image that seems to be its original is an argument too. This happens when
    a shell expands `*`.

    Raises:
        UsageError: No image remains.
    """
    results = {
        same_file_key(source.path)
        for source in found.sources
        if rule.matches(source.path, by_name=not source.named or source.is_video)  # videos have no mark
    }
    if not results:
        return found
    originals: dict[str, list[str]] = {}
    for source in found.sources:
        if source.named and same_file_key(source.path) not in results:
            originals.setdefault(same_file_key(source.path.parent), []).append(source.path.stem)
    kept, skipped = [], []
    for source in found.sources:
        stems = originals.get(same_file_key(source.path.parent), [])
        if same_file_key(source.path) in results and (
            not source.named or any(_begins_with(source.path.name, stem) for stem in stems)
        ):
            skipped.append(source.path)
        else:
            kept.append(source)
    if not kept and not found.unreadable:
        raise UsageError(f"no input image remains: {results_message(skipped)}")
    return replace(found, sources=tuple(kept), results=tuple(skipped))


def results_message(results: Sequence[Path]) -> str:
    """Return a message about the results that were skipped."""
    if len(results) == 1:
        return f"skipped 1 result of an earlier run, {results[0]}; use --include-results to process it"
    return (
        f"skipped {len(results)} results of earlier runs, such as {results[0]}; use --include-results to process them"
    )


def _begins_with(name: str, stem: str) -> bool:
    """Return whether the name of a result begins with the stem of an original.

    The names photo_x4.png and photo.jpg_x4.png begin with the stem photo; photos_x4.png does not, because a letter or
    digit follows.
    """
    return name.startswith(stem) and not name[len(stem) :][:1].isalnum()
