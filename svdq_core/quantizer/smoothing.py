"""Smoothing: moving outliers from activations into weights, where the low-rank branch takes them."""

from collections.abc import Iterator

import torch

# Migration strengths tried for the activation range, and whether the weight range counters it
# (SmoothQuant's s = ax^a / aw^(1 - a), or s = ax^a alone); the paper searches the same family.
_STRENGTHS = tuple(step / 10 for step in range(1, 11))


def candidates(act_range: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Smoothing factors worth trying, rounded to the type the file keeps.

    Args:
        act_range: (K,) float32, the largest magnitude seen per input channel.
        weight: (N, K) float32.
        dtype: 16-bit type of the file.

    Yields:
        (K,) of ``dtype``, positive and finite; all ones (no smoothing) first.
    """
    yield torch.ones_like(act_range).to(dtype)
    weight_range = weight.abs().amax(dim=0)
    # A channel that is never used or never weighted has no range to balance: leave it alone.
    alive = (act_range > 0) & (weight_range > 0)
    act = torch.where(alive, act_range, 1.0)
    counter = torch.where(alive, weight_range, 1.0)
    for strength in _STRENGTHS:
        for against in (0.0, 1.0 - strength):
            factor = act**strength / counter**against
            factor = factor / factor.log().mean().exp()  # only ratios matter; stay near 1
            factor = factor.clamp(2.0**-12, 2.0**12)
            yield torch.where(alive, factor, 1.0).to(dtype)
