"""Read files of weights by their content, whatever their suffix, and say in one line what another file is."""

from __future__ import annotations

import json
import re
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

_HEAD = 1024  # bytes read to recognise the kind of a file

# First bytes of files that are often given by mistake or not yet unpacked.
_OTHER_FILES = {
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"BZh": "a bzip2 archive; unpack it first",
    b"\xfd7zXZ\0": "an xz archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"Rar!": "a rar archive; unpack it first",
    b"GGUF": "a GGUF file, which holds no network that savl has",
    b"\x89HDF": "an HDF5 file; savl reads safetensors and torch checkpoints",
    b"\x93NUMPY": "a numpy array; savl reads safetensors and torch checkpoints",
    b"\x89PNG": "a PNG image, no weights",
    b"\xff\xd8\xff": "a JPEG image, no weights",
}

_numpy_numbers_allowed = threading.Lock()


def read_checkpoint(path: Path) -> tuple[Any, dict[str, str]]:
    """Read a file of weights without running any code in it.

    Args:
        path: A safetensors file, or a file written by ``torch.save``, as a zip archive or in the older format.

    Returns:
        The content, usually a dict that contains tensors by name at some level; and the metadata of a safetensors file,
        which are empty for other files.

    Raises:
        ValueError: The file is of another kind, damaged, or contains pickled code. The message says which, in one line
            without the name of the file.
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if not head:
        raise ValueError("is empty, a file of 0 bytes")
    if (other := _other_kind(head)) is not None:
        raise ValueError(f"is {other}")
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith(b"PK"):
        _check_zip(path)
    elif not head.startswith(b"\x80") and path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_torch(path), {}


def _other_kind(head: bytes) -> str | None:
    """Return what kind of file this is, if its first bytes show that it contains no weights; else None."""
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d+)", head)
        stands_for = f"{int(size[1])} bytes" if size else "the file"
        return f"a Git LFS pointer, a text that stands for {stands_for}: `git lfs pull` fetches the weights themselves"
    if head.startswith((b"/annex/objects", b"../.git/annex", b".git/annex")):
        return "a git-annex pointer: `git annex get` fetches the weights themselves"
    for beginning, kind in _OTHER_FILES.items():
        if head.startswith(beginning):
            return kind
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")):
        return "a web page (HTML or XML), as servers give instead of a download; fetch the file itself"
    if text.startswith((b"{", b"[")) and head[8:9] != b"{" and b"\0" not in head:
        return "a JSON text, no weights"
    return None


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        reason = _why_cut_off(path) or str(error)
        raise ValueError(f"is not a readable safetensors file: {reason}") from error


def _why_cut_off(path: Path) -> str | None:
    """Return how much of a truncated safetensors file is present; None if it is not truncated."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size >= 8 + length:
            try:
                header = json.loads(file.read(length))
                data = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
            except (ValueError, TypeError, KeyError, IndexError, AttributeError):
                return None
            length += data
    whole = 8 + length
    return f"it is cut off, {size} of {whole} bytes are there" if size < whole < 2**50 else None


def _check_zip(path: Path) -> None:
    """Check that a zip file was written by ``torch.save``.

    Raises:
        ValueError: It was not; the message says what it is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise ValueError(
            f"is damaged or no checkpoint of weights alone: a zip file that is cut off or broken ({error})"
        ) from error
    inside = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in inside:
        raise ValueError("is a TorchScript program, which is code; save the state dict of its network, load that")
    if "data.pkl" in inside:
        return
    if "archive_format" in inside or any(name.startswith("serialized_") for name in inside):
        raise ValueError("is a program of torch.export, which is code; save the state dict of its network, load that")
    shown = ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])]) or "nothing"
    raise ValueError(f"is a zip file, but no torch checkpoint (it holds {shown}); unpack it first")


def _read_torch(path: Path) -> Any:
    try:
        return _torch_load(path)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        if not re.search(r"GLOBAL numpy\S*\.scalar ", str(error)):
            raise ValueError(_explain_refusal(error)) from error
    try:
        # Numbers of numpy, such as the best score so far, contain no code. The lock is needed because torch keeps its
        # list of allowed types for the whole process.
        with _numpy_numbers_allowed, torch.serialization.safe_globals(_numpy_numbers()):
            return _torch_load(path)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(_explain_refusal(error)) from error


def _torch_load(path: Path) -> Any:
    with open(path, "rb") as file:  # given a path, torch would take its suffix for the format
        return torch.load(file, map_location="cpu", weights_only=True)


def _numpy_numbers() -> list[Any]:
    """Return what pickles of numpy's numbers refer to: their constructor under numpy 1 and 2, and the number types."""
    make = np.float64(0).__reduce__()[0]
    constructors = [(make, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*constructors, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]


def _explain_refusal(error: Exception) -> str:
    """Return in one line why torch refused the file. Its own message is long, and explains how to run pickled code."""
    message = str(error)
    if code := re.search(r"GLOBAL (\S+)", message):
        return f"holds pickled code ({code[1]}), which savl never runs; save its state dict alone, load that"
    first_sentence = message.partition("\n")[0].partition(". ")[0]
    return f"is damaged or no checkpoint of weights alone ({type(error).__name__}: {first_sentence})"
