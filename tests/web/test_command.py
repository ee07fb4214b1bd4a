"""`savl web` before its page is served: errors of one line, and the socket."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from savl.cli import main
from savl.web.server import listen

Captured = pytest.CaptureFixture[str]


def error_of(capsys: Captured, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(["web", "--no-browser", *arguments])
    assert isinstance(stop.value.code, int)
    captured = capsys.readouterr()
    assert captured.out == ""
    return stop.value.code, captured.err


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, said = error_of(capsys)
    assert code == 2
    assert said == "error: savl web needs pip install 'savl[web]', because gradio is not installed\n"


def test_the_help_lists_the_command(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Open a page in the browser" in capsys.readouterr().out


def test_a_model_that_does_not_exist_ends_the_command(tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("gradio", reason="needs savl[web]")
    code, said = error_of(capsys, "--model", str(tmp_path / "none.pth"))
    assert code == 2
    assert said.startswith("error: model must be shipped weights (")
    assert said.count("\n") == 1


def test_a_model_that_does_not_load_ends_the_command(tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("gradio", reason="needs savl[web]")
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"no weights")
    code, said = error_of(capsys, "--model", str(path))
    assert code == 2
    assert str(path) in said
    assert said.count("\n") == 1


def test_a_port_in_use_ends_the_command(capsys: Captured) -> None:
    pytest.importorskip("gradio", reason="needs savl[web]")
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        code, said = error_of(capsys, "--port", str(port))
    assert code == 1
    assert said == f"error: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_only_this_computer_reaches_the_default_address() -> None:
    with listen("127.0.0.1", 0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
        socket.create_connection(listening.getsockname(), 5).close()
