"""Outputs on a file system of fsspec, such as s3://bucket/folder: written by the code for local files, then sent."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from savl.images.errors import ImageFileError, OutputExists, UnreadableImage, UnwritableImage
from savl.images.job import Job, OnTile, Signature, Work
from savl.images.locks import OutputLock
from savl.images.result_mark import read_origin
from savl.images.write import ProcessedFile

# Where an object appears when it is complete. Elsewhere it is sent under a hidden name, and renamed.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "hf", "memory"}
_IN_THIS_PROCESS = {"memory"}


def is_url(text: str) -> bool:
    """Return whether a text is the URL of a file system of fsspec, such as s3://bucket/folder."""
    return "://" in text


def local_path(url: str) -> str | None:
    """Return the path of a URL that names a local file or folder, such as file:///data; None for any other text."""
    for scheme in ("file://", "local://"):
        if url.startswith(scheme):
            return url.removeprefix(scheme) or "/"
    return None


def read_url(url: str) -> bytes:
    """Return the content of a file at a URL.

    Raises:
        UnreadableImage: It cannot be read.
    """
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            content: bytes = file.read()
            return content
    except FileNotFoundError as error:
        raise UnreadableImage(url, "no such file") from error
    except Exception as error:  # each file system has errors of its own
        raise UnreadableImage(url, f"cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


class UrlPlace:
    """A folder of a file system of fsspec.

    An output is a path below `root`, which only stands for the URL: rules for names then need not know of URLs.
    """

    def __init__(self, url: str) -> None:
        """Open the file system.

        Raises:
            ValueError: The protocol is unknown, its package is not installed, or other processes do not see its files.
        """
        import fsspec

        self.url = url.rstrip("/")
        self.root = Path(self.url)
        try:
            self._fs, _ = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError, OSError) as error:
            raise ValueError(f"{url}: {error}") from error
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self.shared = not protocols & _IN_THIS_PROCESS
        self._atomic = bool(protocols & _ATOMIC)

    def url_of(self, output: Path) -> str:
        """Return the URL of an output."""
        return "/".join([self.url, *output.relative_to(self.root).parts])

    def with_urls(self, text: str) -> str:
        """Return a message in which outputs have their URLs."""
        return text.replace(str(self.root), self.url)

    def signature(self, output: Path) -> Signature | None:
        """Return what changes when an output is rewritten, or None if there is no file."""
        try:
            info = self._fs.info(self._path(output))
        except FileNotFoundError:
            return None
        if info.get("type") != "file":
            return None
        known = (info.get(key) for key in ("ETag", "etag", "mtime", "LastModified", "updated", "created"))
        return Signature(str(next(filter(None, known), "")), 0, int(info.get("size") or 0))

    def origin(self, output: Path) -> str | None:
        """Return the digest of the source that is stored in an output. Only headers are read."""
        try:
            with self._fs.open(self._path(output), "rb", block_size=2**16) as file:
                return read_origin(file)
        except OSError:
            return None

    @contextlib.contextmanager
    def lock(self, output: Path) -> Iterator[OutputLock]:
        """Grant the lock: there are none. Within a run, each file has one worker at a time."""
        yield OutputLock(True)

    def send(self, file: Path, output: Path, *, overwrite: bool) -> None:
        """Send a local file, which appears complete or not at all.

        Raises:
            OutputExists: The output exists and `overwrite` is False.
            UnwritableImage: The file cannot be sent.
        """
        path = self._path(output)
        folder, _, name = path.rpartition("/")
        try:
            if not overwrite and self._fs.exists(path):
                raise OutputExists(output, "exists already")
            self._fs.makedirs(folder, exist_ok=True)
            if self._atomic:
                self._fs.put_file(str(file), path)
                return
            part = f"{folder}/.{name[:100]}.{secrets.token_hex(4)}.part"
            try:
                self._fs.put_file(str(file), part)
                self._fs.mv(part, path)
            except BaseException:
                with contextlib.suppress(Exception):
                    self._fs.rm_file(part)
                raise
        except OutputExists:
            raise
        except Exception as error:  # each file system has errors of its own
            raise UnwritableImage(output, f"cannot be written: {_reason(error)}") from error

    def _path(self, output: Path) -> str:
        return str(self._fs._strip_protocol(self.url_of(output)))


class SendingWork:
    """Work whose outputs are written to a temporary folder of the worker and then sent to a place."""

    def __init__(self, work: Work, place: UrlPlace, *, overwrite: bool) -> None:
        self._work = work
        self._place = place
        self._overwrite = overwrite

    def __call__(self, job: Job, target: Path | None, maps: tuple[Path | None, ...], on_tile: OnTile) -> ProcessedFile:
        """Process an image; see `savl.images.job.Work`."""
        with tempfile.TemporaryDirectory(prefix="savl-", ignore_cleanup_errors=True) as folder:
            files: dict[Path, Path] = {
                output: Path(folder, f"{number}{output.suffix}")
                for number, output in enumerate((target, *maps))
                if output is not None
            }
            try:
                result = self._work(
                    job,
                    None if target is None else files[target],
                    tuple(None if each is None else files[each] for each in maps),
                    on_tile,
                )
            except ImageFileError as error:
                names: dict[str, Any] = {str(file): output for output, file in files.items()}
                if error.path in names:
                    raise type(error)(names[error.path], error.reason) from error
                raise
            for output, file in files.items():
                self._place.send(file, output, overwrite=self._overwrite)
        return result
