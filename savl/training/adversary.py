"""Stage 3's opponent: the discriminator in training, and the perceptual distance beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from savl.training.adversarial import UNetDiscriminator, discriminator_loss, generator_loss
from savl.training.config import GanConfig, OptimizerConfig
from savl.training.perceptual import PerceptualLoss

if TYPE_CHECKING:
    from accelerate import Accelerator


class Adversary:
    """What a GAN stage adds to the generator's loss, and how the discriminator keeps up with it."""

    def __init__(self, settings: GanConfig, optimizer: OptimizerConfig, accelerator: Accelerator) -> None:
        """Build it.

        Raises:
            PerceptualUnavailable: ``settings.perceptual`` is above 0 and VGG-19 cannot be had.
        """
        self.settings = settings
        self.accelerator = accelerator
        self.perceptual = PerceptualLoss().to(accelerator.device) if settings.perceptual > 0 else None
        self.plain = self.discriminator = None
        """The discriminator, without and with what accelerate wraps around it; None where there is no GAN."""
        if settings.weight > 0:
            self.plain = UNetDiscriminator(settings.features).train()
            adam = torch.optim.Adam(self.plain.parameters(), lr=settings.learning_rate, betas=optimizer.betas)
            self.discriminator, self.optimizer = accelerator.prepare(self.plain, adam)

    def against(self, sr: Tensor | None, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the generator is asked for beside its own loss.

        Args:
            sr: ``(B, 3, H, W)`` upscaled images, gradients flow to them; None where there are none.
            x: ``(B, 3, H, W)`` their originals.

        Returns:
            The weighted sum, and its terms unweighted.
        """
        total = x.new_zeros(())
        terms: dict[str, Tensor] = {}
        if sr is None:
            return total, terms
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(sr, x)
            total = total + self.settings.perceptual * terms["perceptual"]
        if self.plain is not None:
            # Judged by the bare module: gradients pass through the discriminator here and are not for it.
            self.plain.requires_grad_(False)
            real = self.plain(x).detach() if self.settings.loss == "relativistic" else None
            terms["adversarial"] = generator_loss(self.settings.loss, self.plain(sr), real)
            self.plain.requires_grad_(True)
            total = total + self.settings.weight * terms["adversarial"]
        return total, terms

    def judge(self, sr: Tensor | None, x: Tensor) -> dict[str, Tensor]:
        """The discriminator's loss.

        Args:
            sr: ``(B, 3, H, W)`` upscaled images; detached here; None where there are none.
            x: ``(B, 3, H, W)`` real ones.

        Returns:
            It, by its name; nothing without a discriminator or without images.
        """
        if self.discriminator is None or sr is None:
            return {}
        # One pass for both: a wrapper for several processes wants one forward for each backward.
        real, fake = self.discriminator(torch.cat((x, sr.detach()))).chunk(2)
        return {"discriminator": discriminator_loss(self.settings.loss, real, fake)}

    def gradient(self, loss: Tensor) -> bool:
        """Backward of what `judge` returned; whether all of the gradient is finite."""
        assert self.plain is not None
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        return all(bool(p.grad.isfinite().all()) for p in self.plain.parameters() if p.grad is not None)

    def learn(self, rate: float) -> None:
        """One step along the gradient.

        Args:
            rate: Share of the peak learning rate.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * rate
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; empty without a discriminator."""
        if self.plain is None:
            return {}
        return {"discriminator": self.plain.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        if self.plain is not None:
            self.plain.load_state_dict(state["discriminator"])
            self.optimizer.load_state_dict(state["optimizer"])
