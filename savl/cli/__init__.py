"""The `savl` command. Each subcommand has a module of its own; `savl.cli.app` lists them."""

from savl.cli.app import main

__all__ = ["main"]
