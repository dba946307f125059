"""What a layer's input is like, as far as rounding and the low-rank branch need to know.

With the smoothed input x, its quantized self x + e and the weight W = L + R, of which Q stands in for R, the output is
off by (R - Q) x - Q e. The noise e of rounding is all but uncorrelated with x, so the expected square is

    tr (R - Q) S (R - Q)^T + tr Q D Q^T,    S = E[x x^T],    D = diag E[e^2]

and two things follow. The best Q is not R but R S (S + D)^-1 (Wiener's filter: directions where x is weak carry mostly
noise), met by codes as close as GPTQ comes in the metric S + D. And the best branch for given codes is the one nearest
to W - Q in the metric S.
"""

from __future__ import annotations

import torch

# A few hundred rows say little about how thousands of channels go together: this share of the covariance between
# channels is not believed. On rows that 512 were not among, output errors of synthetic layers are within 0.15 dB of
# each other from 0.4 to 0.8, and up to 1 dB worse at 0.1 and at 1.
_SHRINKAGE = 0.6
_FLOOR = 1e-6  # of the mean power, for channels that were never used


class InputMoments:
    """Second moments of a smoothed input and of its quantization noise.

    Attributes:
        signal: (K, K) float32, S shrunk towards its diagonal.
        noise: (K,) float32, the diagonal of D.
    """

    def __init__(self, inputs: torch.Tensor, quantized: torch.Tensor):
        """From (R, K) float32 smoothed inputs and what their codes stand for."""
        rows = max(1, len(inputs))
        self.noise = (quantized - inputs).square().sum(dim=0) / rows
        self.signal = inputs.t() @ inputs / rows
        power = self.signal.diagonal().clone()
        mean = power.mean()
        power = power.clamp(min=_FLOOR * mean) if mean > 0 else torch.ones_like(power)
        self.signal.mul_(1 - _SHRINKAGE)
        self.signal.diagonal().copy_(power)

    @property
    def power(self) -> torch.Tensor:
        """(K,) mean square of each channel as the quantized product sees it."""
        return self.signal.diagonal() + self.noise

    @property
    def cost(self) -> torch.Tensor:
        """(K,) what a unit of weight left to the codes costs: the input's noise, and as much again for the weight's.

        Codes of both err by about the same share.
        """
        return self.noise + self.signal.diagonal() * (self.noise.sum() / self.signal.diagonal().sum())

    def spread(self) -> torch.Tensor:
        """(K, K) upper triangular U with U^T U = (S + D)^-1: how GPTQ pushes a column's error onto those after it."""
        # With rows and columns in reverse, S + D = V V^T for an upper triangular V, whose inverse is U.
        reverse = self.signal.flip(0, 1)
        reverse.diagonal().add_(self.noise.flip(0))
        upper = torch.linalg.cholesky(reverse).flip(0, 1)
        identity = torch.eye(len(upper), device=upper.device)
        return torch.linalg.solve_triangular(upper, identity, upper=True)

    def compensated(self, weight: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
        """(N, K) R S (S + D)^-1 of a weight R: the product with the quantized input that errs least."""
        return weight - ((weight * self.noise) @ spread.t()) @ spread
