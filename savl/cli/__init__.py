"""The `savl` command. Each subcommand has a module of its own; `savl.cli.app` lists them."""

from __future__ import annotations

from collections.abc import Sequence

from savl.interrupts import exit_on_interrupt

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Exit codes: 0, everything was done; 1, some file could not be processed; 2, the command line is wrong; 130,
    interrupted.

    Args:
        arguments: Arguments after `savl`. If None, the arguments of the process are used, and the process belongs to
            the command: Ctrl-C is handled until the interpreter has shut down.
    """
    with exit_on_interrupt(until_exit=arguments is None):
        from savl.cli.app import run  # Slow: Ctrl-C may come during this import.

        run(arguments)
