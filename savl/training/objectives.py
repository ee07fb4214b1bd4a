"""What a run asks of the network: SR L1, the conditional ELBO of SAVL, and the CLUB bound of its rival."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from savl.network import SAVL, LikelihoodDecoder
from savl.training.config import ObjectiveConfig
from savl.training.data import Batch


@dataclass(frozen=True)
class Losses:
    """Terms of one step, scalars; `total` is their weighted sum, the others are unweighted. Absent terms are None."""

    total: Tensor
    sr: Tensor
    """Mean absolute error of the SR image, in [0, 1] units."""
    reconstruction: Tensor | None = None
    """L_rec: mean over pixels and channels of |y − ŷ| (Laplacian) or (y − ŷ)² (Gaussian)."""
    kl: Tensor | None = None
    """KL(q(r|y) ‖ p(r)), nats per pixel."""
    club: Tensor | None = None
    """CLUB upper bound on I(r; z), nats per pixel."""

    def to_log(self) -> dict[str, float]:
        """Plain numbers for a log line."""
        return {name: float(value.detach()) for name, value in vars(self).items() if value is not None}


class Objective(nn.Module):
    """J of SAVL (DESIGN: alpha · L_rec + beta · KL) beside the SR loss; owns the training-only networks."""

    def __init__(self, model: SAVL, config: ObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        code = model.config.degradation_code
        self.decoder = LikelihoodDecoder(model.config) if code != "none" and config.alpha > 0 else None
        self.critic = ContentCritic(model.config.latent) if config.club > 0 else None

    def forward(self, model: SAVL, batch: Batch, seed: int) -> Losses:
        """Score one batch.

        Args:
            model: The network in training.
            batch: Images of the step.
            seed: Seed of the reparameterized sample.
        """
        field = model.estimate(batch.y, seed=seed)
        sr = F.l1_loss(model.reconstruct(batch.y, field).float(), batch.x)
        total = sr
        reconstruction = kl = club = None
        if field is not None and self.decoder is not None:
            assert field.sample is not None
            rebuilt = self.decoder(batch.z, field.sample).float()
            distance = F.l1_loss if self.config.likelihood == "laplacian" else F.mse_loss
            reconstruction = distance(rebuilt, batch.y)
            total = total + self.config.alpha * reconstruction
            if field.kl is not None:
                kl = field.kl.float().mean()
                total = total + self.config.beta * kl
        if field is not None and self.critic is not None:
            club = self.critic.bound(field.mu, batch.z)
            # The critic learns q(z | r) on a detached code in the same backward pass; the bound itself never trains it.
            total = total + self.config.club * club - self.critic.log_likelihood(field.mu.detach(), batch.z)
        return Losses(total, sr, reconstruction, kl, club)


class ContentCritic(nn.Module):
    """q(z | r) of CLUB (Cheng et al., 2020): a Gaussian over the content code at a pixel given the code there."""

    def __init__(self, latent: int, hidden: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(latent, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, hidden, 1), nn.ReLU())
        self.mean = nn.Conv2d(hidden, 3, 1)
        self.logvar = nn.Conv2d(hidden, 3, 1)

    def log_likelihood(self, r: Tensor, z: Tensor) -> Tensor:
        """Mean over pixels of log q(z | r) in nats, up to a constant; r ``(B, R, h, w)``, z ``(B, 3, h, w)``."""
        mean, logvar = self._gaussian(r)
        return (-0.5 * (z - mean).square() / logvar.exp() - 0.5 * logvar).sum(dim=1).mean()

    def bound(self, r: Tensor, z: Tensor) -> Tensor:
        """The upper bound on I(r; z), nats per pixel: matched pairs against pairs shifted by one image of the batch.

        Gradients reach r only.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            mean, logvar = self._gaussian(r)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
        other = z.roll(1, dims=0) if z.shape[0] > 1 else z.flip(-1)
        matched = (z - mean).square()
        shuffled = (other - mean).square()
        return (0.5 * (shuffled - matched) / logvar.exp()).sum(dim=1).mean()

    def _gaussian(self, r: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(r)
        return self.mean(hidden).float(), torch.tanh(self.logvar(hidden).float())
