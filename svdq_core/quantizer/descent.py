"""Asymmetric groups fitted to a layer's input: codes one by one, and in between each group's scale and zero.

A layer whose activations stay in 16 bits is off by (Q - W) x. Of that the mean over inputs goes to the bias; the rest
has the expected square tr (Q - W) S (Q - W)^T, S the inputs' covariance. Coordinate descent lowers it from any codes
and ranges: every weight takes the code that is best while all others stay as they are (GPTQ, arXiv 2210.17323, rounds
each once, with those behind it not rounded yet), and a group's scale and zero are least squares for its codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels import status
from ..numerics import awq

# What calibration sees of modulations is few embeddings: most of how channels go together there holds for those alone.
# On prompts that are not among them, outputs of the demo model's are closer than of nearest codes by 1.4 dB at 0.9, by
# 1.3 at 0.95 and by 0.9 at 0.98; by GPTQ 1.2 at 0.6 to 0.8, and 0.8 dB further off at 0, where those seen gain 12 dB.
# Of 32 more prompts, seen by the modulations alone, outputs come 0.4 dB closer, but images do not (32.8 dB, not 32.9).
_SHRINKAGE = 0.9
_FLOOR = 1e-6  # of the mean variance, for channels that never change
_DISTINCT = 1e-5  # of a product: what is left of it when nearly as much is taken off is rounding
_PASSES = 5  # from 2 to 3 0.03 dB, from 3 to 5 0.02


def shrunk_covariance(inputs: torch.Tensor) -> torch.Tensor:
    """(K, K) float32 of (R, K) inputs, shrunk towards its diagonal, which is positive."""
    centred = inputs - inputs.mean(dim=0)
    covariance = centred.t() @ centred / len(inputs)
    variance = covariance.diagonal().clone()
    mean = variance.mean()
    covariance.mul_(1 - _SHRINKAGE)
    covariance.diagonal().copy_(variance.clamp(min=_FLOOR * mean) if mean > 0 else torch.ones_like(variance))
    return covariance


def descend(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, covariance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and ranges whose weight is off less, in a metric, than those that it begins with.

    Args:
        weight: (N, K) float32.
        codes: (N, K) int8, and
        scale, zero: (N, K / 64) in the file's type, to begin with.
        covariance: (K, K) float32, positive definite: the metric.

    Returns:
        codes (N, K) int8, and scale and zero as before.
    """
    dtype, size = scale.dtype, awq.GROUP_SIZE
    # A column of the weight lies in one piece from here on, (K, N), and so do a group's ranges, each on its own.
    wanted, value = weight.t().contiguous(), awq.dequantize(codes, scale, zero).t().contiguous()
    steps, pull = awq.decode(codes).t().contiguous(), torch.empty_like(value)
    starts = range(0, len(value), size)
    metrics = [covariance[start : start + size, start : start + size].contiguous() for start in starts]
    columns = (t.split(size) for t in (value, steps, pull))
    ranges = ([row.clone() for row in t.t().float()] for t in (scale, zero))
    groups = [Group(*parts) for parts in zip(metrics, *columns, *ranges, strict=True)]
    for _ in range(_PASSES):
        torch.mm(covariance, value - wanted, out=pull)  # half of the gradient
        for start, group in zip(starts, groups, strict=True):
            end, before = start + size, group.value.clone()
            improve(group, dtype)
            pull[end:].addmm_(covariance[end:, start:end], group.value - before)
    codes = awq.encode(steps.t()).contiguous()
    scale, zero = (torch.stack([getattr(group, name) for group in groups], dim=1) for name in ("scale", "zero"))
    return codes, scale.to(dtype), zero.to(dtype)


class Group(NamedTuple):
    """64 columns, of which all else is known; float32, changed in place.

    Attributes:
        metric: (64, 64), the inputs' covariance.
        value: (64, N) of the weight that codes stand for.
        steps: (64, N) codes, as multiples of the scale.
        pull: (64, N), half of the gradient; of no use once the group is improved.
        scale, zero: (N,).
    """

    metric: torch.Tensor
    value: torch.Tensor
    steps: torch.Tensor
    pull: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def improve(group: Group, dtype: torch.dtype) -> None:
    """Lower the metric's cost by another range, which ``dtype`` holds, and then by other codes."""
    if group.value.is_cuda and status(group.value.device)[0]:
        from ..kernels import descent as kernel

        kernel.improve(*group, dtype)
        return
    _fit_range(group, dtype)
    _take_codes(group)


def _fit_range(group: Group, dtype: torch.dtype) -> None:
    """Scale and zero, as their type holds them, that are best for the codes; where that is worse they stay."""
    metric, value, steps, pull, scale, zero = group
    curved = metric @ steps
    second, mixed, constant = (steps * curved).sum(0), curved.sum(0), metric.sum()
    along, across = -(pull * steps).sum(0), -pull.sum(0)
    determinant = second * constant - mixed.square()
    new_scale = (scale + (along * constant - across * mixed) / determinant).to(dtype).float()
    new_zero = (zero + (second * across - mixed * along) / determinant).to(dtype).float()
    change = steps * (new_scale - scale) + (new_zero - zero)
    moved = metric @ change
    better = ((2 * pull + moved) * change).sum(0) < 0
    better &= (new_scale > 0) & (determinant > _DISTINCT * second * constant)  # or its codes are all the same
    value.add_(torch.where(better, change, 0.0))
    pull.add_(torch.where(better, moved, 0.0))
    scale.copy_(torch.where(better, new_scale, scale))
    zero.copy_(torch.where(better, new_zero, zero))


def _take_codes(group: Group) -> None:
    """Give each column the codes that are best while all else stays as it is, one column after another."""
    metric, value, steps, pull, scale, zero = group
    lowest, highest = -8, 7
    reciprocal, inverse = metric.diagonal().reciprocal(), torch.where(scale > 0, 1 / scale, 0.0)
    change = torch.empty_like(scale)
    for j in range(len(value)):
        torch.addcmul(value[j], pull[j], reciprocal[j], value=-1, out=steps[j])
        steps[j].sub_(zero).mul_(inverse).round_().clamp_(lowest, highest)
        torch.addcmul(zero, steps[j], scale, out=change)
        change.sub_(value[j])
        value[j].add_(change)
        pull[j + 1 :].addr_(metric[j, j + 1 :], change)
