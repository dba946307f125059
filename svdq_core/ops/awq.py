"""``svdq::linear_awq_w4a16``, a layer with asymmetric 4-bit weights and 16-bit activations, and several of one input.

For a model's modulation layers, whose input is one row per image: reading the weight is all the work.
"""

from collections.abc import Sequence

import torch

from ..numerics import awq, int4
from .dispatch import call

_library = torch.library.Library("svdq", "FRAGMENT")
_library.define(
    "linear_awq_w4a16(Tensor x, Tensor weight, Tensor weight_scale, Tensor weight_zero, Tensor? bias) -> Tensor"
)
_library.define(
    "linears_awq_w4a16("
    "Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor[] weight_zero, Tensor?[] bias) -> Tensor"
)


def linear_awq_w4a16(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``x W^T + bias`` with ``W = (code - 8) * scale + zero``, for any M.

    Args:
        x: (M, K) bf16, fp16 or float32.
        weight: (N, K / 2) int8, two unsigned codes to a byte.
        weight_scale, weight_zero: (K / 64, N) as ``x``.
        bias: (N,) or None.

    Returns:
        (M, N) in ``x``'s dtype.
    """
    return call("linear_awq_w4a16", x, weight, weight_scale, weight_zero, bias)


@torch.library.impl(_library, "linear_awq_w4a16", "CompositeExplicitAutograd")
def _linear_awq_w4a16_reference(x, weight, weight_scale, weight_zero, bias):
    codes = int4.unpack(weight, unsigned=True)
    y = x.float() @ awq.dequantize(codes, weight_scale.t(), weight_zero.t()).t()
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype)


@torch.library.register_fake("svdq::linear_awq_w4a16")
def _linear_awq_w4a16_fake(x, weight, weight_scale, weight_zero, bias):
    return x.new_empty((x.shape[0], weight.shape[0]))


def linears_awq_w4a16(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    weight_scale: Sequence[torch.Tensor],
    weight_zero: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """:func:`linear_awq_w4a16` of layers that have one input, in one launch.

    Args:
        x: (M, K).
        weight, weight_scale, weight_zero, bias: those of each layer; N may differ.

    Returns:
        (M, N) of each, parts of one tensor.
    """
    together = call("linears_awq_w4a16", x, weight, weight_scale, weight_zero, bias)
    return split_outputs(together, x.shape[0], weight)


def split_outputs(together: torch.Tensor, rows: int, weight: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """(rows, N) of layers with these weights (N, ...), whose outputs lie one after the other."""
    outputs = [each.shape[0] for each in weight]
    return [part.view(rows, n) for part, n in zip(together.split([rows * n for n in outputs]), outputs, strict=True)]


@torch.library.impl(_library, "linears_awq_w4a16", "CompositeExplicitAutograd")
def _linears_awq_w4a16_reference(x, weight, weight_scale, weight_zero, bias):
    layers = zip(weight, weight_scale, weight_zero, bias, strict=True)
    return torch.cat([x.new_empty(0), *(_linear_awq_w4a16_reference(x, *layer).flatten() for layer in layers)])


@torch.library.register_fake("svdq::linears_awq_w4a16")
def _linears_awq_w4a16_fake(x, weight, weight_scale, weight_zero, bias):
    return x.new_empty(x.shape[0] * sum(each.shape[0] for each in weight))
