"""Version of the installed package. Imports nothing of savl, so that every module can ask for it."""

from __future__ import annotations


def version() -> str:
    """Return the version of savl, such as ``"0.2.0"``; ``"0+unknown"`` in a source tree that was never installed."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed  # takes longer than the import of savl

    try:
        return installed("savl")
    except PackageNotFoundError:
        return "0+unknown"
