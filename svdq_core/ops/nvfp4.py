"""``svdq::linear_nvfp4``, a whole layer with E2M1 weights and activations (SVDQuant, section 4.2).

The activation is smoothed and quantized per token in groups of 16, with an E4M3 scale and no scale over the
tensor, so that no pass over it is needed first: its files fold a range that E4M3 likes into ``smooth_factor``.
"""

import torch

from ..numerics import int4, nvfp4

_library = torch.library.Library("svdq", "FRAGMENT")
_library.define(
    "linear_nvfp4(Tensor x, Tensor smooth_factor, Tensor proj_down, Tensor weight, Tensor weight_scale,"
    " Tensor weight_tensor_scale, Tensor? weight_channel_scale, Tensor proj_up, Tensor? bias) -> Tensor"
)


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
    return torch.ops.svdq.linear_nvfp4(
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
