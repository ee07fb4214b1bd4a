"""What a GAN stage adds to training: the discriminator, and what it and the generator are asked for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from savl.training.config import AdversarialLoss


class UNetDiscriminator(nn.Module):
    """The U-Net discriminator with spectral normalisation of Real-ESRGAN (Wang et al., 2021): a verdict per pixel.

    Each forward pass in training mode takes one step of the power iteration behind the spectral norms, so it changes
    buffers; they are part of ``state_dict``. In evaluation mode nothing changes.
    """

    def __init__(self, features: int = 64) -> None:
        """Build it with random weights.

        Args:
            features: Channels at full resolution; 2, 4 and 8 times as many at 1/2, 1/4 and 1/8 of it.

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
        """Judge images.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], H and W multiples of 8.

        Returns:
            ``(B, 1, H, W)`` logits; positive where a pixel is taken for real.

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


def generator_loss(kind: AdversarialLoss, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """What the generator minimizes, in nats: log 2 while the discriminator cannot tell.

    With f, r the logits of fake and real, σ the sigmoid and E the mean over all elements of the batch,

    - ``vanilla``: −E[log σ(f)] (Goodfellow et al., 2014, non-saturating);
    - ``relativistic``: −½ E[log σ(f − E[r])] − ½ E[log(1 − σ(r − E[f]))] (Jolicoeur-Martineau, 2018, halved as in
      the code of ESRGAN, to whose weight of 5e-3 it belongs).

    Args:
        kind: Which of the two.
        fake_logits: Logits of generated images, any shape.
        real_logits: Logits of real images, any shape; taken as constants. ``vanilla`` ignores them.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: ``kind`` is unknown, or ``relativistic`` got no ``real_logits``.
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
    """What the discriminator minimizes, in nats: log 2 while it cannot tell.

    With f, r, σ and E as in `generator_loss`,

    - ``vanilla``: −½ E[log σ(r)] − ½ E[log(1 − σ(f))] (Goodfellow et al., 2014);
    - ``relativistic``: −½ E[log σ(r − E[f])] − ½ E[log(1 − σ(f − E[r]))] (Jolicoeur-Martineau, 2018).

    Both are half of the published sums, so that one number, log 2, means chance throughout. Generated images must be
    detached before they are judged, or the generator is trained by this loss too.

    Args:
        kind: Which of the two.
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


class _Conv2d(nn.Conv2d):
    """A convolution whose weight is normalised in full precision, whatever autocast does around it.

    On CUDA autocast would run the power iteration in bfloat16, whose products then meet its float32 vectors in an
    operation that takes one dtype only.
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
