"""Layers with E2M1 weights and activations (SVDQuant, section 4.2).

======================  =================================================================
``linear_nvfp4``        a whole layer
``feed_forward_nvfp4``  two with GELU between, where the first quantizes for the second
======================  =================================================================

The activation is smoothed and quantized per token in groups of 16, with an E4M3 scale and no scale over the
tensor, so that no pass over it is needed first: its files fold a range that E4M3 likes into ``smooth_factor``.
"""

import torch

from ..numerics import int4, nvfp4
from .dispatch import call

_library = torch.library.Library("svdq", "FRAGMENT")
_LAYER = (
    "Tensor {0}smooth_factor, Tensor {0}proj_down, Tensor {0}weight, Tensor {0}weight_scale,"
    " Tensor {0}weight_tensor_scale, Tensor? {0}weight_channel_scale, Tensor {0}proj_up, Tensor? {0}bias"
)
_library.define(f"linear_nvfp4(Tensor x, {_LAYER.format('')}) -> Tensor")
_library.define(f"feed_forward_nvfp4(Tensor x, {_LAYER.format('')}, {_LAYER.format('next_')}) -> Tensor")


def linear_nvfp4(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_tensor_scale: torch.Tensor,
    weight_channel_scale: torch.Tensor | None,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``Q(x / smooth) W_q^T + (x down) up^T + bias``.

    Args:
        x: (M, K) bf16, fp16 or (reference only) float32.
        smooth_factor: (K,) as ``x``.
        proj_down: (K, r) as ``x``; acts on the unsmoothed ``x``.
        weight: (N, K / 2) int8, two E2M1 codes to a byte.
        weight_scale: (K / 16, N) E4M3.
        weight_tensor_scale: () float32, a factor on all of the weight.
        weight_channel_scale: (N,) as ``x``, a factor on each output; or None.
        proj_up: (N, r); its dtype is the output's.
        bias: (N,) or None.

    Returns:
        (M, N) in ``proj_up``'s dtype, accumulated in float32.
    """
    return call(
        "linear_nvfp4",
        x,
        smooth_factor,
        proj_down,
        weight,
        weight_scale,
        weight_tensor_scale,
        weight_channel_scale,
        proj_up,
        bias,
    )


def feed_forward_nvfp4(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_tensor_scale: torch.Tensor,
    weight_channel_scale: torch.Tensor | None,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
    next_smooth_factor: torch.Tensor,
    next_proj_down: torch.Tensor,
    next_weight: torch.Tensor,
    next_weight_scale: torch.Tensor,
    next_weight_tensor_scale: torch.Tensor,
    next_weight_channel_scale: torch.Tensor | None,
    next_proj_up: torch.Tensor,
    next_bias: torch.Tensor | None,
) -> torch.Tensor:
    """:func:`linear_nvfp4`, GELU in its tanh form, and :func:`linear_nvfp4` again.

    GELU is taken of the first layer's float32 sums and rounded to ``proj_up``'s dtype; kernels that are not
    fused (Hopper's, and for shapes in which K or N are no multiples of 64) round what it is taken of, too.
    The fused one adds up the second layer's ``down`` with atomics: last bits may differ from run to run.

    Args:
        x: (M, K); then the first layer's operands, as :func:`linear_nvfp4` has them, with N outputs, and
        next_smooth_factor: (N,) and the others of the second layer, likewise.

    Returns:
        (M, outputs of the second layer) in ``next_proj_up``'s dtype.
    """
    return call(
        "feed_forward_nvfp4",
        x,
        smooth_factor,
        proj_down,
        weight,
        weight_scale,
        weight_tensor_scale,
        weight_channel_scale,
        proj_up,
        bias,
        next_smooth_factor,
        next_proj_down,
        next_weight,
        next_weight_scale,
        next_weight_tensor_scale,
        next_weight_channel_scale,
        next_proj_up,
        next_bias,
    )


@torch.library.impl(_library, "linear_nvfp4", "CompositeExplicitAutograd")
def _linear_nvfp4_reference(
    x,
    smooth_factor,
    proj_down,
    weight,
    weight_scale,
    weight_tensor_scale,
    weight_channel_scale,
    proj_up,
    bias,
):
    activation = nvfp4.dequantize(*nvfp4.quantize_groups(x.float() / smooth_factor.float()))
    y = activation @ nvfp4.dequantize(int4.unpack(weight, unsigned=True), weight_scale.t()).t()
    y *= weight_tensor_scale
    if weight_channel_scale is not None:
        y *= weight_channel_scale.float()
    y += x.float() @ proj_down.float() @ proj_up.float().t()
    if bias is not None:
        y += bias.float()
    return y.to(proj_up.dtype)


@torch.library.register_fake("svdq::linear_nvfp4")
def _linear_nvfp4_fake(
    x,
    smooth_factor,
    proj_down,
    weight,
    weight_scale,
    weight_tensor_scale,
    weight_channel_scale,
    proj_up,
    bias,
):
    return proj_up.new_empty((x.shape[0], weight.shape[0]))


@torch.library.impl(_library, "feed_forward_nvfp4", "CompositeExplicitAutograd")
def _feed_forward_nvfp4_reference(x, *operands):
    *first, proj_up, bias = operands[:8]
    y = _linear_nvfp4_reference(x, *first, proj_up.float(), bias)
    y = torch.nn.functional.gelu(y, approximate="tanh").to(proj_up.dtype)
    return _linear_nvfp4_reference(y, *operands[8:])


@torch.library.register_fake("svdq::feed_forward_nvfp4")
def _feed_forward_nvfp4_fake(x, *operands):
    next_weight, next_proj_up = operands[10], operands[14]
    return next_proj_up.new_empty((x.shape[0], next_weight.shape[0]))
