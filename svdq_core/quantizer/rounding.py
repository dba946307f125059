"""Rounding a residual weight to codes, group by group along K."""

import torch

from .codecs import Codec

_BLOCK = 64  # columns whose errors are pushed on together


def round_to_nearest(weight: torch.Tensor, codec: Codec, step: torch.Tensor) -> torch.Tensor:
    """(N, K) int8 codes, each weight to its nearest step.

    Args:
        weight: (N, K) float32, offset taken off.
        codec: of the layer's format.
        step: (N, groups) float32, as stored; where it is 0 the codes are those of 0.
    """
    groups, step = weight.unflatten(-1, (step.shape[1], -1)), step.unsqueeze(-1)
    return codec.encode(torch.where(step > 0, groups / step, 0.0)).flatten(-2)


def dequantize(codes: torch.Tensor, codec: Codec, step: torch.Tensor) -> torch.Tensor:
    """(N, K) float32 that codes stand for, without offset."""
    return (codec.decode(codes).unflatten(-1, (step.shape[1], -1)) * step.unsqueeze(-1)).flatten(-2)


def gptq(
    weight: torch.Tensor, codec: Codec, step: torch.Tensor, inputs: torch.Tensor, damping: float = 0.1
) -> torch.Tensor:
    """(N, K) int8 codes that keep the layer's output close, not each weight (GPTQ, arXiv 2210.17323).

    Columns are rounded one after the other; each one's error is pushed onto the columns still to come,
    in proportion to how they go together in the inputs.

    Args:
        weight, codec, step: as for :func:`round_to_nearest`.
        inputs: (R, K) float32 inputs of the layer, as the kernel will see them.
        damping: share of the mean diagonal added to the Hessian; larger than GPTQ's usual 0.01,
            because the rows are few.
    """
    k, groups = weight.shape[1], step.shape[1]
    hessian = inputs.t() @ inputs
    mean = hessian.diagonal().mean()
    if mean <= 0:
        return round_to_nearest(weight, codec, step)
    hessian.diagonal().add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    # Row i of the upper factor holds how column i's error spreads over the columns after it.
    spread = torch.linalg.cholesky(inverse, upper=True)
    weight = weight.clone()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    inverse_step = torch.where(step > 0, 1 / step, 0.0)
    for start in range(0, k, _BLOCK):
        stop = start + _BLOCK
        block, errors = weight[:, start:stop].clone(), torch.empty_like(weight[:, start:stop])
        for j in range(_BLOCK):
            column, group = block[:, j], (start + j) * groups // k
            code = codec.encode(column * inverse_step[:, group])
            codes[:, start + j] = code
            errors[:, j] = (column - codec.decode(code) * step[:, group]) / spread[start + j, start + j]
            block[:, j + 1 :] -= errors[:, j : j + 1] * spread[start + j, start + j + 1 : stop]
        weight[:, stop:] -= errors @ spread[start:stop, stop:]
    return codes
