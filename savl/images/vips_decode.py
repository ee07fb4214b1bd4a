"""Decode images with libvips, and tell for each file whether it failed, whatever other threads decode.

libvips collects the messages of all threads in one buffer of the process, so that buffer cannot say which file they
are about. A file is judged here by what libvips returns for it and, for JPEG, by the number of warnings that libvips
logs when it closes the image, which happens in the thread that asked for it. Only a file that failed is decoded again
while no other thread of savl decodes, so that the messages in the buffer are its own.
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


# Lines that stand beside the reason of a failure, and also where nothing failed.
_COMMON = ("unable to call", "source: bad seek")


def tidy(message: str) -> str:
    """Return libvips' several lines of 'unable to call …' and 'domain: text', down to the most telling text, or ""."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(_COMMON) and not line.endswith(": load error")]
    most = min(telling, key=lambda line: line.startswith("unable to"), default="")
    return re.sub(r"^\w+: ", "", most)


def is_lack_of_memory(message: str) -> bool:
    """Return whether libvips, or a library it decodes with, failed for want of memory."""
    return says_out_of_memory(message) or re.search(r"allocate memory|memory allocation", message, re.I) is not None


Load = Callable[[str], "pyvips.Image"]
"""Opens an image anew, with libvips' `fail_on` as given; nothing is decoded yet."""

VIPS_BYTES = 64 * 2**20
"""What libvips takes beside an image: the stacks and buffers of its threads. Without them it may end the process."""

_G_LOG_LEVEL_WARNING = 16
_WARNING_COUNT = re.compile(r"read gave (\d+) warnings")


class DecodeFailure(Exception):
    """libvips could not decode an image; the message is its most telling one, or ""."""


class UnsupportedKind(Exception):
    """A sound image is of a kind that savl does not read; the message says which, to follow the file's name."""


def check_page(page: int | None, pages: int) -> None:
    """Raise UnsupportedKind where a file of so many pages has no such page, counted from 1."""
    if page is not None and page > pages:
        raise UnsupportedKind(f"has no page {page}; it holds {pages} page{'' if pages == 1 else 's'}")


@dataclass(frozen=True)
class Attempt:
    """One decode.

    Attributes:
        image: The decoded image in memory, or None where decoding failed.
        warnings: How many warnings the decoder of a JPEG file gave.
        messages: What libvips says; it may be about other files unless no other thread was decoding.
        logged: What libvips' threads logged meanwhile, among it the warnings of libtiff; of `decode_alone` only.
    """

    image: pyvips.Image | None
    warnings: int
    messages: str
    logged: tuple[str, ...] = ()

    @property
    def jpeg_warning(self) -> str:
        """The first warning of a JPEG decoder among the messages, or ""; libvips keeps no further ones."""
        found = re.search(r"^VipsJpeg: (.*)$", self.messages, re.MULTILINE)
        return found[1] if found else ""


class _Gate:
    """Lets many threads decode at once, or one alone."""

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
            # Those who want to be alone go first: they would wait forever beside threads that never pause.
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
    # The child has no other threads, and whoever decoded in the parent never leaves the child's copy.
    os.register_at_fork(after_in_child=_gate.reset)


def among_others() -> AbstractContextManager[None]:
    """Return a context for calls of libvips that decode nothing: many of them clear the buffer of messages."""
    return _gate.shared()


def decode_shared(load: Load, *, fail_on: str = "error") -> Attempt:
    """Decode beside other threads; the messages are of no use."""
    with _gate.shared():
        return _attempt(load, fail_on)


def decode_alone(load: Load, *, fail_on: str = "error") -> Attempt:
    """Decode while no other thread of savl does; the messages are of this image."""
    import pyvips

    with _gate.alone():
        pyvips.vips_lib.vips_error_clear()
        _logged.clear()
        attempt = _attempt(load, fail_on)
        pyvips.vips_lib.vips_error_clear()
        return replace(attempt, logged=tuple(_logged))


def decode(load: Load) -> pyvips.Image:
    """Return an image in memory.

    Raises:
        DecodeFailure: It cannot be decoded; with libvips' reason.
    """
    image = decode_shared(load).image
    if image is not None:
        return image
    again = decode_alone(load)
    if again.image is None:
        raise DecodeFailure(tidy(again.messages))
    return again.image


def _attempt(load: Load, fail_on: str) -> Attempt:
    import pyvips

    require_memory(VIPS_BYTES, "while it is read")
    _count_warnings()
    _thread.warnings = 0
    image, messages = None, ""
    try:
        image = _in_memory(load(fail_on))
    except (pyvips.Error, UnicodeDecodeError) as error:  # the latter where a message quotes the file's bytes
        messages = str(error) if isinstance(error, pyvips.Error) else _messages()
        # Frees the image that failed: libvips counts its warnings when it is closed, which must be now.
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
    # The samples, and as much again for decoders that hold the whole image.
    require_memory(VIPS_BYTES + 2 * image.width * image.height * image.bands * sample_bytes, "while it is read")
    return image.copy_memory()


class _Thread(threading.local):
    warnings = 0


_thread = _Thread()
_logged: deque[str] = deque(maxlen=1000)
_handlers: list[Any] = []
_handlers_lock = threading.Lock()


def _count_warnings() -> None:
    """Install a GLib log handler for libvips' warnings, once; it passes them on as pyvips does."""
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
        # libvips may log while it is shut down, when Python is gone.
        atexit.register(pyvips.glib_lib.g_log_remove_handler, b"VIPS", number)
