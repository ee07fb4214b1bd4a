"""The GAN stage: discriminator, adversarial losses, and the training of the discriminator beside the generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from savl.training.objective_config import AdversarialLoss, Discriminator, GanConfig, OptimizerConfig
from savl.training.perceptual import perceptual_loss

if TYPE_CHECKING:
    from accelerate import Accelerator


GRID_CELLS = 4
"""Side of the blocks in which `grid_pattern` looks for a pattern, in cells."""


class UNetDiscriminator(nn.Module):
    """The U-Net discriminator with spectral normalisation of Real-ESRGAN (Wang et al., 2021), with one logit per pixel.

    In training mode each forward pass takes one step of the power iteration that estimates the spectral norms, and so
    changes buffers, which are part of ``state_dict``. In evaluation mode nothing changes.
    """

    def __init__(self, features: int = 64) -> None:
        """Build a discriminator with random weights.

        Args:
            features: Channels at full resolution; 2, 4 and 8 times as many at 1/2, 1/4 and 1/8 of the resolution.

        Raises:
            ValueError: ``features`` is not positive.
        """
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features!r}")
        widths = [features, 2 * features, 4 * features, 8 * features]
        self.enter = nn.Conv2d(3, features, 3, padding=1)
        self.down = nn.ModuleList(_spectral_conv(width, 2 * width, kernel=4, stride=2) for width in widths[:-1])
        self.up = nn.ModuleList(_spectral_conv(2 * width, width) for width in reversed(widths[:-1]))
        self.refine = nn.ModuleList(_spectral_conv(features, features) for _ in range(2))
        self.leave = nn.Conv2d(features, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of images being real.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], H and W multiples of 8.

        Returns:
            ``(B, 1, H, W)`` logits, positive where a pixel looks real.

        Raises:
            ValueError: ``images`` has another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or any(side % 8 or side == 0 for side in images.shape[2:]):
            raise ValueError(f"images must be (B, 3, H, W), H and W multiples of 8, got {tuple(images.shape)}")
        x = _activate(self.enter(images))
        skips = []
        for conv in self.down:
            skips.append(x)
            x = _activate(conv(x))
        for conv in self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = _activate(conv(x)) + skips.pop()
        for conv in self.refine:
            x = _activate(conv(x))
        logits: Tensor = self.leave(x)
        return logits


class PatchDiscriminator(nn.Module):
    """A small convolutional discriminator with spectral normalisation, with one logit per 8×8 pixels.

    Three convolutions with stride 2 and one with stride 1, then the logits (after PatchGAN, Isola et al., 2017); a
    logit depends on 54×54 pixels. Kernels of the strided convolutions are 4×4, so that every pixel is read equally
    often. As in `UNetDiscriminator`, forward passes in training mode change buffers.
    """

    def __init__(self, features: int = 24) -> None:
        """Build a discriminator with random weights.

        Args:
            features: Channels at 1/2 of the resolution; 2 and 4 times as many at 1/4 and 1/8.

        Raises:
            ValueError: ``features`` is not positive.
        """
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features!r}")
        self.enter = nn.Conv2d(3, features, 4, stride=2, padding=1)
        self.down = nn.ModuleList(
            _spectral_conv(width, 2 * width, kernel=4, stride=2) for width in (features, 2 * features)
        )
        self.refine = _spectral_conv(4 * features, 4 * features)
        self.leave = nn.Conv2d(4 * features, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of images being real.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], H and W at least 8.

        Returns:
            ``(B, 1, H // 8, W // 8)`` logits, positive where an image looks real.

        Raises:
            ValueError: ``images`` has another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 8:
            raise ValueError(f"images must be (B, 3, H, W), H and W at least 8, got {tuple(images.shape)}")
        x = _activate(self.enter(images))
        for conv in (*self.down, self.refine):
            x = _activate(conv(x))
        logits: Tensor = self.leave(x)
        return logits


DISCRIMINATORS: dict[Discriminator, Callable[[int], nn.Module]] = {
    "unet": UNetDiscriminator,
    "patch": PatchDiscriminator,
}
"""Classes by the values of `GanConfig.discriminator`."""


def generator_loss(kind: AdversarialLoss, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """Compute the loss of the generator in nats; it is log 2 if the discriminator is at chance.

    With f, r the logits of fake and real, σ the sigmoid and E the mean over all elements of the batch,

    - ``vanilla``: −E[log σ(f)] (Goodfellow et al., 2014, non-saturating);
    - ``relativistic``: −½ E[log σ(f − E[r])] − ½ E[log(1 − σ(r − E[f]))] (Jolicoeur-Martineau, 2018, halved as in
      the code of ESRGAN, whose weight of 5e-3 applies to it).

    Args:
        kind: ``vanilla`` or ``relativistic``.
        fake_logits: Logits of generated images, any shape.
        real_logits: Logits of real images, any shape, detached here. ``vanilla`` ignores them.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: ``kind`` is unknown, or ``real_logits`` are missing for ``relativistic``.
    """
    _check_kind(kind)
    fake = fake_logits.float()
    if kind == "vanilla":
        return _as_real(fake)
    if real_logits is None:
        raise ValueError("real_logits must be a tensor for the relativistic generator loss, got None")
    real = real_logits.detach().float()
    return 0.5 * (_as_real(fake - real.mean()) + _as_fake(real - fake.mean()))


def discriminator_loss(kind: AdversarialLoss, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Compute the loss of the discriminator in nats; it is log 2 at chance.

    With f, r, σ and E as in `generator_loss`,

    - ``vanilla``: −½ E[log σ(r)] − ½ E[log(1 − σ(f))] (Goodfellow et al., 2014);
    - ``relativistic``: −½ E[log σ(r − E[f])] − ½ E[log(1 − σ(f − E[r]))] (Jolicoeur-Martineau, 2018).

    Both are half of the published sums, so that log 2 means chance everywhere. Generated images must be detached
    before the discriminator sees them; otherwise this loss also trains the generator.

    Args:
        kind: ``vanilla`` or ``relativistic``.
        real_logits: Logits of real images, any shape.
        fake_logits: Logits of generated images, any shape.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: ``kind`` is unknown.
    """
    _check_kind(kind)
    real, fake = real_logits.float(), fake_logits.float()
    if kind == "relativistic":
        real, fake = real - fake.mean(), fake - real.mean()
    return 0.5 * (_as_real(real) + _as_fake(fake))


def grid_pattern(sr: Tensor, hr: Tensor, period: int) -> Tensor:
    """Measure the patterns in SR images that repeat every ``period`` pixels.

    Images are divided into blocks of `GRID_CELLS` × `GRID_CELLS` cells of ``period`` × ``period`` pixels. The pattern
    of a block is the average of the error over its cells, minus the mean of this average. Blocks are small, because a
    pattern follows the content: it may have the opposite sign elsewhere in the image. Other errors do not cancel
    completely in a block, so the result is above 0 without a pattern too.

    Args:
        sr: ``(B, 3, H, W)`` images, H and W at least ``period``. Pixels beyond the last whole block are not used.
        hr: Their originals.
        period: Side of a cell in pixels.

    Returns:
        A float32 scalar: the mean absolute value of the patterns over images, channels, blocks and pixels of the cell.
    """
    error = sr.float() - hr.float()
    cells = min(GRID_CELLS, *(length // period for length in error.shape[2:]))
    height, width = (length // (cells * period) * cells * period for length in error.shape[2:])
    blocks = error[:, :, :height, :width].unflatten(3, (-1, cells, period)).unflatten(2, (-1, cells, period))
    pattern = blocks.mean((3, 6))  # (B, 3, rows of blocks, period, columns of blocks, period)
    size: Tensor = (pattern - pattern.mean((3, 5), keepdim=True)).abs().mean()
    return size


class Adversary:
    """The perceptual and adversarial losses of the generator, and the training of the discriminator."""

    def __init__(
        self, settings: GanConfig, optimizer: OptimizerConfig, accelerator: Accelerator, scale: int = 4
    ) -> None:
        """Build the networks that the settings need.

        Args:
            settings: Weights and kinds of the losses.
            optimizer: Settings that the optimizer of the discriminator shares with that of the generator.
            accelerator: That of the run.
            scale: Upscaling factor of the generator.

        Raises:
            PerceptualUnavailable: ``settings.perceptual`` is above 0 and its network is not available.
        """
        self.settings = settings
        self.clip = optimizer.clip
        self.scale = scale
        self.accelerator = accelerator
        self.perceptual = None
        if settings.perceptual > 0:
            self.perceptual = perceptual_loss(settings.perceptual_features).to(accelerator.device)
        self.unwrapped = self.discriminator = None
        """The discriminator, without and with the wrapper of accelerate; None without an adversarial loss."""
        if settings.weight > 0:
            self.unwrapped = DISCRIMINATORS[settings.discriminator](settings.features).train()
            adam = torch.optim.Adam(self.unwrapped.parameters(), lr=settings.learning_rate, betas=optimizer.betas)
            self.discriminator, self.optimizer = accelerator.prepare(self.unwrapped, adam)

    def generator_losses(self, sr: Tensor | None, x: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the losses of the generator.

        Args:
            sr: ``(B, 3, H, W)`` upscaled images, through which gradients flow; None if the network makes none.
            x: ``(B, 3, H, W)`` their originals.
            step: Number of steps that were completed before this one.

        Returns:
            The weighted sum, and its terms unweighted, by name.
        """
        total = x.new_zeros(())
        terms: dict[str, Tensor] = {}
        if sr is None:
            return total, terms
        if self.settings.grid > 0:
            terms["grid"] = grid_pattern(sr, x, self.scale)
            total = total + self.settings.grid * terms["grid"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(sr, x)
            total = total + self.settings.perceptual * terms["perceptual"]
        if self.unwrapped is not None and step >= self.settings.start:
            # The unwrapped module, because gradients pass through the discriminator here and do not train it.
            self.unwrapped.requires_grad_(False)
            real = self.unwrapped(x).detach() if self.settings.loss == "relativistic" else None
            terms["adversarial"] = generator_loss(self.settings.loss, self.unwrapped(sr), real)
            self.unwrapped.requires_grad_(True)
            total = total + self.settings.weight * terms["adversarial"]
        return total, terms

    def discriminator_losses(self, sr: Tensor | None, x: Tensor) -> dict[str, Tensor]:
        """Compute the loss of the discriminator.

        Args:
            sr: ``(B, 3, H, W)`` upscaled images, detached here; None if the network makes none.
            x: ``(B, 3, H, W)`` real images.

        Returns:
            The loss by its name; empty without a discriminator or without images.
        """
        if self.discriminator is None or sr is None:
            return {}
        # One pass for both: the wrapper for several processes requires one forward pass per backward pass.
        real, fake = self.discriminator(torch.cat((x, sr.detach()))).chunk(2)
        return {"discriminator": discriminator_loss(self.settings.loss, real, fake)}

    def backward(self, loss: Tensor) -> bool:
        """Run the backward pass of the discriminator's loss, clip its gradient, and return whether it is finite."""
        assert self.unwrapped is not None
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(list(self.unwrapped.parameters()), self.clip)
        assert norm is not None
        return bool(torch.isfinite(norm))

    def step(self, lr_factor: float) -> None:
        """Update the discriminator.

        Args:
            lr_factor: Learning rate as a fraction of the peak.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * lr_factor
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint; empty without a discriminator."""
        if self.unwrapped is None:
            return {}
        return {"discriminator": self.unwrapped.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        if self.unwrapped is not None:
            self.unwrapped.load_state_dict(state["discriminator"])
            self.optimizer.load_state_dict(state["optimizer"])


class _Conv2d(nn.Conv2d):
    """A convolution whose weight is normalised in full precision, also under autocast.

    On CUDA, autocast would run the power iteration in bfloat16, and an operation that requires equal dtypes would then
    receive bfloat16 products and float32 vectors.
    """

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            weight = self.weight
        output: Tensor = self._conv_forward(input, weight, self.bias)
        return output


def _spectral_conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    return spectral_norm(_Conv2d(inputs, outputs, kernel, stride=stride, padding=1, bias=False))


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def _as_real(logits: Tensor) -> Tensor:
    """Mean binary cross-entropy against 1: −log σ(x) = softplus(−x)."""
    return F.softplus(-logits).mean()


def _as_fake(logits: Tensor) -> Tensor:
    """Mean binary cross-entropy against 0: −log(1 − σ(x)) = softplus(x)."""
    return F.softplus(logits).mean()


def _check_kind(kind: str) -> None:
    if kind not in ("vanilla", "relativistic"):
        raise ValueError(f"kind must be 'vanilla' or 'relativistic', got {kind!r}")
