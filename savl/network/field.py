"""The degradation field: what is known of the degradation at every pixel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from savl import ops


@dataclass(frozen=True, eq=False)
class DegradationField:
    """A Gaussian for every low-resolution pixel, or a plain code for the deterministic ablation.

    Shapes: mu, logvar and sample ``(B, R, h, w)``; kl, severity and variance ``(B, h, w)``. A deterministic code has
    a mean alone: its logvar, kl, severity and variance are None and its sample is mu.
    """

    mu: Tensor
    """Posterior mean: the type of degradation."""
    logvar: Tensor | None = None
    """Posterior log-variance: its severity."""
    sample: Tensor | None = None
    """Reparameterized sample r (mu itself if no seed was given)."""
    kl: Tensor | None = None
    """KL(q(r | y) ‖ N(0, I)) in nats per pixel."""
    severity: Tensor | None = None
    """Severity map s in [0, 2], normalised over the whole image."""
    variance: Tensor | None = None
    """Per-pixel variance v, the mean of exp(logvar) over channels."""

    @classmethod
    def from_posterior(
        cls,
        mu: Tensor,
        logvar: Tensor | None,
        seed: int | None = None,
        *,
        kernels: ops.KernelSettings | None = None,
    ) -> DegradationField:
        """Build the field from what the estimator says.

        Args:
            mu: ``(B, R, h, w)``.
            logvar: ``(B, R, h, w)``, or None for a deterministic code.
            seed: Seed of the sample, 0 ≤ seed < 2**64; None for ``sample = mu``.
            kernels: Which kernels serve; None follows `savl.use_fused_kernels`.
        """
        if logvar is None:
            return cls(mu=mu, sample=mu)
        posterior = ops.gaussian_posterior(mu, logvar, seed=seed, kernels=kernels)
        return cls(mu, logvar, posterior.sample, posterior.kl, posterior.severity, posterior.variance)
