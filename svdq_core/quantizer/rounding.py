"""Rounding a residual weight to 4-bit codes, group by group along K."""

import torch

from ..numerics import int4


def group_scale(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(N, K / 64) scale = absmax / 7, as it will be stored.

    Args:
        weight: (N, K) float32.
        dtype: 16-bit type the file keeps scales in.
    """
    largest = weight.unflatten(-1, (-1, int4.GROUP_SIZE)).abs().amax(dim=-1)
    return (largest / int4.SIGNED_MAX).to(dtype)


def round_to_nearest(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(N, K) int8 codes, each weight to its nearest step."""
    return int4.quantize_to_scale(weight, scale.float())


def gptq(weight: torch.Tensor, scale: torch.Tensor, inputs: torch.Tensor, damping: float = 0.1) -> torch.Tensor:
    """(N, K) int8 codes that keep the layer's output close, not each weight (GPTQ, arXiv 2210.17323).

    Columns are rounded one after the other; each one's error is pushed onto the columns still to come,
    in proportion to how they go together in the inputs.

    Args:
        weight: (N, K) float32.
        scale: (N, K / 64) stored scales.
        inputs: (R, K) float32 inputs of the layer, as the kernel will see them.
        damping: share of the mean diagonal added to the Hessian; larger than GPTQ's usual 0.01,
            because the rows are few.
    """
    k = weight.shape[1]
    hessian = inputs.t() @ inputs
    mean = hessian.diagonal().mean()
    if mean <= 0:
        return round_to_nearest(weight, scale)
    hessian.diagonal().add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    # Row i of the upper factor holds how column i's error spreads over the columns after it.
    spread = torch.linalg.cholesky(inverse, upper=True)
    weight = weight.clone()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    steps = scale.float()
    for start in range(0, k, int4.GROUP_SIZE):
        stop = start + int4.GROUP_SIZE
        step = steps[:, start // int4.GROUP_SIZE]
        inverse_step = torch.where(step > 0, 1 / step, 0.0)
        block, errors = weight[:, start:stop].clone(), torch.empty_like(weight[:, start:stop])
        for j in range(int4.GROUP_SIZE):
            column = block[:, j]
            code = (column * inverse_step).round().clamp(-int4.SIGNED_MAX, int4.SIGNED_MAX)
            codes[:, start + j] = code.to(torch.int8)
            errors[:, j] = (column - code * step) / spread[start + j, start + j]
            block[:, j + 1 :] -= errors[:, j : j + 1] * spread[start + j, start + j + 1 : stop]
        weight[:, stop:] -= errors @ spread[start:stop, stop:]
    return codes
