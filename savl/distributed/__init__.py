"""Folders that outgrow a machine, on a Ray cluster: ``pip install 'savl[cluster]'``.

`upscale_dataset` upscales the files of a Ray Dataset; ``savl upscale --ray`` does it for files and folders. Neither
``import savl`` nor ``import savl.distributed`` imports Ray.
"""

from __future__ import annotations

from savl.distributed.dataset import upscale_dataset

__all__ = ["upscale_dataset"]
