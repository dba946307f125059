"""``svdq::linear_nf4``, a layer with NF4 weights and 16-bit activations: the baseline that W4A4 is compared with."""

import torch

from ..numerics import int4, nf4

_library = torch.library.Library("svdq", "FRAGMENT")
_library.define("linear_nf4(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor")


def linear_nf4(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``x W^T + bias``, the weight dequantized to ``x``'s type at every call.

    Args:
        x: (M, K) bf16, fp16 or float32.
        weight: (N, K / 2) int8, two codes to a byte.
        weight_scale: (K / 64, N) float32, the blocks' absmax.
        bias: (N,) as ``x``, or None.

    Returns:
        (M, N) in ``x``'s dtype.
    """
    return torch.ops.svdq.linear_nf4(x, weight, weight_scale, bias)


@torch.library.impl(_library, "linear_nf4", "CompositeExplicitAutograd")
def _linear_nf4_reference(x, weight, weight_scale, bias):
    dense = nf4.dequantize(int4.unpack(weight, unsigned=True), weight_scale.t())
    return torch.nn.functional.linear(x, dense.to(x.dtype), bias)


@torch.library.register_fake("svdq::linear_nf4")
def _linear_nf4_fake(x, weight, weight_scale, bias):
    return x.new_empty((x.shape[0], weight.shape[0]))
