"""Each file is checked independently of the files that other threads read and write."""

from __future__ import annotations

import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from savl.images.errors import UnreadableImage
from savl.images.format import FORMATS, PNG
from savl.images.jpeg_decode import decode_jpeg
from savl.images.read import read_image
from savl.images.vips_decode import decode_alone, vips_operation
from savl.images.write import write_image

ROUNDS = 25


def noise(side: int) -> np.ndarray:
    return np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)


def jpeg(side: int, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(side)).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def good_and_bad(side: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
    plain, progressive = jpeg(side), jpeg(side, progressive=True)
    scan = plain.index(b"\xff\xda")
    stray = plain[:scan] + b"\1\2\3" + plain[scan:]
    good = {
        "plain": plain,
        "progressive": progressive,
        "stray bytes before the scan": stray,
        "stray bytes before many markers": plain[:2] + plain[2:].replace(b"\xff\xdb", b"\0\xff\xdb", 2),
        "stray bytes at the end": plain[:-2] + bytes(40) + plain[-2:],
        "stray bytes at the end of a progressive file": progressive[:-2] + bytes(40) + progressive[-2:],
        "a future version of JFIF": plain.replace(b"JFIF\0\1", b"JFIF\0\7", 1),
        "unusual scan parameters": plain[: scan + 13] + b"\x3e" + plain[scan + 14 :],
    }
    bad = {
        "cut off": plain[: len(plain) * 2 // 3],
        "a marker in the last row": plain[:-12] + b"\xff\xd9",
        "a restart marker where none belongs": plain[:-20] + b"\xff\xd3" + plain[-18:],
        "stray bytes and a restart marker": stray[:-20] + b"\xff\xd3" + stray[-18:],
        "a progressive file with a marker in its middle": progressive[: len(progressive) // 2] + b"\xff\xd9",
    }
    return good, bad


def is_read(content: bytes) -> bool:
    try:
        read_image(content)
    except UnreadableImage:
        return False
    return True


@pytest.mark.parametrize("side", [8, 64])
def test_good_jpeg_files_are_read_and_bad_ones_refused(side: int) -> None:
    good, bad = good_and_bad(side)
    assert {name: is_read(content) for name, content in good.items()} == dict.fromkeys(good, True)
    assert {name: is_read(content) for name, content in bad.items()} == dict.fromkeys(bad, False)


def test_harmless_defects_do_not_change_the_pixels() -> None:
    good, _ = good_and_bad(64)
    plain = read_image(good["plain"]).pixels
    for name, content in good.items():
        if "progressive" not in name:
            np.testing.assert_array_equal(read_image(content).pixels, plain, err_msg=name)


@pytest.mark.parametrize("threads", [2, 8])
def test_threads_judge_each_file_as_one_thread_does(tmp_path: Path, threads: int) -> None:
    good, bad = good_and_bad(48)
    cases = [(name, content, name in good) for name, content in (good | bad).items()]

    def work(number: int) -> list[str]:
        wrong = []
        for step in range(ROUNDS):
            name, content, sound = cases[(number * 5 + step) % len(cases)]
            if is_read(content) is not sound:
                wrong.append(name)
            if step % 5 == number % 5:
                target = FORMATS[step % len(FORMATS)]
                write_image(tmp_path / f"{number}", noise(24), image_format=target, overwrite=True)
        return wrong

    with ThreadPoolExecutor(threads) as pool:
        assert [name for wrong in pool.map(work, range(threads)) for name in wrong] == []


def test_a_message_is_about_its_own_file(tmp_path: Path) -> None:
    write_image(tmp_path / "x.png", noise(64), image_format=PNG)
    png = (tmp_path / "x.png").read_bytes()[:3000]
    _, bad = good_and_bad(48)

    def reason(content: bytes) -> str:
        with pytest.raises(UnreadableImage) as caught:
            read_image(content)
        return caught.value.reason

    alone = [reason(png), reason(bad["cut off"])]
    with ThreadPoolExecutor(4) as pool:
        for number, reported in enumerate(pool.map(reason, [png, bad["cut off"]] * 40)):
            assert reported == alone[number % 2]


def test_libvips_in_other_code_does_not_mix_in(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyvips

    good, bad = good_and_bad(48)
    stop = threading.Event()

    def others() -> None:
        while not stop.is_set():
            image = pyvips.Image.jpegload_buffer(bad["stray bytes and a restart marker"], fail_on="error")
            image.copy_memory()
            with pytest.raises(pyvips.Error):
                pyvips.Image.new_from_buffer(b"no image", "")

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(ROUNDS):
            assert is_read(good["plain"])
            assert not is_read(bad["a marker in the last row"])
            assert not is_read(bad["stray bytes and a restart marker"])
    finally:
        stop.set()
        thread.join()


def test_a_sound_file_is_decoded_once(tmp_path: Path) -> None:
    import pyvips

    loads = []

    def load(fail_on: str) -> pyvips.Image:
        loads.append(fail_on)
        return pyvips.Image.jpegload_buffer(jpeg(16), fail_on=fail_on)

    decode_jpeg(io.BytesIO(jpeg(16)), load)
    assert loads == ["warning"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_wait_for_threads_it_does_not_have() -> None:
    import pyvips

    entered, leave = threading.Event(), threading.Event()

    def decode() -> None:
        with vips_operation():
            entered.set()
            leave.wait()

    def fail(fail_on: str) -> pyvips.Image:
        raise pyvips.Error("no threads of libvips outlive a fork either")

    thread = threading.Thread(target=decode)
    thread.start()
    entered.wait()
    child = os.fork()
    if child == 0:
        decode_alone(fail)
        os._exit(7)
    try:
        for _ in range(200):
            finished, status = os.waitpid(child, os.WNOHANG)
            if finished:
                break
            leave.wait(0.05)
        else:
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert finished, "the child waits"
        assert os.waitstatus_to_exitcode(status) == 7
    finally:
        leave.set()
        thread.join()
