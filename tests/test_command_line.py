"""Help without the names of Python types, flags without values, and shell completion: of every command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner, Result

from savl.cli.app import app
from savl.command_line import CommandLine, Group


def paths(group: Any, so_far: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words that name each command, groups among them."""
    yield so_far
    for name, command in getattr(group, "commands", {}).items():
        yield from paths(command, (*so_far, name))


COMMANDS = list(paths(typer.main.get_command(app)))
TYPES = r"<(bool|int|float|str|path|file|directory|list|tuple|datetime|uuid|Any)\b|\b(TEXT|INTEGER|FLOAT|BOOLEAN)\b"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})


def test_the_commands_are_found() -> None:
    assert {("upscale",), ("kernels", "info"), ("profile",)} <= set(COMMANDS)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_no_help_names_a_python_type(words: tuple[str, ...]) -> None:
    result = run(*words, "--help")
    assert result.exit_code == 0
    assert "--help" in result.stdout
    assert "install 'savl'" not in result.stdout, "rich took [extra] for markup: write \\[extra]"
    # The TEXT that --suffix takes is a word of its own.
    found = re.search(TYPES, result.stdout.replace("--suffix", "").replace(" TEXT ", " "))
    assert found is None, found


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_flag_takes_no_value(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command: Any = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    if isinstance(command, Group):
        return
    for flag in [max(param.opts, key=len) for param in command.params if getattr(param, "is_flag", False)]:
        for value in ("true", "False", "no"):
            result = run(*words, flag, value)
            assert result.exit_code == 2, flag
            message = " ".join(result.stderr.replace("│", " ").split())
            assert flag in message, flag
            assert f"a flag takes no value, and there is no file '{value}'" in message, message
        equals = run(*words, f"{flag}=true")
        assert equals.exit_code == 2
        assert "does not take a value" in equals.stderr


def test_short_flags_in_one_take_no_value_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for flags in ("-r", "-rr"):
        assert "no file 'true'" in run("upscale", flags, "true").stderr
    assert "a flag takes no value" not in run("upscale", "-o", "true").stderr, "an option that takes one"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_paragraphs_of_the_help_fill_their_lines(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "100"})
    above, _, _ = result.stdout.partition("╭")
    for paragraph in re.split(r"\n\s*\n", above.strip()):
        lines = [line.strip() for line in paragraph.splitlines()]
        for line, following in zip(lines, lines[1:], strict=False):
            assert len(f"{line} {following.split()[0]}") > 90, line


def test_a_file_of_that_name_is_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("true").write_text("no image")
    for arguments in (("--overwrite", "true"), ("--overwrite", "--", "true")):
        assert "a flag takes no value" not in run("upscale", *arguments).stderr
    Path("true").unlink()
    assert "a flag takes no value" not in run("upscale", "--overwrite", "--", "true").stderr


def complete(*words: str) -> list[str]:
    """Return the completions that bash gets for a command line of these words."""
    environment = {"_SAVL_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr));"
        "from savl.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "False", "torch was loaded"
    return done.stdout.split()


def test_the_shell_completes_commands_options_and_choices() -> None:
    assert complete("savl", "up") == ["upscale"]
    assert complete("savl", "kernels", "ve") == ["verify"]
    assert "--severity-map" in complete("savl", "upscale", "--sev")
    assert complete("savl", "upscale", "--format", "t") == ["tiff"]


def test_the_script_for_the_shell_is_shown() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "savl", "--show-completion", "bash"], capture_output=True, text=True, check=True
    )
    assert "complete -o default -F _savl_completion savl" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), {"count": 3, "share": 2.0, "name": "a", "kind": "x", "path": None, "words": None, "flag": False}),
        (("--count", "4", "--share", "1", "--kind", "y"), {"count": 4, "share": 1.0, "kind": "y"}),
        (("--name", "7", "--words", "b", "--words", "c", "--flag"), {"name": "7", "words": ["b", "c"], "flag": True}),
        (("--path", "d/e"), {"path": Path("d/e")}),
        (("--kind", "x"), {"kind": "x"}),
    ],
)
def test_values_have_the_types_that_commands_declare(arguments: tuple[str, ...], expected: dict[str, Any]) -> None:
    found: dict[str, Any] = {}
    commands = CommandLine()

    @commands.command()
    def command(
        inputs: Annotated[list[str], typer.Argument()],
        count: Annotated[int, typer.Option(min=0)] = 3,
        share: Annotated[float, typer.Option()] = 2,
        name: Annotated[str, typer.Option()] = "a",
        kind: Annotated[Literal["x", "y"], typer.Option()] = "x",
        path: Annotated[Path | None, typer.Option()] = None,
        words: Annotated[list[str] | None, typer.Option()] = None,
        flag: Annotated[bool, typer.Option("--flag")] = False,
    ) -> None:
        found.update(locals())

    command.__annotations__ = {name: eval(text) for name, text in command.__annotations__.items()}
    result = CliRunner().invoke(commands, ["in", "put", *arguments])
    assert result.exit_code == 0, result.output
    assert found["inputs"] == ["in", "put"]
    for name, value in expected.items():
        assert found[name] == value, name
        assert type(found[name]) is type(value), name
    for wrong, reason in (
        (("--count", "x"), "'x' is not a whole number"),
        (("--count", "-1"), "'-1' should be greater than or equal to 0"),
        (("--kind", "z"), "'z' is not one of 'x', 'y'"),
        (("--share", "much"), "'much' is not a number"),
    ):
        result = CliRunner().invoke(commands, ["in", *wrong])
        assert result.exit_code == 2, wrong
        assert f": {reason}" in result.output, "and no name of an exception before it"
    assert CliRunner().invoke(commands, []).exit_code == 2, "inputs are required"


def test_savl_alone_says_in_six_lines_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("savl.cli.app.find_spec", lambda name: name)
    result = run()
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.partition("  ")[0] for line in lines] == [
        "savl web",
        "savl upscale photo.jpg",
        "savl upscale photos/ -o large/",
        "savl upscale clip.mp4 -o large.mp4",
        "savl kernels info",
        "savl --help",
    ]
    assert "pip install" not in result.stdout
    monkeypatch.setattr("savl.cli.app.find_spec", lambda name: None)
    assert [line.partition("pip install ")[2] for line in run().stdout.splitlines()] == [
        "'savl[web]'",
        "",
        "",
        "'savl[video]'",
        "",
        "",
    ]
