"""Errors of the export, and the sentence that is taken from an error of PyTorch's exporters."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch

INSTALL = "pip install 'savl[export]'"
"""The command that installs the packages that ONNX files need."""

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parent)


class ExportUnavailable(ValueError):
    """A package or a compiler that the export needs is not installed."""


class ExportError(RuntimeError):
    """A network cannot be exported, or the file does not compute what the network does."""


def reason_of(error: BaseException) -> str:
    """Return why an exporter of PyTorch failed: the op that it cannot translate, or its message and the line of code.

    Args:
        error: The error, whose causes are searched too.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for each in chain:
        if found := re.search(r"translating node .*?target=(?:torch\.ops\.)?([\w.:]+)", str(each), re.DOTALL):
            return f"the op {found[1]} has no translation{_place(chain)}"
    found = re.search(r"Suggested fixes:\n(.*?)(?:\n\n|$)", _plain(error), re.DOTALL)
    relations = [line.strip() for line in found[1].splitlines() if "Dim(" not in line] if found else []
    if relations:
        return (
            f"its code runs only for sizes with {' and '.join(relations)} (it is captured for 11 images){_place(chain)}"
        )
    message = next((line for line in map(str.strip, _plain(error).splitlines()) if line), type(error).__name__)
    message = message if len(message) <= 300 else f"{message[:300]} ..."
    return f"{type(error).__name__}: {message}{_place(chain)}"


def _plain(error: BaseException) -> str:
    """Return the message of an error without colours."""
    return re.sub(r"\x1b\[[0-9;]*m|\[\d+m", "", str(error))


def _place(chain: list[BaseException]) -> str:
    """Return the innermost line of the network's code in the tracebacks of errors, or "" if there is none."""
    for error in reversed(chain):
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not frame.filename.startswith((_TORCH, _OWN, "<"))]
        networks = [frame for frame in own if "/savl/cli/" not in frame.filename and frame.name == "forward"]
        if networks:
            last = own[-1]
            return f" ({Path(last.filename).name}, line {last.lineno}: {last.line})"
    return ""
