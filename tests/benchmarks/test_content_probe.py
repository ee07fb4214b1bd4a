"""The study of content computes with the fused kernels, and leaves the setting of the process as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import savl
from benchmarks.studies import content_probe
from savl.network import SAVL, SAVLConfig
from savl.ops.scopes import explicit_settings
from savl.ops.settings import KernelSettings

SMALL = SAVLConfig(
    channels=6, depths=(1,), heads=1, window=4, cab_compress=3, cab_squeeze=3, upsampler="pixelshuffledirect",
    image_residual=True, latent=4, estimator_width=6, estimator_dilations=(1,),
)  # fmt: skip


class Collected(Exception):
    """Raised in place of the measurements, which take minutes."""


def test_only_the_networks_of_the_study_use_the_fused_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hr").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "hr" / "a.png")
    weights = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    for path in weights:
        savl.save(savl.build(SMALL), path)

    def collect(models: Sequence[SAVL], *arguments: Any, **settings: Any) -> None:
        for model in models:
            chosen = [module.kernels for module in model.modules() if hasattr(module, "kernels")]
            assert chosen
            assert all(kernels == KernelSettings.of(True) for kernels in chosen)
        raise Collected

    monkeypatch.setattr(content_probe, "collect_controlled", collect)
    before = explicit_settings()
    with pytest.raises(Collected):
        content_probe.main([*weights, "--hr", str(tmp_path / "hr")])
    assert explicit_settings() == before
