"""Build, find, load and save networks. Loading never runs pickled code."""

from __future__ import annotations

import io
import json
import os
import tomllib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from savl.atomic_write import write_atomically
from savl.network import CONFIGS, SAVL, SAVLConfig
from savl.network.unwrap import unwrap
from savl.weights.checkpoint_file import read_checkpoint
from savl.weights.hat import HatVariant, check_expressible, hat_config, hat_state_dict, published_state_dict
from savl.weights.spandrel_model import SpandrelModel, SpandrelUnavailable, UnknownArchitecture, load_with_spandrel
from savl.weights.state_dicts import check_fit, find_state_dict, is_hat, is_savl, state_dicts

METADATA_KEY = "savl_config"
"""Key in the metadata of the safetensors header under which a savl file stores its configuration as JSON."""

Layout = Literal["savl", "hat"]
"""Names and layouts of tensors that `save` writes."""

_TRAINED_BY = {"savl-base": "configs/base_stage1.toml", "savl-tiny": "configs/savl_tiny.toml"}


def build(config: str | SAVLConfig) -> SAVL:
    """Build a network with random weights, in training mode.

    Args:
        config: A name in ``savl.CONFIGS``, or a configuration.

    Raises:
        ValueError: The name is unknown.
        TypeError: ``config`` is neither a name nor a configuration.
    """
    if isinstance(config, SAVLConfig):
        return SAVL(config)
    if not isinstance(config, str):
        raise TypeError(f"config must be a name or a SAVLConfig, got {type(config).__name__}")
    if config not in CONFIGS:
        raise ValueError(f"config must be one of {', '.join(CONFIGS)} or a SAVLConfig, got {config!r}")
    return SAVL(CONFIGS[config])


def shipped() -> dict[str, Path]:
    """Return the weights that are shipped with the package: name → safetensors file."""
    folder = Path(str(files("savl.weights")))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def find_weights(source: str | os.PathLike[str], argument: str = "source") -> Path:
    """Return the file of weights for a name or path.

    Args:
        source: The name of shipped weights, or the path of a file.
        argument: The caller's name for ``source``, used in the message.

    Raises:
        FileNotFoundError: ``source`` is neither a shipped name nor an existing file. The message says what is
            available, or how to get weights for a configuration without shipped ones.
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


def load(source: str | os.PathLike[str]) -> SAVL | SpandrelModel:
    """Load a network with its weights, in evaluation mode, float32, on the CPU.

    Networks of savl and HAT are loaded by savl itself. All other models for super-resolution and restoration that the
    package spandrel recognises, such as ESRGAN, Compact, SwinIR or DAT, are loaded with it
    (``pip install "savl[models]"``).

    Args:
        source: The name of shipped weights (``savl.weights.shipped()`` lists them), or the path of a file with any
            suffix: written by `save`, a checkpoint of `savl train`, a published HAT checkpoint (HAT-S, HAT, HAT-L,
            Real_HAT_GAN; ×2, ×3, ×4), or a model of another architecture, as safetensors or in the format of
            ``torch.save``.

            The tensors may be stored under keys such as ``params_ema``, ``params``, ``state_dict``, ``model`` or
            ``net_g``, and their names may have prefixes such as ``module.``, ``_orig_mod.`` or ``net_g.``. A moving
            average is preferred. A savl state dict written by ``torch.save`` contains no settings; they are then read
            from a file beside it with the fields of `SAVLConfig`: ``x.json`` or ``x.toml`` for ``x.pth``.

    Returns:
        A `SAVL`, which for a HAT checkpoint has ``degradation_code="none"``; or a `SpandrelModel` for a model of
        another architecture.

    Raises:
        FileNotFoundError: ``source`` is neither a shipped name nor an existing file.
        ValueError: The file is damaged, contains pickled code, or contains no network that can be loaded; or its
            tensors do not fit the network exactly; or spandrel is needed and not installed; or the model is for
            another purpose, such as inpainting. The message names the file and the reason.
        OSError: The file cannot be read.
    """
    path = find_weights(source)
    try:
        content, metadata = read_checkpoint(path)
        return _load_content(path, content, metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_savl(source: str | os.PathLike[str]) -> SAVL:
    """Load a network of savl or HAT, as `load` does.

    Raises:
        FileNotFoundError, ValueError, OSError: As for `load`. A `ValueError` also if the file contains a model of
            another architecture.
    """
    model = load(source)
    if not isinstance(model, SAVL):
        raise ValueError(
            f"{os.fspath(source)}: is a model of the architecture {model.traits.architecture}; a savl or HAT network "
            "is needed here"
        )
    return model


def save(model: nn.Module, path: str | os.PathLike[str], *, layout: Layout = "savl") -> None:
    """Write a network to a file, atomically.

    Args:
        model: A `SAVL`, also compiled, in `DataParallel` or in `AveragedModel`. Its dtype is kept.
        path: File to write, ending in ``.safetensors``; with ``layout="hat"`` it may also end in ``.pth``. An existing
            file is replaced only once the new one is complete.
        layout: "savl": savl's names of tensors, with the configuration in the metadata of the file. "hat": the names
            and layouts of published HAT checkpoints, which other programs open, such as spandrel, chaiNNer, ComfyUI and
            the code of HAT. A ``.pth`` file has the tensors under the key ``params_ema``, as the published ones do.

    Raises:
        TypeError: ``model`` is not a `SAVL`.
        ValueError: ``path`` has another suffix; ``layout`` has another value; or ``model`` has a setting that a HAT
            checkpoint cannot express, such as a degradation field.
        OSError: The disk is full or the folder is not writable; an existing file stays unchanged.
    """
    target = Path(path)
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be 'savl' or 'hat', got {layout!r}")
    suffixes = (".safetensors",) if layout == "savl" else (".safetensors", ".pth")
    if target.suffix not in suffixes:
        raise ValueError(f"path must end in {' or '.join(suffixes)}, got {str(target)!r}")
    unwrapped = unwrap(model)
    if unwrapped is None:
        raise TypeError(f"model must be a savl.SAVL, got {type(model).__name__}")
    network = unwrapped.model
    if layout == "hat":
        check_expressible(network.config)
        tensors = published_state_dict(network)
    else:
        tensors = network.state_dict()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if target.suffix == ".pth":
        file = io.BytesIO()
        torch.save({"params_ema": tensors}, file)
        write_atomically(target, file.getvalue())
    else:
        metadata = {"format": "pt"} if layout == "hat" else {METADATA_KEY: json.dumps(network.config.to_dict())}
        write_atomically(target, serialize(tensors, metadata=metadata))


def _beside(path: Path) -> list[str]:
    """Return the names of the files in the folder of a path; none if it cannot be read."""
    try:
        return os.listdir(path.parent)
    except (OSError, ValueError):
        return []


def _load_content(path: Path, content: Any, metadata: dict[str, str]) -> SAVL | SpandrelModel:
    tensors = find_state_dict(content)
    savl_file = METADATA_KEY in metadata
    if is_hat(tensors) and not savl_file:
        try:
            return _filled(SAVL(hat_config(tensors)), lambda model: hat_state_dict(tensors, model))
        except HatVariant as error:
            return _load_other(content, tensors, error)
    if savl_file or is_savl(tensors):
        model = SAVL(_settings(path, content, metadata))
        check_fit({name: tensor.shape for name, tensor in model.state_dict().items()}, tensors)
        return _filled(model, lambda _: tensors)
    return _load_other(content, tensors, None)


def _filled(model: SAVL, tensors: Callable[[SAVL], dict[str, Tensor]]) -> SAVL:
    model.load_state_dict(tensors(model), strict=True)
    return model.eval()


def _load_other(content: Any, tensors: dict[str, Tensor], refusal: HatVariant | None) -> SpandrelModel:
    """Load a model of another architecture, or a variant of HAT that savl does not have.

    Args:
        content: Content of the file.
        tensors: Its largest state dict, for the message.
        refusal: Why savl could not load the file as HAT; None if it is no HAT checkpoint.

    Raises:
        ValueError: The file cannot be loaded. For a variant of HAT, the reason is that of savl.
    """
    try:
        return load_with_spandrel(state_dicts(content))
    except (SpandrelUnavailable, UnknownArchitecture) as error:
        if refusal is not None:
            raise refusal from None
        found = ", ".join([*sorted(tensors)[:3], "..."]) if tensors else "none"
        raise ValueError(f"is neither a savl file nor a HAT checkpoint (its tensors: {found}); {error}") from error
    except ValueError:
        if refusal is not None:
            raise refusal from None
        raise


def _of_configuration(values: Any) -> Any:
    """Return settings, completed by those of the configuration given by ``name``, as in ``[model]`` of `savl train`."""
    if not isinstance(values, dict) or "name" not in values:
        return values
    if values["name"] not in CONFIGS:
        raise ValueError(f"name must be one of {', '.join(CONFIGS)}, got {values['name']!r}")
    return CONFIGS[values["name"]].to_dict() | {name: value for name, value in values.items() if name != "name"}


def _settings(path: Path, content: Any, metadata: dict[str, str]) -> SAVLConfig:
    """Return the settings of a savl network, from its file or from a settings file beside it.

    Raises:
        ValueError: There are no settings, or they are not valid.
    """
    where = f"its {METADATA_KEY} metadata" if METADATA_KEY in metadata else "the settings in it"
    try:
        values = _settings_inside(content, metadata, METADATA_KEY)
        if values is not None:
            values.setdefault("estimator_high_pass", False)  # for files older than this setting
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
    """Find the settings of a savl network in the content of a file.

    Args:
        content: Content as returned by `read_checkpoint`.
        metadata: Metadata as returned by `read_checkpoint`.
        key: Key in the metadata under which `savl.save` stores the settings.

    Returns:
        Values for `SAVLConfig.from_dict`, or None if there are none. They are stored by `savl.save`, by `savl train`,
        or beside a state dict under ``key`` or ``config``, as in
        ``torch.save({"state_dict": ..., "config": model.config.to_dict()}, ...)``.

    Raises:
        ValueError: The metadata contain something other than a JSON object under ``key``.
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
