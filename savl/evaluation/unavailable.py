"""What is said when a package that only the analysis needs is not there."""

from __future__ import annotations


class AnalysisUnavailable(RuntimeError):
    """A package that testing a representation needs is not installed; the message says how to get it."""

    def __init__(self, task: str, package: str, error: ImportError) -> None:
        super().__init__(
            f"{task} needs {package}, which cannot be imported ({error}); pip install 'savl[analyze]' brings it"
        )
