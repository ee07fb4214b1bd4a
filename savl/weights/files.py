"""Networks from names and files, and back. Loading never unpickles code."""

from __future__ import annotations

import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from savl.atomic_write import write_atomically
from savl.network import CONFIGS, SAVL, SAVLConfig
from savl.network.unwrap import unwrap
from savl.weights.hat import hat_config, hat_state_dict, is_hat
from savl.weights.strict import check_fit

METADATA_KEY = "savl_config"
"""Where a savl file keeps its configuration, as JSON: in the metadata of the safetensors header."""


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
        raise ValueError(f"config must be one of {', '.join(CONFIGS)} or a SAVLConfig, got {config!r}")
    return SAVL(CONFIGS[config])


def shipped() -> dict[str, Path]:
    """Weights that come with the package: name → safetensors file."""
    folder = Path(str(files("savl.weights")))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def load(source: str | os.PathLike[str]) -> SAVL:
    """Load a network with its weights, in evaluation mode, float32, on the CPU.

    Args:
        source: The name of shipped weights (``savl.weights.shipped()`` lists them), or the path of a file:
            savl ``.safetensors``, or a published HAT checkpoint (HAT-S, HAT, HAT-L, Real_HAT_GAN; ×2, ×3, ×4)
            in ``.safetensors`` or ``.pth``, plain or under ``params_ema`` (preferred) or ``params``.

    Returns:
        The network. HAT checkpoints become a `SAVL` without a degradation code.

    Raises:
        FileNotFoundError: Neither a shipped name nor an existing file.
        ValueError: The file is damaged, holds pickled code, or is neither a savl nor a HAT checkpoint; or its
            tensors do not fit the network exactly. The message names the file and what is wrong in it.
        OSError: The file cannot be read.
    """
    name = os.fspath(source)
    names = shipped()
    path = names.get(name, Path(name))
    if not path.is_file():
        random = f"; savl.build({name!r}) makes that network with random weights" if name in CONFIGS else ""
        raise FileNotFoundError(
            f"source must be shipped weights ({', '.join(names) or 'none are shipped'}) or an existing file, "
            f"got {name!r}{random}"
        )
    try:
        return _load_file(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network as safetensors with its configuration inside, atomically.

    Args:
        model: Any `SAVL`, also compiled, in `DataParallel` or in `AveragedModel`; its dtype is kept.
        path: Must end in ``.safetensors``. An existing file is replaced only by a whole new one.

    Raises:
        TypeError: ``model`` is no `SAVL`.
        ValueError: The path has another suffix.
        OSError: The disk is full or the folder cannot be written; an existing file is untouched.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(target)!r}")
    unwrapped = unwrap(model)
    if unwrapped is None:
        raise TypeError(f"model must be a savl.SAVL, got {type(model).__name__}")
    network = unwrapped.model
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_atomically(target, serialize(tensors, metadata={METADATA_KEY: json.dumps(network.config.to_dict())}))


def _load_file(path: Path) -> SAVL:
    tensors, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_pickle(path), {})
    if METADATA_KEY in metadata:
        model = _build_from_json(metadata[METADATA_KEY])
        check_fit({name: tensor.shape for name, tensor in model.state_dict().items()}, tensors)
    elif is_hat(tensors):
        model = SAVL(hat_config(tensors))
        tensors = hat_state_dict(tensors, model)
    else:
        found = ", ".join([*sorted(tensors)[:3], "..."]) if tensors else "none"
        raise ValueError(f"is neither a savl file nor a HAT checkpoint (its tensors: {found})")
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def _build_from_json(text: str) -> SAVL:
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {text[:40]!r}")
        values.setdefault("estimator_high_pass", False)  # files from before there was such a setting
        return SAVL(SAVLConfig.from_dict(values))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"its {METADATA_KEY} metadata cannot be used: {error}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"is not a readable safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(_explain_refusal(error)) from error
    for key in ("params_ema", "params"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError("must hold a state dict: tensors by name, plain or under params_ema or params")
    return content


def _explain_refusal(error: Exception) -> str:
    """Say in one line why torch refused; its own message runs over many and explains how to run the code."""
    message = str(error)
    if code := re.search(r"GLOBAL (\S+)", message):
        return f"holds pickled code ({code[1]}), which savl never runs; save its state dict alone, load that"
    first_sentence = message.partition("\n")[0].partition(". ")[0]
    return f"is damaged or no checkpoint of weights alone ({type(error).__name__}: {first_sentence})"
