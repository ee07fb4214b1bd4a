"""A `savl upscale` whose network is a cheap stand-in, run in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from savl.cli import batch, main
from savl.images.format import format_of_suffix
from savl.images.write import write_image


@dataclass
class Result:
    sr: torch.Tensor
    severity: torch.Tensor


class FakeUpscaler:
    scale = 4

    def __call__(self, lr: torch.Tensor, *, on_tile: Callable[[int, int], None] | None = None) -> Result:
        if on_tile is not None:
            on_tile(1, 2)
            on_tile(2, 2)
        ramp = torch.linspace(0, 2, lr.shape[3]).expand(lr.shape[0], *lr.shape[2:])
        return Result(F.interpolate(lr, scale_factor=self.scale, mode="nearest"), ramp)


@dataclass
class Finished:
    code: int
    text: str


@pytest.fixture
def savl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Runs `savl` with the given arguments; gives its exit code, and what it printed, as one line per line."""
    monkeypatch.setattr(batch, "as_upscaler", lambda model, **settings: FakeUpscaler())
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: Any) -> Finished:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        code = stop.value.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Finished(code if isinstance(code, int) else 0, captured.out + captured.err)

    return run


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes small pictures into a folder that is the current one; the value tells them apart."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, value: int = 100, shape: tuple[int, ...] = (6, 8, 3), dtype: Any = np.uint8) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        image_format = format_of_suffix(path)
        assert image_format is not None
        write_image(path, np.full(shape, value, dtype), image_format=image_format)
        return path

    return write
