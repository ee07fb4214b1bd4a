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
_MAX_LISTED = 5


class FactorTableError(ValueError):
    """A table cannot be used; the message names the table and the reason."""


@dataclass(frozen=True)
class FactorTable:
    """Images and their factors."""

    name: str
    """Name of the table in reports and errors."""
    paths: tuple[Path, ...]
    """Paths of the images."""
    factors: dict[str, tuple[str | None, ...]]
    """For each factor, the values of all images in the order of `paths`; None for a missing value."""

    @property
    def scenes(self) -> tuple[str | None, ...] | None:
        """Values of the factor ``scene``, if the table has it."""
        return self.factors.get(SCENE)


def read_tables(files: Iterable[Path], only: Sequence[str] = ()) -> list[FactorTable]:
    """Read tables of images.

    A table is a CSV or TSV file with a header. The column ``path`` holds the path of an image, relative to the table's
    folder; every other column is a factor. Manifests of image collections have a column ``metadata`` with values such
    as ``camera=Nikon;iso=100``. If a table has this column, the factors are read from it, and the other columns are
    ignored. If the images lie in several folders, the name of the folder is added as the factor ``folder``, unless the
    table has a factor of that name.

    Args:
        files: The tables.
        only: Folders or files as written in the column ``path``. The matching rows of each table form a table of their
            own; a folder matches all rows below it. If empty, whole tables are read.

    Raises:
        FactorTableError: A table cannot be read, has no column ``path``, has rows of different lengths, lists an image
            twice, lists an image that does not exist, or has no factor that varies; or a path in ``only`` matches no
            row of any table.
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
    if unmatched := [part for part in only if not found[part]]:
        tables_read = _listed([str(file) for file in files]) or "any table"
        raise FactorTableError(f"only: {unmatched[0]!r} matches no path in {tables_read}")
    return tables


def numbers(values: Sequence[str | None]) -> list[float] | None:
    """Convert values to numbers, and None to NaN. Return None if one of the values is not a number.

    Fractions such as 1/160 are numbers. Values with leading zeros such as 007 are not, because they are usually names.
    """
    parsed = [math.nan if value is None else _number(value) for value in values]
    return None if None in parsed else [number for number in parsed if number is not None]


def _number(text: str) -> float | None:
    if re.match(r"[+-]?0\d", text):
        return None
    if fraction := _FRACTION.fullmatch(text):
        numerator, denominator = map(int, fraction.groups())
        return numerator / denominator if denominator else None
    value = float(text) if _NUMBER.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None


def _read_rows(file: Path) -> list[dict[str, str]]:
    """Return each row as a dictionary from column to value, with the column ``metadata`` split into its factors."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FactorTableError(f"{file}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise FactorTableError(f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    header = text.lstrip("\r\n").partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in header else ",")
    try:
        lines = [(reader.line_num, line) for line in reader if line]
    except csv.Error as error:
        raise FactorTableError(f"{file}: line {reader.line_num}: {error}") from error
    if not lines:
        raise FactorTableError(f"{file}: is empty; a table must have a header with a column {PATH!r}, and rows")
    columns = [name.strip() for name in lines[0][1]]
    if PATH not in columns:
        raise FactorTableError(f"{file}: must have a column {PATH!r}, but its columns are {_listed(columns)}")
    if "" in columns:
        raise FactorTableError(f"{file}: column {columns.index('') + 1} of {len(columns)} has no name")
    if repeated := [name for name, count in Counter(columns).items() if count > 1]:
        raise FactorTableError(f"{file}: has more than one column {repeated[0]!r}")
    if len(lines) == 1:
        raise FactorTableError(f"{file}: has a header but no rows")
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
            raise FactorTableError(
                f"{where}: {METADATA} must have the form name=value;name=value with different names, got {part!r}"
            )
        values[name] = value.strip()
    return values


def _table(file: Path, name: str, rows: Sequence[dict[str, str]]) -> FactorTable:
    paths = tuple(file.parent / row[PATH] for row in rows)
    if bad := [row[PATH] for row in rows if "\0" in row[PATH]]:
        raise FactorTableError(f"{file}: {bad[0]!r} is not a path")
    if missing := [str(path) for path in paths if not _is_file(path)]:
        raise FactorTableError(f"{file}: lists images that do not exist: {_listed(missing)}")
    if repeated := [str(path) for path, count in Counter(path.resolve() for path in paths).items() if count > 1]:
        raise FactorTableError(f"{file}: lists images more than once: {_listed(repeated)}")
    names = dict.fromkeys(column for row in rows for column in row if column != PATH)
    factors = {column: tuple(_value(row.get(column, "")) for row in rows) for column in names}
    folders = tuple(path.parent.name for path in paths)
    if len(set(folders)) > 1:
        factors.setdefault(FOLDER, folders)
    if not factors:
        raise FactorTableError(f"{file}: {name} has no factor; its only column is {PATH!r}")
    if all(len(set(values) - {None}) < 2 for values in factors.values()):
        known = [f"{factor} is always {next(filter(None, values), 'missing')}" for factor, values in factors.items()]
        raise FactorTableError(f"{file}: {name} has no factor that varies ({_listed(known)})")
    return FactorTable(name, paths, factors)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # for example, the name is longer than the file system allows
        return False


def _value(text: str) -> str | None:
    return None if text.lower() in MISSING else text


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_LISTED])
    return f"{shown} and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else shown
