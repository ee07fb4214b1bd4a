"""A full disk is reported as such for every encoder, and no partial file remains."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from savl.atomic_write import check_writable, raise_if_full, write_atomically
from savl.images import write
from savl.images.errors import UnwritableImage
from savl.images.format import FORMATS, PNG, ImageFormat
from savl.images.write import write_image

NOISE = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """Limit the size of files that this process can write, as a disk quota does; yield the limit in bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield 20_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("image_format", FORMATS, ids=lambda f: f.name)
def test_no_space_left_on_device_is_reported_for_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_format: ImageFormat
) -> None:
    @contextlib.contextmanager
    def full(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
        with open("/dev/full", "r+b", buffering=0) as file:
            yield file

    monkeypatch.setattr(write, "atomic_write", full)
    with pytest.raises(UnwritableImage, match="picture: cannot be written: No space left on device"):
        write_image(tmp_path / "picture", NOISE, image_format=image_format)


@pytest.mark.parametrize("image_format", FORMATS, ids=lambda f: f.name)
def test_a_file_size_limit_is_reported_and_leaves_no_file(
    tmp_path: Path, file_size_limit: int, image_format: ImageFormat
) -> None:
    with pytest.raises(UnwritableImage, match="cannot be written: File too large"):
        write_image(tmp_path / "picture", NOISE, image_format=image_format, quality=100)
    with pytest.raises(OSError, match="File too large"):
        write_atomically(tmp_path / "array.npy", bytes(2 * file_size_limit))
    assert list(tmp_path.iterdir()) == []
    write_image(tmp_path / "small", NOISE[:8, :8], image_format=image_format)


def test_a_full_disk_is_detected_before_the_network_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from savl import atomic_write

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic_write, "write_whole", refuse)
    with pytest.raises(OSError, match="No space left"):
        check_writable(tmp_path / "picture.png", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_another_failure_than_a_full_disk_keeps_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyvips

    def fail(*_: object) -> None:
        raise pyvips.Error("the encoder has a fault")

    monkeypatch.setattr(write, "_encode", fail)
    with pytest.raises(UnwritableImage, match="the encoder has a fault"):
        write_image(tmp_path / "picture.png", NOISE, image_format=PNG)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_can_grow_raises_nothing(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb", buffering=0) as file:
        raise_if_full(file)
