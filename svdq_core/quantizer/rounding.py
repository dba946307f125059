"""Rounding a residual weight to codes, group by group along K."""

import torch

from .codecs import Codec

_BLOCK = 64  # columns whose errors are pushed on together
_CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's largest value


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


def clipped_scales(
    scales: dict[str, torch.Tensor], weight: torch.Tensor, codec: Codec, power: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Scales that clip a group's largest weights where the other weights gain more than those lose.

    Args:
        scales: as ``codec.scales`` made them.
        weight: (N, K) float32, offset taken off.
        codec: of the layer's format.
        power: (K,) what each column's squared error weighs.
    """
    full = scales["weight_scale"]
    for ratio in _CLIPPING:
        step = codec.step(scales | {"weight_scale": (full.float() * ratio).to(full.dtype)})
        wrong = dequantize(round_to_nearest(weight, codec, step), codec, step).sub_(weight).square_().mul_(power)
        error = wrong.unflatten(-1, (step.shape[1], -1)).sum(dim=-1)
        if ratio == 1.0:
            least, best = error, torch.ones_like(error)
        else:
            best = torch.where(error < least, ratio, best)
            least = torch.minimum(error, least)
    return scales | {"weight_scale": (full.float() * best.t().reshape(full.shape)).to(full.dtype)}


def gptq(weight: torch.Tensor, codec: Codec, step: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """(N, K) int8 codes that keep the layer's output close, not each weight (GPTQ, arXiv 2210.17323).

    Columns are rounded one after the other; each one's error is pushed onto the columns still to come,
    in proportion to how they go together in the inputs.

    Args:
        weight, codec, step: as for :func:`round_to_nearest`.
        spread: (K, K) float32, upper triangular, of :meth:`~.moments.InputMoments.spread`.
    """
    k, groups = weight.shape[1], step.shape[1]
    inverse_step = torch.where(step > 0, 1 / step, 0.0).t().contiguous()
    step = step.t().contiguous()
    rest = weight.t().clone(memory_format=torch.contiguous_format)  # a column lies in one piece
    codes = torch.empty(rest.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, k, _BLOCK):
        stop = start + _BLOCK
        block, errors = rest[start:stop], torch.empty_like(rest[start:stop])
        own = spread[start:stop, start:stop] / spread.diagonal()[start:stop, None]
        for j in range(_BLOCK):
            group = (start + j) * groups // k
            code = codec.encode(block[j] * inverse_step[group])
            codes[start + j] = code
            torch.sub(block[j], codec.decode(code) * step[group], out=errors[j])
            block[j + 1 :].addr_(own[j, j + 1 :], errors[j], alpha=-1)
        onto = spread[start:stop, stop:] / spread.diagonal()[start:stop, None]
        rest[stop:].addmm_(onto.t(), errors, alpha=-1)
    return codes.t().contiguous()
