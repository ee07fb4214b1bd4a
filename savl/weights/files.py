"""Networks from names and files, and back. Loading never unpickles code."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from savl.network import CONFIGS, SAVL, SAVLConfig
from savl.weights.hat import hat_config, hat_state_dict, is_hat

METADATA_KEY = "savl_config"


def build(config: str | SAVLConfig) -> SAVL:
    """Make a network with random weights, in training mode.

    Args:
        config: A name out of ``savl.CONFIGS``, or a configuration.

    Raises:
        ValueError: The name is unknown.
        TypeError: Neither a name nor a configuration.
    """
    if isinstance(config, SAVLConfig):
        return SAVL(config)
    if not isinstance(config, str):
        raise TypeError(f"config must be a name or a SAVLConfig, got {type(config).__name__}")
    if config not in CONFIGS:
        raise ValueError(f"config must be one of {sorted(CONFIGS)} or a SAVLConfig, got {config!r}")
    return SAVL(CONFIGS[config])


def shipped() -> dict[str, Path]:
    """Weights that come with the package: name → safetensors file."""
    folder = Path(str(files("savl.weights")))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def load(source: str | os.PathLike[str]) -> SAVL:
    """Load a network with its weights, in evaluation mode, float32, on the CPU.

    Args:
        source: The name of shipped weights (``savl.weights.shipped()`` lists them), or the path of a file: savl
            ``.safetensors``; or a published HAT checkpoint (HAT-S, HAT, HAT-L, Real_HAT_GAN; ×2, ×3, ×4), ``.pth`` or
            ``.safetensors``, plain or under ``params_ema`` / ``params``.

    Returns:
        The network. HAT checkpoints become a `SAVL` without a degradation code.

    Raises:
        FileNotFoundError: Neither a shipped name nor an existing file.
        ValueError: The file is damaged, holds pickled code, or is neither a savl nor a HAT checkpoint; or its tensors do
            not fit the network exactly.
    """
    names = shipped()
    path = names.get(os.fspath(source), Path(source))
    if not path.is_file():
        hint = ""
        if os.fspath(source) in CONFIGS:
            hint = f"; {os.fspath(source)!r} is a configuration without shipped weights: savl.build makes a random one"
        raise FileNotFoundError(
            f"source must be shipped weights ({', '.join(names) or 'none'}) or an existing file, "
            f"got {os.fspath(source)!r}{hint}"
        )
    tensors, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_pickle(path), {})
    if METADATA_KEY in metadata:
        try:
            config = SAVLConfig.from_dict(json.loads(metadata[METADATA_KEY]))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: its {METADATA_KEY} metadata cannot be read: {error}") from error
    elif is_hat(tensors):
        try:
            config = hat_config(tensors)
            tensors = hat_state_dict(tensors, config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    else:
        some = ", ".join(sorted(tensors)[:3])
        raise ValueError(f"{path} is neither a savl file nor a HAT checkpoint (its tensors: {some}, ...)")
    model = SAVL(config)
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its own configuration: {error}") from error
    return model.eval()


def save(model: SAVL, path: str | os.PathLike[str]) -> None:
    """Write a network as safetensors with its configuration inside, atomically.

    Args:
        model: Any `SAVL`, its dtype is kept.
        path: Must end in ``.safetensors``; an existing file is replaced only by a whole new one.

    Raises:
        ValueError: The path has another suffix.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(target)!r}")
    temporary = target.with_name(target.name + ".part")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(model.config.to_dict())})
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is not a checkpoint that can be loaded safely (weights only, no pickled code): {error}"
        ) from error
    for key in ("params_ema", "params"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} must hold a state dict (plain, or under params_ema or params), got {type(content).__name__}")
    return content
