"""``svdq::linear_w4a4``, a whole INT4 layer, and its two halves.

They evaluate SVDQuant's layer (arXiv 2411.05007, section 4.2)::

    x ──┬─ /smooth ─ quantize ─> qact, act_scale ─┐
        │                                         ├─> y = qact·weight + down·proj_upᵀ + bias
        └─ · proj_down ────────> down ────────────┘
         (quantize_act_int4)                       (linear_int4)

The whole layer is an operator of its own so that a device may hold what passes between the halves, and the
weight, in a layout of its own.
"""

import torch

from ..numerics import hadamard, int4
from .dispatch import call

_library = torch.library.Library("svdq", "FRAGMENT")
_library.define(
    "quantize_act_int4(Tensor x, Tensor smooth_factor, Tensor proj_down, bool act_unsigned, bool act_rotated=False)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "linear_int4(Tensor qact, Tensor act_scale, Tensor down, Tensor weight, Tensor weight_scale,"
    " Tensor proj_up, Tensor? bias, bool act_unsigned) -> Tensor"
)
_library.define(
    "linear_w4a4(Tensor x, Tensor smooth_factor, Tensor proj_down, Tensor weight, Tensor weight_scale,"
    " Tensor proj_up, Tensor? bias, bool act_unsigned, bool act_rotated=False) -> Tensor"
)


def linear_w4a4(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
    act_unsigned: bool,
    act_rotated: bool = False,
) -> torch.Tensor:
    """A whole layer: :func:`quantize_act_int4`, then :func:`linear_int4`.

    Args:
        x: (M, K).
        smooth_factor, proj_down, weight, weight_scale, proj_up, bias, act_unsigned, act_rotated: as in the two halves.

    Returns:
        (M, N) in ``proj_up``'s dtype.
    """
    return call(
        "linear_w4a4", x, smooth_factor, proj_down, weight, weight_scale, proj_up, bias, act_unsigned, act_rotated
    )


def quantize_act_int4(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    act_unsigned: bool,
    act_rotated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smooth and quantize activations, and project them down to the low-rank branch.

    Args:
        x: (M, K) bf16, fp16 or (reference only) float32.
        smooth_factor: (K,) the activation is divided by it; same dtype as ``x``.
        proj_down: (K, r) applied to the unsmoothed, unshifted, unrotated ``x``; same dtype as ``x``.
        act_unsigned: quantize ``x + GELU_SHIFT`` to [0, 15] instead of ``x`` to [-7, 7].
        act_rotated: rotate what is quantized in groups of 64 (``numerics.hadamard``); not with ``act_unsigned``.

    Returns:
        qact (M, K / 2) int8, act_scale (K / 64, M) float32, down (M, r) float32.
    """
    return call("quantize_act_int4", x, smooth_factor, proj_down, act_unsigned, act_rotated)


def linear_int4(
    qact: torch.Tensor,
    act_scale: torch.Tensor,
    down: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
    act_unsigned: bool,
) -> torch.Tensor:
    """Multiply quantized activations by a quantized weight, add the low-rank branch and the bias.

    Args:
        qact, act_scale, down: the outputs of :func:`quantize_act_int4`.
        weight: (N, K / 2) int8, signed codes.
        weight_scale: (K / 64, N).
        proj_up: (N, r); its dtype is the output's.
        bias: (N,) or None.
        act_unsigned: how ``qact`` was quantized.

    Returns:
        (M, N) in ``proj_up``'s dtype, accumulated in float32.
    """
    return call("linear_int4", qact, act_scale, down, weight, weight_scale, proj_up, bias, act_unsigned)


@torch.library.impl(_library, "quantize_act_int4", "CompositeExplicitAutograd")
def _quantize_act_reference(x, smooth_factor, proj_down, act_unsigned, act_rotated=False):
    if act_rotated:
        smoothed = hadamard.smooth_and_rotate(x, smooth_factor)
    else:
        smoothed = (x.float() + int4.GELU_SHIFT if act_unsigned else x.float()) / smooth_factor.float()
    codes, scale = int4.quantize_groups(smoothed, act_unsigned)
    return int4.pack(codes), scale.t().contiguous(), x.float() @ proj_down.float()


@torch.library.impl(_library, "linear_int4", "CompositeExplicitAutograd")
def _linear_reference(qact, act_scale, down, weight, weight_scale, proj_up, bias, act_unsigned):
    activation = int4.dequantize(int4.unpack(qact, act_unsigned), act_scale.t())
    y = activation @ int4.dequantize(int4.unpack(weight), weight_scale.t()).t()
    y += down @ proj_up.float().t()
    if bias is not None:
        y += bias.float()
    return y.to(proj_up.dtype)


@torch.library.impl(_library, "linear_w4a4", "CompositeExplicitAutograd")
def _linear_w4a4_reference(
    x, smooth_factor, proj_down, weight, weight_scale, proj_up, bias, act_unsigned, act_rotated=False
):
    quantized = quantize_act_int4(x, smooth_factor, proj_down, act_unsigned, act_rotated)
    return linear_int4(*quantized, weight, weight_scale, proj_up, bias, act_unsigned)


@torch.library.register_fake("svdq::quantize_act_int4")
def _quantize_act_fake(x, smooth_factor, proj_down, act_unsigned, act_rotated=False):
    m, k = x.shape
    return (
        x.new_empty((m, k // 2), dtype=torch.int8),
        x.new_empty((k // int4.GROUP_SIZE, m), dtype=torch.float32),
        x.new_empty((m, proj_down.shape[1]), dtype=torch.float32),
    )


@torch.library.register_fake("svdq::linear_int4")
def _linear_fake(qact, act_scale, down, weight, weight_scale, proj_up, bias, act_unsigned):
    return proj_up.new_empty((qact.shape[0], weight.shape[0]))


@torch.library.register_fake("svdq::linear_w4a4")
def _linear_w4a4_fake(
    x, smooth_factor, proj_down, weight, weight_scale, proj_up, bias, act_unsigned, act_rotated=False
):
    return proj_up.new_empty((x.shape[0], weight.shape[0]))
