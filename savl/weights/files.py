"""Networks from names and files, and back. Loading never unpickles code."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors.torch import save as serialize
from torch import nn

from savl.atomic_write import write_atomically
from savl.network import CONFIGS, SAVL, SAVLConfig
from savl.network.unwrap import unwrap
from savl.weights.checkpoint_file import read_checkpoint
from savl.weights.hat import hat_config, hat_state_dict
from savl.weights.state_dicts import check_fit, find_state_dict, is_hat, is_savl

METADATA_KEY = "savl_config"
"""Where a savl file keeps its configuration, as JSON: in the metadata of the safetensors header."""

_TRAINED_BY = {"savl-base": "configs/base_stage1.toml", "savl-tiny": "configs/savl_tiny.toml"}


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


def find_weights(source: str | os.PathLike[str], argument: str = "source") -> Path:
    """Return the file of weights that a name or path stands for.

    Args:
        source: The name of shipped weights, or the path of a file.
        argument: What the caller calls it, for the message.

    Raises:
        FileNotFoundError: Neither a shipped name nor an existing file; the message says what there is, or how to get
            weights for a configuration without any.
    """
    name = os.fspath(source)
    names = shipped()
    path = names.get(name, Path(name))
    if os.path.isfile(path):
        return path
    accepted = f"{argument} must be shipped weights ({', '.join(names) or 'none are shipped'}) or an existing file"
    if os.path.isdir(path):
        raise FileNotFoundError(f"{accepted}, got the folder {name!r}; name a file in it")
    if "://" in name:
        raise FileNotFoundError(f"{accepted}, got {name!r}; savl downloads nothing: fetch the file, give its path")
    if name not in CONFIGS:
        folder, last = os.path.split(name)
        known = {other.lower(): other for other in [*_beside(path), *([] if folder else [*CONFIGS, *names])]}
        close = get_close_matches(last.lower(), known, n=1)
        hint = f"; did you mean {os.path.join(folder, known[close[0]])!r}?" if close else ""
        raise FileNotFoundError(f"{accepted}, got {name!r}{hint}")
    if name in _TRAINED_BY:
        way = f"`savl train {_TRAINED_BY[name]}` makes some, and the paths of published HAT checkpoints are accepted"
    else:
        way = "give the path of a published HAT checkpoint (https://github.com/XPixelGroup/HAT)"
    raise FileNotFoundError(
        f"{accepted}, got {name!r}, a configuration without weights: {way}; savl.build({name!r}) makes that network "
        "with random weights"
    )


def load(source: str | os.PathLike[str]) -> SAVL:
    """Load a network with its weights, in evaluation mode, float32, on the CPU.

    Args:
        source: The name of shipped weights (``savl.weights.shipped()`` lists them), or the path of a file, whatever
            its name ends in: what `save` wrote, a checkpoint of `savl train`, or a published HAT checkpoint (HAT-S,
            HAT, HAT-L, Real_HAT_GAN; ×2, ×3, ×4) as safetensors or as ``torch.save`` wrote it.

            The tensors may lie under ``params_ema``, ``params``, ``state_dict``, ``model``, ``net_g`` and the like,
            and their names may begin with ``module.``, ``_orig_mod.``, ``net_g.`` and the like; a moving average is
            preferred. A savl state dict that ``torch.save`` wrote has no settings in it: they are then read from a
            file beside it, ``x.json`` or ``x.toml`` for ``x.pth``, that has the fields of `SAVLConfig`.

    Returns:
        The network. HAT checkpoints become a `SAVL` without a degradation code.

    Raises:
        FileNotFoundError: Neither a shipped name nor an existing file.
        ValueError: The file is damaged, holds pickled code, or is neither a savl nor a HAT checkpoint; or its
            tensors do not fit the network exactly. The message names the file and what is wrong in it.
        OSError: The file cannot be read.
    """
    path = find_weights(source)
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


def _beside(path: Path) -> list[str]:
    """Names of the files in the folder of a path; none where it cannot be read."""
    try:
        return os.listdir(path.parent)
    except (OSError, ValueError):
        return []


def _load_file(path: Path) -> SAVL:
    content, metadata = read_checkpoint(path)
    tensors = find_state_dict(content)
    savl_file = METADATA_KEY in metadata
    if is_hat(tensors) and not savl_file:
        model = SAVL(hat_config(tensors))
        tensors = hat_state_dict(tensors, model)
    elif savl_file or is_savl(tensors):
        model = SAVL(_settings(path, content, metadata))
        check_fit({name: tensor.shape for name, tensor in model.state_dict().items()}, tensors)
    else:
        found = ", ".join([*sorted(tensors)[:3], "..."]) if tensors else "none"
        raise ValueError(f"is neither a savl file nor a HAT checkpoint (its tensors: {found})")
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def _of_configuration(values: Any) -> Any:
    """Return settings with those of the configuration that their ``name`` names, as in ``[model]`` of `savl train`."""
    if not isinstance(values, dict) or "name" not in values:
        return values
    if values["name"] not in CONFIGS:
        raise ValueError(f"name must be one of {', '.join(CONFIGS)}, got {values['name']!r}")
    return CONFIGS[values["name"]].to_dict() | {name: value for name, value in values.items() if name != "name"}


def _settings(path: Path, content: Any, metadata: dict[str, str]) -> SAVLConfig:
    """Return the settings of a savl network: from its file, or from one of the same name beside it.

    Raises:
        ValueError: There are none, or they cannot be used.
    """
    where = f"its {METADATA_KEY} metadata" if METADATA_KEY in metadata else "the settings in it"
    try:
        values = _settings_inside(content, metadata, METADATA_KEY)
        if values is not None:
            values.setdefault("estimator_high_pass", False)  # files from before there was such a setting
        for suffix, parse in () if values is not None else ((".json", json.loads), (".toml", tomllib.loads)):
            beside = path.with_suffix(suffix)
            if beside != path and beside.is_file():
                where = f"{beside.name}, the settings beside it,"
                values = parse(beside.read_text(encoding="utf-8"))
                if isinstance(values, dict):
                    values = _of_configuration(values.get("model", values))
                break
        if values is not None:
            if not isinstance(values, dict):
                raise ValueError(f"expected a table of settings, got {type(values).__name__}")
            return SAVLConfig.from_dict(values)
    except (ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{where} cannot be used: {error}") from error
    raise ValueError(
        "holds the weights of a savl network without its settings: write them with savl.save(model, 'x.safetensors'), "
        f"or put json.dumps(model.config.to_dict()) beside it as {path.with_suffix('.json').name}"
    )


def _settings_inside(content: Any, metadata: Mapping[str, str], key: str) -> dict[str, Any] | None:
    """Find the settings of a savl network in what a file holds.

    Args:
        content: As `read_checkpoint` returns it.
        metadata: As `read_checkpoint` returns it.
        key: Under which `savl.save` keeps them in the metadata.

    Returns:
        Values for `SAVLConfig.from_dict`: those of `savl.save`, those beside a state dict under ``key`` or ``config``
        (``torch.save({"state_dict": ..., "config": model.config.to_dict()}, ...)``), or those of a checkpoint of
        `savl train`; None where there are none.

    Raises:
        ValueError: What `savl.save` keeps there is no JSON object.
    """
    values: Any = None
    if key in metadata:
        values = json.loads(metadata[key])
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {metadata[key][:40]!r}")
    elif isinstance(content, Mapping):
        values = next((content[name] for name in (key, "config") if isinstance(content.get(name), Mapping)), None)
        training = content.get("settings")
        if values is None and isinstance(training, Mapping):
            values = {
                name.removeprefix("model."): value
                for name, value in training.items()
                if isinstance(name, str) and name.startswith("model.")
            } or None
    return None if values is None else dict(values)
