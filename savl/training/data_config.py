"""Settings of the images of a training run: `[data]`, `[pairs]` and `[validation]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from savl.settings import check_at_least, check_types, renamed

Device = Literal["auto", "cpu"]
Unsuitable = Literal["skip", "refuse"]


@renamed("data", alike="images_per_recipe")
@dataclass(frozen=True)
class DataConfig:
    """Images to learn from, and how training pairs are made of them."""

    hr: tuple[str, ...] = ()
    """Folders of high-resolution images, searched recursively. A run on real pairs alone (`PairsConfig`) needs none."""
    include_results: bool = False
    """Whether to learn from images that savl has made: upscaled and degraded images and severity maps, which carry a
    mark in their XMP metadata."""
    cache: str = ""
    """Folder for decoded images, 3 bytes per pixel. The processes of a machine share it, and later runs read it instead
    of decoding again. If empty, each process keeps all images in memory."""
    patch: int = 32
    """Side of the LR patches in pixels. The side of the HR patches is ``scale`` times as large."""
    batch: int = 16
    """Patches per step and process."""
    margin: int = 4
    """LR pixels that are degraded around each patch and cropped off afterwards, at a position drawn for each recipe, so
    that patches contain no filter borders and the grid of JPEG blocks starts anywhere."""
    pool: int = 180
    """Number of degraded pairs from which batches are drawn. Pairs that are degraded together share their resize
    factors; the pool mixes them."""
    fresh: int = 4
    """Pairs that are degraded at each step and replace the oldest ones in the pool. Each pair is used about
    batch / fresh times, each time rotated and mirrored at random."""
    images_per_recipe: int = 1
    """Number of images that are degraded by one recipe and through one mask, or cut from one real pair. They are in one
    batch, where ``objective.content`` compares the degraded ones. Must divide ``batch`` and ``fresh``."""
    workers: int = 0
    """Processes that degrade images in advance, for each training process. 0 degrades in a thread of the training
    process, which may be too slow for a small network on a GPU. Requires ``cache``. The workers import the main script
    again, so a script must start training under ``if __name__ == "__main__":``."""
    degrade_on: Device = "auto"
    """Device that degrades images. ``auto`` is the device of the network. The recipes are the same on every device, but
    the noise differs between CPU and GPU."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        check_at_least(1, "data", self, "patch", "batch", "fresh", "images_per_recipe")
        check_at_least(0, "data", self, "margin", "workers")
        if self.workers and not self.cache:
            raise ValueError("data.workers requires data.cache: without it every worker would decode all images")
        if self.pool < max(self.batch, self.fresh):
            raise ValueError(
                f"data.pool must hold at least a batch of {self.batch} and the {self.fresh} fresh pairs of a step, "
                f"got {self.pool!r}"
            )
        if self.batch % self.images_per_recipe or self.fresh % self.images_per_recipe:
            raise ValueError(
                f"data.images_per_recipe must divide batch={self.batch} and fresh={self.fresh}, "
                f"got {self.images_per_recipe!r}"
            )


@dataclass(frozen=True)
class PairsConfig:
    """Real pairs to learn from, such as photographs of one scene through two lenses; none by default.

    Each pair is measured when it is read: an LR image should be aligned with the bicubic reduction of its original.
    """

    lr: tuple[str, ...] = ()
    """Folders of low-resolution images, searched recursively."""
    hr: tuple[str, ...] = ()
    """Folders of their originals, in the same order, matched by name (`savl.images.pairs.match_pairs`)."""
    share: float = 1.0
    """Share of the training pairs that are cut from these pairs; the others are degraded images of ``data.hr``. 1
    trains on these pairs alone. The pool contains exactly this share, rounded to a whole recipe
    (``data.images_per_recipe``)."""
    reduce_lr: bool = False
    """Whether to reduce LR images that have the size of their originals, by antialiased bicubic interpolation. Some
    data sets contain LR images that were enlarged to the pixel grid of the originals. False refuses them."""
    max_shift: float = 0.5
    """Largest shift between both images of a pair that is accepted, in LR pixels."""
    min_correlation: float = 0.5
    """Smallest correlation of the details of both images that is accepted; below it they show different scenes."""
    max_brightness: float = 0.05
    """Largest difference of the mean of a colour channel that is accepted, where 1 is the difference of white and
    black."""
    misregistration: float = 0.0
    """Standard deviation of a random shift of every HR patch along each axis, in HR pixels; rounded to whole pixels. It
    represents the registration error that remains between photographs of scenes with depth or motion: a network that
    is trained with it sharpens less, because a sharp edge at a wrong place has a larger error than a soft one."""
    unsuitable: Unsuitable = "skip"
    """What to do with pairs beyond these limits: ``skip`` them, and report them by name, or ``refuse`` to train."""

    def __post_init__(self) -> None:
        check_types(self, "pairs.")
        if len(self.lr) != len(self.hr):
            raise ValueError(
                f"pairs.lr and pairs.hr must hold the same number of folders, got {len(self.lr)} and {len(self.hr)}"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"pairs.share must satisfy 0 < share <= 1, got {self.share!r}")
        check_at_least(0, "pairs", self, "max_shift", "max_brightness", "misregistration")
        check_at_least(-1, "pairs", self, "min_correlation")


@dataclass(frozen=True)
class ValidationConfig:
    """Validation of the averaged weights during training; off by default."""

    hr: str = ""
    """Folder of high-resolution images. If empty, nothing is validated."""
    lr: str = ""
    """Folder of their low-resolution counterparts, matched by name. If empty, the degradation of the run makes them."""
    reduce_lr: bool = False
    """Whether to reduce LR images that have the size of their originals, as ``pairs.reduce_lr`` does."""
    every: int = 1000
    """Steps between validations."""
    images: int = 10
    """Largest number of images; the first ones by name are used."""
    side: int = 512
    """Side in HR pixels to which larger images are cropped around their center."""

    def __post_init__(self) -> None:
        check_types(self, "validation.")
        check_at_least(1, "validation", self, "every", "images")
        if self.lr and not self.hr:
            raise ValueError("validation.lr requires validation.hr, the originals to compare with")
        check_at_least(32, "validation", self, "side")  # SSIM at the largest scale requires it
