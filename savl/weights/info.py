"""Description of a file of weights: architecture, size, requirements and licence."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from savl.network import SAVL
from savl.weights.files import METADATA_KEY, find_weights, load, shipped
from savl.weights.spandrel_model import SpandrelModel

# Keys in the metadata of safetensors files that state the licence, the most common one first, in lower case.
_LICENCE_KEYS = ("modelspec.license", "license", "licence")
_SHOWN_KEYS = ("modelspec.title", "modelspec.author", "modelspec.date", "modelspec.description", "title", "author")
_LONGEST_VALUE = 200


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a file of weights.

    Attributes:
        path: The file.
        architecture: "SAVL", "HAT", or an architecture in spandrel's words, such as "ESRGAN".
        purpose: "SR" for super-resolution, or "Restoration".
        scale: Upscaling factor.
        channels: Channels of the images: 3 for RGB, 1 for gray.
        parameters: Number of parameters.
        tags: Settings of the architecture in short, such as "64nf".
        sizes: Requirements on the size of images that are met by padding, in words.
        tiling: Whether images may be processed in tiles: "supported", "discouraged" or "internal".
        dtypes: Dtypes in which the network may compute.
        licence: Licence that the metadata of the file state, or None. The one of shipped weights is that of savl.
        metadata: Title, author, date and description in the metadata of a safetensors file, as far as it has them.
    """

    path: Path
    architecture: str
    purpose: str
    scale: int
    channels: int
    parameters: int
    tags: tuple[str, ...]
    sizes: str
    tiling: str
    dtypes: tuple[str, ...]
    licence: str | None
    metadata: dict[str, str]


def model_info(source: str | os.PathLike[str]) -> tuple[ModelInfo, SAVL | SpandrelModel]:
    """Load a file of weights, and return what it is, and its network.

    Args:
        source: As for `savl.load`.

    Raises:
        FileNotFoundError, ValueError, OSError: As for `savl.load`.
    """
    path = find_weights(source)
    network = load(path)
    metadata = {key.lower(): value for key, value in _metadata(path).items()}
    licence = next((metadata[key] for key in _LICENCE_KEYS if metadata.get(key)), None)
    if licence is None and path in shipped().values():
        licence = "Apache-2.0"
    info = ModelInfo(
        path=path,
        architecture=_architecture(network),
        purpose="SR" if isinstance(network, SAVL) else network.traits.purpose,
        scale=network.scale,
        channels=network.image_channels,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        tags=_tags(network),
        sizes="any" if isinstance(network, SAVL) else _sizes(network),
        tiling="supported" if isinstance(network, SAVL) else network.traits.tiling,
        dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in network.dtypes),
        licence=licence,
        metadata={key: metadata[key][:_LONGEST_VALUE] for key in _SHOWN_KEYS if metadata.get(key)},
    )
    return info, network


def _metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; none for other files."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: value for key, value in (file.metadata() or {}).items() if key != METADATA_KEY}
    except SafetensorError:
        return {}


def _architecture(network: SAVL | SpandrelModel) -> str:
    if isinstance(network, SpandrelModel):
        return network.traits.architecture
    return "SAVL" if network.has_field else "HAT"


def _tags(network: SAVL | SpandrelModel) -> tuple[str, ...]:
    if isinstance(network, SpandrelModel):
        return network.traits.tags
    config = network.config
    field = (f"{config.degradation_code} field of {config.latent} channels",) if network.has_field else ()
    return (
        f"{config.channels} channels",
        f"depths {'-'.join(map(str, config.depths))}",
        f"{config.heads} heads",
        f"windows of {config.window}",
        *field,
    )


def _sizes(network: SpandrelModel) -> str:
    traits = network.traits
    parts = [
        *([f"at least {traits.minimum_size}"] if traits.minimum_size > 1 else []),
        *([f"multiples of {traits.multiple_of}"] if traits.multiple_of > 1 else []),
        *(["square"] if traits.square else []),
    ]
    return f"{', '.join(parts)}; images are padded" if parts else "any"
