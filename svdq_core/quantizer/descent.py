"""Asymmetric groups fitted to a layer's input: codes one by one, and in between each group's scale and zero.

A layer whose activations stay in 16 bits is off by (Q - W) x. Of that the mean over inputs goes to the bias; the rest
has the expected square tr (Q - W) S (Q - W)^T, S the inputs' covariance. Coordinate descent lowers it from any codes
and ranges: every weight takes the code that is best while all others stay as they are (GPTQ, arXiv 2210.17323, rounds
each once, with those behind it not rounded yet), and a group's scale and zero are least squares for its codes.
"""

from __future__ import annotations

import torch

from ..numerics import awq

# What calibration sees of modulations is few embeddings: most of how channels go together there holds for those alone.
# On prompts that are not among them, outputs of the demo model's are closer than of nearest codes by 1.4 dB at 0.9, by
# 1.3 at 0.95 and by 0.9 at 0.98; by GPTQ 1.2 at 0.6 to 0.8, and 0.8 dB further off at 0, where those seen gain 12 dB.
# Of 32 more prompts, seen by the modulations alone, outputs come 0.4 dB closer, but images do not (32.8 dB, not 32.9).
_SHRINKAGE = 0.9
_FLOOR = 1e-6  # of the mean variance, for channels that never change
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
    # A column of the weight lies in one piece: (K, N) and (K / 64, N) from here on.
    wanted, value = weight.t().contiguous(), awq.dequantize(codes, scale, zero).t().contiguous()
    steps = awq.decode(codes).t().contiguous()
    scale, zero = (t.t().float().contiguous() for t in (scale, zero))
    group = _Group(wanted.shape[1], weight.device)
    for _ in range(_PASSES):
        pull = covariance @ (value - wanted)  # half of the gradient
        for g, start in enumerate(range(0, len(wanted), size)):
            columns, later = slice(start, start + size), slice(start + size, None)
            before = value[columns].clone()
            group.load(covariance[columns, columns], value[columns], steps[columns], pull[columns], scale[g], zero[g])
            group.fit_range(dtype)
            group.take_codes()
            value[columns], steps[columns], scale[g], zero[g] = group.value, group.steps, group.scale, group.zero
            pull[later].addmm_(covariance[later, columns], group.value - before)
    codes = awq.encode(steps.t()).contiguous()
    return codes, scale.t().to(dtype), zero.t().to(dtype)


class _Group:
    """64 columns, of which all else is known.

    Taking their codes is hundreds of operations on next to nothing: on CUDA they are recorded once as a graph.

    Attributes:
        metric: (64, 64) of these columns.
        value: (64, N) of the weight that codes stand for; changed, and with it
        steps: (64, N) codes, as multiples of the scale,
        pull: (64, N) half of the gradient, and
        scale, zero: (N,).
    """

    def __init__(self, n: int, device: torch.device):
        size = awq.GROUP_SIZE
        self.metric, self._reciprocal = torch.eye(size, device=device), torch.ones(size, device=device)
        self.value, self.steps, self.pull = (torch.zeros((size, n), device=device) for _ in range(3))
        self.scale, self.zero, self._inverse = (torch.zeros(n, device=device) for _ in range(3))
        self._change = torch.zeros(n, device=device)
        self.take_codes = self._take_codes
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._take_codes()
            self.take_codes = graph.replay

    def load(self, metric, value, steps, pull, scale, zero) -> None:
        """Take over a group."""
        self.metric.copy_(metric)
        torch.reciprocal(self.metric.diagonal(), out=self._reciprocal)
        for own, given in ((self.value, value), (self.steps, steps), (self.pull, pull)):
            own.copy_(given)
        self._set_range(scale, zero)

    def _set_range(self, scale: torch.Tensor, zero: torch.Tensor) -> None:
        self.scale.copy_(scale)
        self.zero.copy_(zero)
        self._inverse.copy_(torch.where(scale > 0, 1 / scale, 0.0))

    def fit_range(self, dtype: torch.dtype) -> None:
        """Scale and zero, as their type holds them, that are best for the codes; where that is worse they stay."""
        curved = self.metric @ self.steps
        second, mixed, constant = (self.steps * curved).sum(0), curved.sum(0), self.metric.sum()
        along, across = -(self.pull * self.steps).sum(0), -self.pull.sum(0)
        determinant = second * constant - mixed.square()
        scale = (self.scale + (along * constant - across * mixed) / determinant).to(dtype).float()
        zero = (self.zero + (second * across - mixed * along) / determinant).to(dtype).float()
        change = self.steps * (scale - self.scale) + (zero - self.zero)
        moved = self.metric @ change
        # Comparisons with NaN, of groups whose codes are all the same, are false.
        better = ((2 * self.pull + moved) * change).sum(0) < 0
        better &= scale > 0
        self.value.add_(torch.where(better, change, 0.0))
        self.pull.add_(torch.where(better, moved, 0.0))
        self._set_range(torch.where(better, scale, self.scale), torch.where(better, zero, self.zero))

    def _take_codes(self) -> None:
        lowest, highest = -8, 7
        for j in range(len(self.value)):
            value, steps = self.value[j], self.steps[j]
            torch.addcmul(value, self.pull[j], self._reciprocal[j], value=-1, out=steps)
            steps.sub_(self.zero).mul_(self._inverse).round_().clamp_(lowest, highest)
            torch.addcmul(self.zero, steps, self.scale, out=self._change)
            self._change.sub_(value)
            value.add_(self._change)
            self.pull[j + 1 :].addr_(self.metric[j, j + 1 :], self._change)
