"""A node for ComfyUI: upscale images with a loaded upscale model, by savl's tiles and fused kernels.

Copy this file to ComfyUI/custom_nodes/, install savl in ComfyUI's environment, and restart ComfyUI. The node "Upscale
Image (savl)" takes the output of "Load Upscale Model", which is a model of spandrel.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

import savl


class SavlUpscale:
    """Upscale a batch of images with an upscale model."""

    CATEGORY = "image/upscaling"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "upscale"

    _last: ClassVar[tuple[Any, tuple[Any, ...], savl.Upscaler] | None] = None

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Return the inputs of the node."""
        return {
            "required": {
                "upscale_model": ("UPSCALE_MODEL",),
                "image": ("IMAGE",),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.05}),
                "tile": ("INT", {"default": 0, "min": 0, "max": 8192, "step": 8, "tooltip": "0: by free memory"}),
                "dtype": (["float32", "bfloat16"],),
            }
        }

    def upscale(
        self, upscale_model: Any, image: torch.Tensor, strength: float, tile: int, dtype: str
    ) -> tuple[torch.Tensor]:
        """Upscale images.

        Args:
            upscale_model: A ``spandrel.ImageModelDescriptor``.
            image: ``(B, H, W, 3)`` float in [0, 1].
            strength: 0 is bicubic interpolation, 1 the model's image.
            tile: Side of the tiles in input pixels; 0 chooses it by the free memory.
            dtype: "float32" or "bfloat16".

        Returns:
            ``(B, scale·H, scale·W, 3)`` float32 in [0, 1], on the CPU.
        """
        upscaler = self._upscaler(upscale_model, tile, dtype)
        lr = image[..., :3].movedim(-1, 1).clamp(0.0, 1.0)
        results = [upscaler(each, strength=strength).sr for each in lr.split(1)]
        return (torch.cat(results).movedim(1, -1).contiguous(),)

    @classmethod
    def _upscaler(cls, model: Any, tile: int, dtype: str) -> savl.Upscaler:
        """Return the upscaler of the last call, if model and settings are the same; else a new one."""
        settings = (tile, dtype)
        if cls._last is None or cls._last[0] is not model or cls._last[1] != settings:
            upscaler = savl.Upscaler(model, tile=tile or None, dtype=getattr(torch, dtype))
            cls._last = model, settings, upscaler
        return cls._last[2]


NODE_CLASS_MAPPINGS = {"SavlUpscale": SavlUpscale}
NODE_DISPLAY_NAME_MAPPINGS = {"SavlUpscale": "Upscale Image (savl)"}
