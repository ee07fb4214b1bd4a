"""Decode images with libvips, and find out reliably whether each file failed while other threads decode, too.

libvips collects the messages of all threads in one buffer of the process, which does not tell which file a message is
about. Therefore a file is judged by libvips' return value and, for JPEG, by the number of warnings that libvips logs
when it closes the image, which happens in the calling thread. Only a file that failed is decoded again while no other
thread of savl decodes, so that all messages in the buffer belong to it.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from savl.out_of_memory import require_memory, says_out_of_memory

if TYPE_CHECKING:
    import pyvips


# Beginnings of lines that do not tell the reason of a failure.
_COMMON = ("unable to call", "source: bad seek")


def summarized_message(message: str) -> str:
    """Reduce libvips' lines, such as 'unable to call …' and 'domain: text', to the most informative text, or ""."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(_COMMON) and not line.endswith(": load error")]
    most = min(telling, key=lambda line: line.startswith("unable to"), default="")
    return re.sub(r"^\w+: ", "", most)


def reports_out_of_memory(message: str) -> bool:
    """Return whether libvips, or a library that it decodes with, failed because memory ran out."""
    return says_out_of_memory(message) or re.search(r"allocate memory|memory allocation", message, re.I) is not None


Load = Callable[[str], "pyvips.Image"]
"""A function that opens an image anew, with the given value of libvips' `fail_on`, without decoding it yet."""

VIPS_BYTES = 64 * 2**20
"""Memory that libvips needs in addition to an image, for stacks and buffers of its threads. Without it, libvips may
end the process."""

_G_LOG_LEVEL_WARNING = 16
_WARNING_COUNT = re.compile(r"read gave (\d+) warnings")


class DecodeFailure(Exception):
    """libvips could not decode an image. The message is libvips' most informative one, or ""."""


class UnsupportedKind(Exception):
    """A valid image is of a kind that savl does not read. The message names the kind, and follows the file's name."""


def check_page(page: int | None, pages: int) -> None:
    """Raise UnsupportedKind if a file with `pages` pages has no page `page`, counted from 1."""
    if page is not None and page > pages:
        raise UnsupportedKind(f"has no page {page}; it holds {pages} page{'' if pages == 1 else 's'}")


@dataclass(frozen=True)
class Attempt:
    """Result of decoding an image once.

    Attributes:
        image: The decoded image in memory, or None if decoding failed.
        warnings: Number of warnings by the decoder of a JPEG file.
        messages: libvips' messages. They may be about other files, unless no other thread was decoding.
        logged: Messages that libvips' threads logged meanwhile, including warnings of libtiff; only by `decode_alone`.
    """

    image: pyvips.Image | None
    warnings: int
    messages: str
    logged: tuple[str, ...] = ()

    @property
    def jpeg_warning(self) -> str:
        """First warning of a JPEG decoder in the messages, or ""; libvips keeps only the first one."""
        found = re.search(r"^VipsJpeg: (.*)$", self.messages, re.MULTILINE)
        return found[1] if found else ""


class _Gate:
    """Lock that admits many threads that decode in parallel, or one that decodes alone."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._condition = threading.Condition()
        self._sharing = 0
        self._alone = False
        self._waiting = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            # Threads that want to decode alone go first; otherwise they could wait forever for the others to pause.
            self._condition.wait_for(lambda: not self._alone and not self._waiting)
            self._sharing += 1
        try:
            yield
        finally:
            with self._condition:
                self._sharing -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._condition:
            self._waiting += 1
            try:
                self._condition.wait_for(lambda: not self._alone and not self._sharing)
                self._alone = True
            finally:
                self._waiting -= 1
                self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._alone = False
                self._condition.notify_all()


_gate = _Gate()
if hasattr(os, "register_at_fork"):
    # A forked child has no other threads, so threads that were decoding in the parent would never leave its copy.
    os.register_at_fork(after_in_child=_gate.reset)


def vips_operation() -> AbstractContextManager[None]:
    """Return a context for calls of libvips that decode nothing. They may clear the buffer of messages."""
    return _gate.shared()


def decode_shared(load: Load, *, fail_on: str = "error") -> Attempt:
    """Decode in parallel with other threads. The messages of the result may belong to other files."""
    with _gate.shared():
        return _attempt(load, fail_on)


def decode_alone(load: Load, *, fail_on: str = "error") -> Attempt:
    """Decode while no other thread of savl does, so that the messages belong to this image."""
    import pyvips

    with _gate.alone():
        pyvips.vips_lib.vips_error_clear()
        _logged.clear()
        attempt = _attempt(load, fail_on)
        pyvips.vips_lib.vips_error_clear()
        return replace(attempt, logged=tuple(_logged))


def decode(load: Load) -> pyvips.Image:
    """Decode an image in memory.

    Raises:
        DecodeFailure: The image cannot be decoded; the message is libvips' reason.
    """
    image = decode_shared(load).image
    if image is not None:
        return image
    again = decode_alone(load)
    if again.image is None:
        raise DecodeFailure(summarized_message(again.messages))
    return again.image


def _attempt(load: Load, fail_on: str) -> Attempt:
    import pyvips

    require_memory(VIPS_BYTES, "while it is read")
    _count_warnings()
    _thread.warnings = 0
    image, messages = None, ""
    try:
        image = _in_memory(load(fail_on))
    except (pyvips.Error, UnicodeDecodeError) as error:  # UnicodeDecodeError: a message quotes bytes of the file
        messages = str(error) if isinstance(error, pyvips.Error) else _messages()
        # Free the failed image: libvips logs the number of its warnings when the image is closed, which must be now.
        error.__traceback__ = None
    else:
        messages = _messages()
    return Attempt(image, _thread.warnings, messages)


def _messages() -> str:
    import pyvips

    text: str = pyvips.ffi.string(pyvips.vips_lib.vips_error_buffer()).decode(errors="replace")
    return text


def _in_memory(image: pyvips.Image) -> pyvips.Image:
    sample_bytes = {"uchar": 1, "char": 1, "ushort": 2, "short": 2}.get(image.format, 8)
    # The samples, and the same again for decoders that keep the whole image in memory.
    require_memory(VIPS_BYTES + 2 * image.width * image.height * image.bands * sample_bytes, "while it is read")
    return image.copy_memory()


class _Thread(threading.local):
    warnings = 0


_thread = _Thread()
_logged: deque[str] = deque(maxlen=1000)
_handlers: list[Any] = []
_handlers_lock = threading.Lock()


def _count_warnings() -> None:
    """Install a GLib log handler that records libvips' warnings and passes them on as pyvips does. It runs once."""
    with _handlers_lock:
        if _handlers:
            return
        import pyvips

        logger = logging.getLogger("pyvips")

        def handle(domain: Any, level: int, message: Any, data: Any) -> None:
            text = pyvips.ffi.string(message).decode(errors="replace")
            count = _WARNING_COUNT.match(text)
            if count:
                _thread.warnings += int(count[1])
            _logged.append(text)
            logger.warning("VIPS: %s", text)

        callback = pyvips.ffi.callback("GLogFunc", handle)
        number = pyvips.glib_lib.g_log_set_handler(b"VIPS", _G_LOG_LEVEL_WARNING, callback, pyvips.ffi.NULL)
        _handlers.append(callback)
        # libvips may log during its shutdown, after Python has ended.
        atexit.register(pyvips.glib_lib.g_log_remove_handler, b"VIPS", number)
