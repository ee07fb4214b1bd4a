"""Factor tables: lists of images with known factors, such as the camera or the ISO setting."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from savl.analysis.photographs import distinct_names

PATH = "path"
METADATA = "metadata"
SCENE = "scene"
FOLDER = "folder"
MISSING = frozenset({"", "none", "nan", "na", "n/a", "null", "-"})
"""Lower-case spellings of a missing value."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_FRACTION = re.compile(r"([+-]?\d{1,18})/(\d{1,18})", re.ASCII)
_MOST_NAMED = 5


class FactorTableError(ValueError):
    """A table cannot be used; the message names the table and the reason."""


@dataclass(frozen=True)
class FactorTable:
    """Images and their factors."""

    name: str
    paths: tuple[Path, ...]
    factors: dict[str, tuple[str | None, ...]]
    """Values by factor, one per image; None for a missing value."""

    @property
    def scenes(self) -> tuple[str | None, ...] | None:
        """Values of the factor ``scene``, if the table has it."""
        return self.factors.get(SCENE)


def read_tables(files: Iterable[Path], only: Sequence[str] = ()) -> list[FactorTable]:
    """Read tables of images.

    A table is a CSV or TSV file with a header. The column ``path`` names an image, relative to the table's folder;
    every other column is a factor. If there is a column ``metadata`` of the form ``camera=Nikon;iso=100``, as in
    manifests of image collections, it holds the factors and the other columns are ignored. If images lie in several
    folders, the folder's name becomes the factor ``folder``, unless the table has a factor of that name.

    Args:
        files: The tables.
        only: Folders or files as written in the column ``path``. The matching rows of each table form a table of their
            own; a folder matches all rows below it. If empty, whole tables are read.

    Raises:
        FactorTableError: A table cannot be read, has no column ``path``, has rows of different lengths, names an image
            twice or a missing one, or has no factor that varies; or a path of ``only`` is in no table.
    """
    tables: list[FactorTable] = []
    files = list(dict.fromkeys(files))
    only = list({PurePosixPath(part): part for part in reversed(only)}.values())[::-1]
    found = Counter[str]()
    for file, title in zip(files, distinct_names(files, suffix=True), strict=True):
        rows = _read_rows(file)
        if not only:
            tables.append(_table(file, title, rows))
        for part in only:
            chosen = [row for row in rows if PurePosixPath(row[PATH]).is_relative_to(PurePosixPath(part))]
            if chosen:
                found[part] += len(chosen)
                tables.append(_table(file, part if len(files) == 1 else f"{title}: {part}", chosen))
    if lost := [part for part in only if not found[part]]:
        raise FactorTableError(
            f"only: no path of {_named([str(file) for file in files]) or 'any table'} is {lost[0]!r} or lies in it"
        )
    return tables


def numbers(values: Sequence[str | None]) -> list[float] | None:
    """Convert values to numbers, None to NaN; return None if one of the values is no number.

    Fractions such as 1/160 are numbers. Values with leading zeros such as 007 are names.
    """
    parsed = [math.nan if value is None else _number(value) for value in values]
    return None if None in parsed else [number for number in parsed if number is not None]


def _number(text: str) -> float | None:
    if re.match(r"[+-]?0\d", text):
        return None
    if fraction := _FRACTION.fullmatch(text):
        above, below = map(int, fraction.groups())
        return above / below if below else None
    value = float(text) if _NUMBER.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None


def _read_rows(file: Path) -> list[dict[str, str]]:
    """Return the rows as dictionaries by column, with the metadata split into factors."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FactorTableError(f"{file}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise FactorTableError(f"{file}: is no UTF-8 text ({error.reason} at byte {error.start})") from error
    header = text.lstrip("\r\n").partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in header else ",")
    try:
        lines = [(reader.line_num, line) for line in reader if line]
    except csv.Error as error:
        raise FactorTableError(f"{file}: line {reader.line_num}: {error}") from error
    if not lines:
        raise FactorTableError(f"{file}: is empty; a header with a column {PATH!r}, and rows, are needed")
    columns = [name.strip() for name in lines[0][1]]
    if PATH not in columns:
        raise FactorTableError(f"{file}: must have a column {PATH!r}, has {_named(columns)}")
    if "" in columns:
        raise FactorTableError(f"{file}: column {columns.index('') + 1} of {len(columns)} has no name")
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise FactorTableError(f"{file}: has several columns {twice[0]!r}")
    if len(lines) == 1:
        raise FactorTableError(f"{file}: has a header and no rows")
    rows = []
    for number, line in lines[1:]:
        if len(line) != len(columns):
            raise FactorTableError(f"{file}: line {number} has {len(line)} values for {len(columns)} columns")
        row = {name: value.strip() for name, value in zip(columns, line, strict=True)}
        if not row[PATH]:
            raise FactorTableError(f"{file}: line {number} has no {PATH}")
        if METADATA in row:
            row = {PATH: row[PATH]} | _split_metadata(row[METADATA], f"{file}: line {number}")
        rows.append(row)
    return rows


def _split_metadata(metadata: str, where: str) -> dict[str, str]:
    """Convert ``camera=Nikon;iso=100`` to a dictionary."""
    values: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in metadata.split(";"))):
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals or not name or name == PATH or name in values:
            raise FactorTableError(f"{where}: {METADATA} must be name=value;name=value, each name once, has {part!r}")
        values[name] = value.strip()
    return values


def _table(file: Path, name: str, rows: Sequence[dict[str, str]]) -> FactorTable:
    paths = tuple(file.parent / row[PATH] for row in rows)
    if bad := [row[PATH] for row in rows if "\0" in row[PATH]]:
        raise FactorTableError(f"{file}: {bad[0]!r} is no path")
    if lost := [str(path) for path in paths if not _is_file(path)]:
        raise FactorTableError(f"{file}: names images that are not there: {_named(lost)}")
    if twice := [str(path) for path, count in Counter(path.resolve() for path in paths).items() if count > 1]:
        raise FactorTableError(f"{file}: names images several times: {_named(twice)}")
    names = dict.fromkeys(column for row in rows for column in row if column != PATH)
    factors = {column: tuple(_value(row.get(column, "")) for row in rows) for column in names}
    folders = tuple(path.parent.name for path in paths)
    if len(set(folders)) > 1:
        factors.setdefault(FOLDER, folders)
    if not factors:
        raise FactorTableError(f"{file}: {name} has no factor, only the column {PATH!r}")
    if all(len(set(values) - {None}) < 2 for values in factors.values()):
        known = [f"{factor} is always {next(filter(None, values), 'missing')}" for factor, values in factors.items()]
        raise FactorTableError(f"{file}: {name} has one class only of every factor ({_named(known)})")
    return FactorTable(name, paths, factors)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long for any file
        return False


def _value(text: str) -> str | None:
    return None if text.lower() in MISSING else text


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    return f"{shown} and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else shown
