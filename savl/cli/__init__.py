"""The `savl` command. Each subcommand has a module of its own; `savl.cli.app` lists them."""

from __future__ import annotations

from collections.abc import Sequence

from savl.cli import ctrl_c

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Exit codes: 0 all done; 1 some file could not be processed; 2 the command itself is wrong; 130
    interrupted.

    Args:
        arguments: What follows `savl`; None takes them from the process, which is taken to be the command's own: a
            Ctrl-C that comes while the interpreter ends is quiet too.
    """
    with ctrl_c.handled(until_exit=arguments is None):
        from savl.cli.app import run  # what it imports takes time, in which Ctrl-C may come already

        run(arguments)
