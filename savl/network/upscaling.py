"""The interface that `savl.Upscaler` asks of a network, and the base class that implements it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from savl.network.estimator import DegradationField


class UpscalingNetwork(nn.Module):
    """A network that `savl.Upscaler` can run in tiles.

    `savl.SAVL` and `savl.weights.SpandrelModel` are such networks. A subclass must have `scale` and `reconstruct`. All
    other members have defaults for a network without a degradation field.
    """

    compile_options: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    """Positional and keyword arguments of the last call of `compile`; None if there was none."""

    @property
    def scale(self) -> int:
        """Upscaling factor, at least 1."""
        raise NotImplementedError(f"{type(self).__name__} must have the attribute scale, an int of at least 1")

    @property
    def size_multiple(self) -> int:
        """Tiles begin at multiples of this number of LR pixels, so that their windows are those of the whole image."""
        return 8

    @property
    def image_channels(self) -> int:
        """3 for a network of RGB images, 1 for a network that processes each colour channel by itself."""
        return 3

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes in which the network may compute: torch.float32, and under autocast also torch.bfloat16."""
        return torch.float32, torch.bfloat16

    @property
    def prefers_whole_images(self) -> bool:
        """Whether tiles change the result visibly, so that an image is tiled only if memory requires it."""
        return False

    @property
    def keeps_flat_areas(self) -> bool:
        """Whether an area of exactly one colour must keep this colour. False for a network that may change colours."""
        return True

    @property
    def field_radius(self) -> int:
        """Number of pixels around a pixel that its degradation field depends on. 0 for a network without a field."""
        return 0

    @property
    def has_field(self) -> bool:
        """Whether `estimate` returns a degradation field."""
        return False

    @property
    def has_severity(self) -> bool:
        """Whether the field has a variance, from which the severity map is computed."""
        return False

    @property
    def learns_strength(self) -> bool:
        """Whether the field has a restoration strength for every pixel."""
        return False

    def estimate(self, lr: Tensor, seed: int | None = None) -> DegradationField | None:
        """Infer the degradation field of an image ``(B, 3, h, w)``; None for a network without one."""
        return None

    def reconstruct(self, lr: Tensor, field: DegradationField | None, strength: float | Tensor | None = None) -> Tensor:
        """Upscale an image whose degradation field is known.

        Args:
            lr: ``(B, C, h, w)`` in [0, 1], with C = 3; for a network with ``image_channels == 1``, C may also be 1.
            field: Result of `estimate`.
            strength: A number in [0, 1] or a tensor ``(B, h, w)``, the factor on the difference from bicubic
                interpolation. None: that of the field, or 1 without it.

        Returns:
            ``(B, C, scale·h, scale·w)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement reconstruct(lr, field, strength=None)")

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile in place, with the arguments of `torch.compile`.

        They are kept, so that a `savl.Upscaler` can compile `estimate` and `reconstruct` with the same options.
        """
        super().compile(*args, **kwargs)
        self.compile_options = args, kwargs

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, without the options of `compile`, which may not be picklable."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("compile_options", None)
        return state


def scale_difference(bicubic: Tensor, difference: Tensor, strength: float | Tensor) -> Tensor:
    """Return ``bicubic + strength · difference``.

    Args:
        bicubic: ``(B, C, H, W)``, the bicubically upscaled image.
        difference: ``(B, C, H, W)``, the network's image minus ``bicubic``.
        strength: A number, or ``(B, h, w)``, which is interpolated bilinearly to H × W.

    Returns:
        ``(B, C, H, W)``, in the wider dtype of the two images.
    """
    if isinstance(strength, Tensor):
        size = bicubic.shape[-2:]
        strength = F.interpolate(strength[:, None], size=size, mode="bilinear", align_corners=False)
    # In a bfloat16 network, the dtype of the strength may be wider than that of the image.
    return (bicubic + strength * difference).to(torch.promote_types(bicubic.dtype, difference.dtype))
