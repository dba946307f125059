"""``svdq::linear_int8``, a layer with 8-bit weights and activations (SVDQuant, table 1), and several of one input."""

from collections.abc import Sequence

import torch

from ..numerics import int8
from .awq import split_outputs
from .dispatch import call

_library = torch.library.Library("svdq", "FRAGMENT")
_library.define(
    "linear_int8(Tensor x, Tensor smooth_factor, Tensor proj_down, Tensor weight, Tensor weight_scale,"
    " Tensor proj_up, Tensor? bias) -> Tensor"
)
_library.define(
    "linears_int8(Tensor x, Tensor[] smooth_factor, Tensor[] weight, Tensor[] weight_scale, Tensor?[] bias) -> Tensor"
)


def linear_int8(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``Q(x / smooth) W_q^T + (x down) up^T + bias``, the activation quantized per token.

    Args:
        x: (M, K) bf16, fp16 or (reference only) float32.
        smooth_factor: (K,) as ``x``.
        proj_down: (K, r) as ``x``; acts on the unsmoothed ``x``.
        weight: (N, K) int8.
        weight_scale: (N,) float32.
        proj_up: (N, r); its dtype is the output's.
        bias: (N,) or None.

    Returns:
        (M, N) in ``proj_up``'s dtype.
    """
    return call("linear_int8", x, smooth_factor, proj_down, weight, weight_scale, proj_up, bias)


@torch.library.impl(_library, "linear_int8", "CompositeExplicitAutograd")
def _linear_int8_reference(x, smooth_factor, proj_down, weight, weight_scale, proj_up, bias):
    codes, act_scale = int8.quantize_rows(x.float() / smooth_factor.float())
    y = codes.float() @ weight.float().t()
    y *= act_scale
    y *= weight_scale
    y += x.float() @ proj_down.float() @ proj_up.float().t()
    if bias is not None:
        y += bias.float()
    return y.to(proj_up.dtype)


@torch.library.register_fake("svdq::linear_int8")
def _linear_int8_fake(x, smooth_factor, proj_down, weight, weight_scale, proj_up, bias):
    return proj_up.new_empty((x.shape[0], weight.shape[0]))


def linears_int8(
    x: torch.Tensor,
    smooth_factor: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    weight_scale: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """:func:`linear_int8` of layers that have one input and no low-rank branch; of few rows, in one launch.

    For a model's modulation layers, whose input is one row per image.

    Args:
        x: (M, K).
        smooth_factor, weight, weight_scale, bias: those of each layer; N may differ.

    Returns:
        (M, N) of each in ``x``'s dtype, parts of one tensor.
    """
    together = call("linears_int8", x, smooth_factor, weight, weight_scale, bias)
    return split_outputs(together, x.shape[0], weight)


@torch.library.impl(_library, "linears_int8", "CompositeExplicitAutograd")
def _linears_int8_reference(x, smooth_factor, weight, weight_scale, bias):
    down = x.new_empty((x.shape[1], 0))
    outputs = [x.new_empty(0)]
    for smooth, codes, scale, shift in zip(smooth_factor, weight, weight_scale, bias, strict=True):
        up = x.new_empty((codes.shape[0], 0))
        outputs.append(_linear_int8_reference(x, smooth, down, codes, scale, up, shift).flatten())
    return torch.cat(outputs)


@torch.library.register_fake("svdq::linears_int8")
def _linears_int8_fake(x, smooth_factor, weight, weight_scale, bias):
    return x.new_empty(x.shape[0] * sum(each.shape[0] for each in weight))
