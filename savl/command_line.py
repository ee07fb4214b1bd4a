"""Shared parts of savl's command lines: help without Python types, flags without values, and how errors are printed."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from savl.out_of_memory import is_out_of_memory, out_of_memory_in_short
from savl.printable import printable

_SWITCH_WORDS = ("true", "false", "yes", "no", "on", "off")


class UsageError(ValueError):
    """The arguments of a command contradict each other or name nothing. Nothing has been started."""


def print_error(error: BaseException | str) -> None:
    """Print an error to standard error as one line that begins with "error:".

    This is how every command reports an error, except for options that Typer itself refuses. The line is printed
    without rich, because there may be no memory left to import it.

    Args:
        error: The error or its text. Lack of memory is described in a short form.
    """
    if isinstance(error, BaseException) and is_out_of_memory(error):
        error = out_of_memory_in_short(error)
    label = "error:" if os.environ.get("NO_COLOR") else typer.style("error:", fg=typer.colors.RED)
    typer.echo(f"{label} {printable(str(error))}", err=True)


def exit_with_error(error: BaseException | str, code: int) -> NoReturn:
    """Print an error as `print_error` does, and end the command.

    Args:
        error: The error or its text.
        code: Exit code: 2 if the command line is wrong, 1 for all other errors.
    """
    print_error(error)
    raise typer.Exit(code)


@contextmanager
def report_errors(*usage: type[Exception]) -> Iterator[None]:
    """End the command with `exit_with_error` if the block raises an expected error.

    Expected are `ValueError`, `OSError`, `RuntimeError`, `FloatingPointError` and `MemoryError`; all others have a
    traceback.

    Args:
        usage: Errors that mean a wrong command line, with exit code 2; `ValueError` if none is given.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):  # which are RuntimeErrors
        raise
    except (ValueError, OSError, RuntimeError, FloatingPointError, MemoryError) as error:
        exit_with_error(error, 2 if isinstance(error, usage or ValueError) else 1)


@contextmanager
def option_value(option: str) -> Iterator[None]:
    """Turn a `ValueError` in the block into Typer's error about the value of an option, such as "--scale"."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


class _PlainHelp:
    """Help that names options and arguments without their Python types, and whose paragraphs fill the line width."""

    help: str | None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help; paragraphs of the docstring lose the line breaks that they have in the source."""
        paragraphs = inspect.cleandoc(self.help or "").split("\n\n")
        self.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        super().format_help(ctx, formatter)  # type: ignore[misc]

    def get_params(self, ctx: Any) -> list[Any]:
        """Return Typer's parameters, without type names such as ``<bool>`` and ``<list[str]>`` in the help."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
            elif param.param_type_name == "argument":  # Typer has no setting for it
                param.display_type_rich = _nothing
            if hasattr(param, "type_descriptor"):  # typer 0.29 and later
                param.process_value = partial(_processed, param, type(param).process_value)
        return params


class Command(_PlainHelp, TyperCommand):
    """A command that refuses a value such as ``true`` after a flag, which Typer would take for an input file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line.

        Raises:
            typer.BadParameter: A word such as ``true`` follows a flag, and there is no file of that name.
        """
        flags = {
            name: param
            for param in self.get_params(ctx)
            if getattr(param, "is_flag", False)
            for name in (*param.opts, *param.secondary_opts)
        }
        before_end = args[: args.index("--")] if "--" in args else args
        for flag, word in zip(before_end, before_end[1:], strict=False):
            if _are_flags(flag, flags) and word.lower() in _SWITCH_WORDS and not Path(word).exists():
                raise typer.BadParameter(
                    f"a flag takes no value, and there is no file {word!r}: {_remedy(flag, word)}",
                    ctx=ctx,
                    param_hint=flag,
                )
        return super().parse_args(ctx, args)


class Group(_PlainHelp, TyperGroup):
    """A group of such commands."""


class CommandLine(typer.Typer):
    """A `typer.Typer` with the settings of savl's command lines."""

    def __init__(self, *, add_completion: bool = False, **settings: Any) -> None:
        super().__init__(
            cls=Group,
            add_completion=add_completion,
            rich_markup_mode="rich",
            pretty_exceptions_enable=False,
            context_settings={"help_option_names": ["-h", "--help"]},
            **settings,
        )

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Register a command, as `typer.Typer.command` does."""
        return super().command(name, **{"cls": Command, **settings})


def _processed(param: Any, convert: Callable[..., Any], ctx: Any, value: Any) -> Any:
    """Return the converted value of a parameter.

    Raises:
        typer.BadParameter: It cannot be converted; the message names the value, in simpler words than pydantic's.
    """
    try:
        return _convert(param, convert, ctx, value)
    except typer.BadParameter as error:
        message = error.message.removeprefix("Value error, ")
        kind = {int: "whole number", float: "number"}.get(param.type_descriptor.annotation)
        if kind and message.startswith("Input should be a valid"):
            message = f"{value!r} is not a {kind}"
        elif message.startswith("Input should be"):
            message = f"{value!r} should be{message.removeprefix('Input should be')}"
        error.message = message
        raise


def _convert(param: Any, convert: Callable[..., Any], ctx: Any, value: Any) -> Any:
    """Return the value of a parameter, converted only if it has not the declared type already.

    Text, default values and missing values need no conversion. Typer converts with pydantic, whose import takes as long
    as upscaling a small image.
    """
    annotation, declared = param.type_descriptor.annotation, param.type_descriptor.parameter_info
    several = param.multiple or param.nargs == -1
    if (param.required and param.value_is_missing(value)) or declared.parser is not None:
        return convert(param, ctx, value)
    if value is None:
        value = () if several else None
    elif several and annotation == list[str]:
        value = list(value)
    elif not (
        (annotation is str and isinstance(value, str))
        or (get_origin(annotation) is Literal and isinstance(value, str) and value == param.default)
        or (annotation in (int, float) and type(value) is annotation and value == param.default)
    ):
        return convert(param, ctx, value)
    return value if param.callback is None else param.callback(ctx, param, value)


def _are_flags(argument: str, flags: Collection[str]) -> bool:
    """Return whether an argument is a flag, or several short ones in one, such as ``-rv``."""
    if argument in flags:
        return True
    return (
        len(argument) > 2 and argument[1] != "-" and all(f"{argument[0]}{letter}" in flags for letter in argument[1:])
    )


def _nothing(ctx: Any) -> None:
    """Return None, so that Typer prints no type for an argument."""


def _remedy(flag: str, word: str) -> str:
    if word.lower() in ("false", "no", "off"):
        return f"leave out both, {flag} and {word}"
    return f"{flag} alone switches it on"
