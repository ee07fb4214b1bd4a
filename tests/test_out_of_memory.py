"""Out-of-memory errors of all libraries are recognized, and are reported in one line."""

from __future__ import annotations

import errno

import pytest

from savl.images.errors import ImageNotFound, UnreadableImage
from savl.out_of_memory import binary_size, can_allocate, is_out_of_memory, out_of_memory_in_short


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 1.20 GiB for an array with shape (4000, 40000) and data type float64"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."
        ),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        RuntimeError("Resource temporarily unavailable"),
        Exception("VipsImage: out of memory -- size == 57MB"),
        Exception("pngload: Error creating thread: Resource temporarily unavailable"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError("libtorch_cpu.so: failed to map segment from shared object"),
        ImportError("libgfortran.so.5.0.0: failed to map segment from shared object"),
    ],
    ids=repr,
)
def test_every_out_of_memory_message_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)
    line = out_of_memory_in_short(error)
    assert line.startswith("out of memory")
    assert "\n" not in line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a bug"),
        ValueError("scale must be a finite number above 0"),
        OSError(errno.ENOSPC, "No space left on device"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        ImageNotFound("out of memory.png", "no such file"),
        UnreadableImage("out of memory.png", "truncated or corrupt PNG"),
        FileNotFoundError("model must be an existing file, got 'out of memory.pth'"),
        KeyError("out of memory"),
    ],
    ids=repr,
)
def test_other_errors_are_not_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "you tried to allocate 37748736 bytes. Error code 12",
            "out of memory: 36 MiB could not be allocated; free some",
        ),
        (
            "CUDA out of memory. Tried to allocate 2.50 GiB.",
            "out of memory: 2.50 GiB could not be allocated; free some",
        ),
        ("Unable to allocate 1.20 GiB for an array", "out of memory: 1.20 GiB could not be allocated; free some"),
        ("can't start new thread", "out of memory: a thread could not be started; free some"),
        ("std::bad_alloc", "out of memory; free some"),
        (
            "out of memory while 9x9 pixels are decoded; free some",
            "out of memory while 9x9 pixels are decoded; free some",
        ),
    ],
)
def test_the_line_names_the_size_where_the_library_does(text: str, line: str) -> None:
    assert out_of_memory_in_short(RuntimeError(text)) == line


def test_sizes_are_reported_in_binary_units() -> None:
    assert [binary_size(count) for count in (12, 1536, 36 * 2**20, 5 * 2**30)] == [
        "12 bytes",
        "1.5 KiB",
        "36 MiB",
        "5.0 GiB",
    ]


def test_nobody_has_an_exabyte() -> None:
    assert can_allocate(4096)
    assert not can_allocate(2**60)
