"""Tables of images and their factors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from savl.analysis.factor_table import FactorTableError, numbers, read_tables


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/1.png", "a/2.png", "b/1.png", "b_more/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def write(folder: Path, text: str, name: str = "table.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_paths_are_relative_to_the_table_and_every_other_column_is_a_factor(folder: Path) -> None:
    table = write(folder, 'path,camera,iso\na/1.png,Nikon,100\na/2.png,"Canon, old",none\n')
    (found,) = read_tables([table])
    assert found.name == "table.csv"
    assert found.paths == (folder / "a/1.png", folder / "a/2.png")
    assert found.factors == {"camera": ("Nikon", "Canon, old"), "iso": ("100", None)}
    assert found.scenes is None


def test_the_metadata_column_replaces_all_other_factors(folder: Path) -> None:
    table = write(
        folder,
        "path\tsha256\tmetadata\na/1.png\tff\tscene=7;camera=Nikon; iso=100\nb/1.png\tee\tcamera=iPhone;scene=8\n",
        "MANIFEST.tsv",
    )
    (found,) = read_tables([table])
    assert found.factors == {
        "scene": ("7", "8"),
        "camera": ("Nikon", "iPhone"),
        "iso": ("100", None),
        "folder": ("a", "b"),
    }
    assert found.scenes == ("7", "8")


def test_the_folder_is_a_factor_if_images_lie_in_several_folders(folder: Path) -> None:
    own = write(folder, "path,folder\na/1.png,x\nb/1.png,y\n")
    assert read_tables([own])[0].factors == {"folder": ("x", "y")}
    one = write(folder, "path,iso\na/1.png,1\na/2.png,2\n")
    assert set(read_tables([one])[0].factors) == {"iso"}


def test_each_path_of_only_makes_a_table_of_the_rows_below_it(folder: Path) -> None:
    table = write(folder, "path,iso\na/1.png,1\na/2.png,2\nb/1.png,3\nb_more/3.png,4\n")
    other = write(folder, "path,iso\na/1.png,5\na/2.png,6\n", "other.csv")
    (alone,) = read_tables([table], ["a", "a/"])
    assert (alone.name, alone.factors["iso"]) == ("a", ("1", "2"))
    found = read_tables([table, other], ["a"])
    assert [(each.name, each.factors["iso"]) for each in found] == [
        ("table.csv: a", ("1", "2")), ("other.csv: a", ("5", "6")),
    ]  # fmt: skip
    with pytest.raises(FactorTableError, match="has no factor that varies"):
        read_tables([table], ["b"])  # and not b_more
    with pytest.raises(FactorTableError, match=r"only: 'c' matches no path in .*table.csv, .*other.csv"):
        read_tables([table, other], ["a", "c"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("path,iso\n", "has a header but no rows"),
        ("file,iso\na/1.png,1\n", "must have a column 'path', but its columns are file, iso"),
        ("path,iso,iso\na/1.png,1,2\n", "has more than one column 'iso'"),
        ("path,iso,\na/1.png,1,\n", "column 3 of 3 has no name"),
        ("path,iso\na\0,1\na/2.png,2\n", r"'a\\x00' is not a path"),
        (f"path,iso\n{'a' * 5000},1\na/2.png,2\n", "lists images that do not exist: .*aaa"),
        ("path,iso\na/1.png,1\n\na/2.png\n", "line 4 has 1 values for 2 columns"),
        ("path,iso\na/1.png,1\n,2\n", "line 3 has no path"),
        ("path,iso\na/1.png,1\na/../a/1.png,2\n", "lists images more than once: .*a/1.png"),
        ("path,iso\na/1.png,1\na/no.png,2\nb/no.png,3\n", "lists images that do not exist: .*a/no.png, .*b/no.png"),
        ("path,iso\na/1.png,1\na/2.png,1\n", r"has no factor that varies \(iso is always 1\)"),
        ("path,iso\na/1.png,none\na/2.png,\n", r"has no factor that varies \(iso is always missing\)"),
        ("path\na/1.png\na/2.png\n", "has no factor; its only column is 'path'"),
        ("path,metadata\na/1.png,iso\na/2.png,iso=1\n", "line 2: metadata must have the form name=value;.* got 'iso'"),
        ("path,metadata\na/1.png,iso=1;iso=2\na/2.png,iso=1\n", "line 2: .* got 'iso=2'"),
        ('path,iso\n"a/1.png,1\na/2.png,2\n', "line 3 has 1 values"),
    ],
)
def test_an_invalid_table_is_reported_with_the_reason(folder: Path, text: str, message: str) -> None:
    table = write(folder, text)
    with pytest.raises(FactorTableError, match=message) as caught:
        read_tables([table])
    assert str(caught.value).startswith(str(table))


def test_a_table_that_is_missing_or_no_text_is_reported(folder: Path) -> None:
    with pytest.raises(FactorTableError, match="none.csv: no such file"):
        read_tables([folder / "none.csv"])
    (folder / "table.csv").write_bytes(b"path\xff")
    with pytest.raises(FactorTableError, match="table.csv: is not UTF-8 text"):
        read_tables([folder / "table.csv"])


def test_tables_with_equal_names_are_distinguished_and_duplicates_are_read_once(folder: Path) -> None:
    tables = [write(folder / place, "path,iso\n1.png,1\n../a/2.png,2\n", "shots.csv") for place in ("a", "b")]
    assert [each.name for each in read_tables([*tables, tables[0]])] == ["a/shots.csv", "b/shots.csv"]


def test_tabs_are_recognised_below_an_empty_line(folder: Path) -> None:
    (table,) = read_tables([write(folder, "\npath\tiso\na/1.png\t1\na/2.png\t2\n")])
    assert table.factors == {"iso": ("1", "2")}


def test_numbers_of_many_digits_take_no_time() -> None:
    assert numbers(["9" * 5000, "1"]) is None
    assert numbers(["9" * 30 + "/7", "1"]) is None


def test_the_first_missing_images_are_reported_and_the_others_counted(folder: Path) -> None:
    table = write(folder, "path,iso\n" + "".join(f"no/{n}.png,{n}\n" for n in range(9)))
    with pytest.raises(FactorTableError, match=r"no/4.png and 4 more$"):
        read_tables([table])


def test_numbers_are_decimals_and_fractions_and_nothing_else() -> None:
    found = numbers(["100", "1/160", "-2.5e1", None, "0", "0.5"])
    assert found is not None
    assert found[:3] + found[4:] == [100, 1 / 160, -25, 0, 0.5]
    assert math.isnan(found[3])
    for text in (
        "007",
        "1/0",
        "1e999",
        "3-5",
        "f/2.8",
        "100 ",
        "nan",
        "inf",
        "0x1",
        "2.8/80",
        "1e3/2",
        "3e10000000",
        "\u0661",
    ):
        assert numbers(["1", text]) is None, text
