"""``python -m savl.profile``, which is `savl profile`: the profilers of a GPU start it in this form."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from savl.cli import ctrl_c
from savl.command_line import CommandLine
from savl.profile.command import EXAMPLES, profile
from savl.settings import EnvironmentVariableError

app = CommandLine()
app.command("profile", epilog=EXAMPLES)(profile)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: What follows ``python -m savl.profile``; None takes them from the process.
    """
    with ctrl_c.handled(until_exit=arguments is None):
        try:
            app(args=None if arguments is None else list(arguments), prog_name="python -m savl.profile")
        except EnvironmentVariableError as error:
            typer.echo(f"savl: {error}", err=True)
            sys.exit(2)


if __name__ == "__main__":
    main()
