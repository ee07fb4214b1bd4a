"""Record what the published HAT code computes, for `test_hat.py`.

    python tests/weights/record_hat_golden.py path/to/hat_arch.py

The file named is ``hat/archs/hat_arch.py`` of https://github.com/XPixelGroup/HAT, which needs einops. Of
basicsr it takes a registry and two helpers, for which stand-ins are made here. Weights and images come from
the recipe in `test_hat.py`; the names, shapes and index buffers it assumes are first checked against the
published network. Images are reflect-padded to whole windows as in the published test code, except that the
mirror goes back and forth where an image is smaller than the padding, which that code refuses.

`golden/hat.safetensors` was recorded at commit 1638a9a of that repository with torch 2.13 on x86-64, float32.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import test_hat
import torch
from safetensors.torch import save_file
from test_hat import ARCHITECTURES, CASES, GOLDEN, Architecture, published_shapes
from torch import Tensor, nn


class Registry:
    """Stand-in for basicsr's registry: registers nothing."""

    def register(self) -> Any:
        return lambda published: published


def import_published(path: Path) -> ModuleType:
    """Import the published architecture with stand-ins for what it takes of basicsr."""
    stand_ins = {
        "basicsr.utils.registry": {"ARCH_REGISTRY": Registry()},
        "basicsr.archs.arch_util": {
            "to_2tuple": lambda side: (side, side) if isinstance(side, int) else side,
            "trunc_normal_": nn.init.trunc_normal_,
        },
    }
    for name, contents in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(contents)
        sys.modules[name] = module
    for name in ("basicsr", "basicsr.utils", "basicsr.archs"):
        sys.modules[name] = ModuleType(name)
    specification = importlib.util.spec_from_file_location("published_hat", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def published_network(published: ModuleType, hat: Architecture) -> nn.Module:
    """The published network with the recipe's weights in it."""
    network: nn.Module = published.HAT(
        img_size=64,
        window_size=hat.window,
        upscale=hat.scale,
        embed_dim=hat.channels,
        depths=[hat.blocks] * hat.groups,
        num_heads=[hat.heads] * hat.groups,
        compress_ratio=hat.compress,
        squeeze_factor=hat.squeeze,
        conv_scale=0.01,
        overlap_ratio=0.5,
        mlp_ratio=2,
        upsampler="pixelshuffle",
        resi_connection="1conv",
    )
    own, ours = network.state_dict(), test_hat.checkpoint(hat)
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    assert shapes == published_shapes(hat), "names or shapes differ from the published ones"
    assert all(torch.equal(own[name], ours[name]) for name in own if "index" in name), "index buffers differ"
    network.load_state_dict(ours)
    return network.eval()


@torch.no_grad()
def upscale(network: nn.Module, lr: Tensor, hat: Architecture) -> Tensor:
    """Pad, run, crop."""
    height, width = lr.shape[-2:]
    missing = [(0, 0), (0, 0), (0, -height % hat.window), (0, -width % hat.window)]
    padded = torch.from_numpy(np.pad(lr.numpy(), missing, mode="reflect"))
    return network(padded)[..., : hat.scale * height, : hat.scale * width].contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description="Record what the published HAT code computes.")
    parser.add_argument("hat_arch", type=Path, help="hat/archs/hat_arch.py of the published code")
    published = import_published(parser.parse_args().hat_arch)
    torch.set_num_threads(1)
    recorded = {"fingerprint": test_hat.fingerprint()}
    for name, sizes in CASES.items():
        hat = ARCHITECTURES[name]
        network = published_network(published, hat)
        for size in sizes:
            output = upscale(network, test_hat.low_resolution(size), hat)
            recorded[f"{name} {size}"] = output
            print(f"{name} {size}: standard deviation {output.std():.3f}, largest {output.abs().max():.2f}")
    GOLDEN.parent.mkdir(exist_ok=True)
    save_file(recorded, GOLDEN)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
